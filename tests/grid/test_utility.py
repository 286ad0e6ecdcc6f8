"""Utility by lm-eval: the local task against a plain loop, steered models, files that are reused, refusals."""

import importlib.metadata
import json
import socket

import pytest
import torch

import evaluate_utility as script
from soteria.errors import UserError
from soteria.grid import utility
from soteria.languages import PAPER_LANGUAGES
from soteria.models.loading import BOS_TEXT, load_model
from soteria.models.task_vector import TaskVector
from soteria.scoring.prompts import Pair, load_pairs, split_pairs
from soteria.steering.checkpoint import steer_checkpoint
from soteria.steering.formula import open_steering, steered_in_place
from soteria.storage import files, paths

BASE, TUNED = (str(paths.DATA / "models" / name) for name in ("polyglot-base", "polyglot-tuned"))
HEADS = [(layer, head) for layer in range(4) for head in range(8)]
FACTOR = 40.0  # far too much: answers of the embedded model go wrong, so that accuracy is neither 0 nor 1
LIMIT = 12


@pytest.fixture
def lm_eval():
    return pytest.importorskip("lm_eval", reason="lm-eval is not installed (requirements-utility.txt)")


@pytest.fixture(scope="module")
def base():
    return load_model(BASE, "cpu")


@pytest.fixture(scope="module")
def steering():
    return open_steering(TaskVector.open(BASE, TUNED), HEADS, FACTOR, source="by hand")


@pytest.fixture
def no_network(monkeypatch) -> list:
    """No address is found; the list holds those that were asked for."""
    asked = []

    def fail(host, *_, **__):
        asked.append(host)
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    return asked


@pytest.fixture
def few_tasks(monkeypatch, tmp_path, lm_eval):
    """lm-eval knows one task, whose data would come from the hub: to look through its own thousands takes long."""
    from lm_eval.tasks import TaskManager

    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "far.yaml").write_text(
        "task: far_away\ndataset_path: no-such-owner/no-such-data\noutput_type: multiple_choice\ntest_split: test\n"
        "doc_to_text: text\ndoc_to_choice: choices\ndoc_to_target: answer\n"
    )
    manager = TaskManager(include_path=tmp_path / "tasks", include_defaults=False)
    monkeypatch.setattr(utility, "_task_manager", lambda _: manager)


# The local task


@torch.no_grad()
def log_likelihood(loaded, text: str, choice: str) -> float:
    n = len(loaded.tokenizer(text).input_ids)
    ids = loaded.tokenizer(f"{text} {choice}").input_ids
    log_probs = loaded.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(log_probs[at - 1, ids[at]].item() for at in range(n, len(ids)))


def plain_accuracy(loaded, language: str, start: str = "") -> float:
    """The oracle: one forward a choice, the likeliest taken."""
    right = []
    for document in utility.documents(language)[:LIMIT]:
        found = [log_likelihood(loaded, start + document["text"], choice) for choice in document["choices"]]
        right.append(found.index(max(found)) == document["answer"])
    return sum(right) / len(right)


def accuracy(measured: dict, task: str) -> float:
    return measured["tasks"][task]["metrics"]["acc"]["value"]


def test_accuracy_is_that_of_the_likeliest_choice(lm_eval, base, steering):
    with steered_in_place(base, steering):
        measured = utility.measure_utility(base, ["soteria_icl_Hindi"], limit=LIMIT, batch_size=7)
        expected = plain_accuracy(base, "Hindi")
    assert 0 < expected < 1
    assert accuracy(measured, "soteria_icl_Hindi") == round(expected, 6)
    assert measured["tasks"]["soteria_icl_Hindi"]["n"] == LIMIT


def test_a_tokenizer_without_bos_gets_one_in_the_prompt(lm_eval, tiny_loaded):
    loaded = tiny_loaded("gpt2", adds_bos=False)
    measured = utility.measure_utility(loaded, ["soteria_icl_English"], limit=LIMIT)
    assert accuracy(measured, "soteria_icl_English") == round(plain_accuracy(loaded, "English", BOS_TEXT), 6)


def test_the_group_is_the_mean_of_the_twelve(lm_eval, tiny_loaded, monkeypatch):
    short = {name: utility.documents("English")[:4] for name in (language.name for language in PAPER_LANGUAGES)}
    monkeypatch.setattr(utility, "documents", lambda language, form=None: short[language])
    tasks = utility.measure_utility(tiny_loaded("llama"), ["soteria_icl"], limit=2)["tasks"]
    parts = [task for task in tasks.values() if task["group"] == "soteria_icl"]
    assert (len(parts), tasks["soteria_icl"]["n"]) == (12, 24)
    mean = sum(part["metrics"]["acc"]["value"] for part in parts) / 12
    assert tasks["soteria_icl"]["metrics"]["acc"]["value"] == pytest.approx(mean, abs=1e-6)


@pytest.mark.parametrize("language", [language.name for language in PAPER_LANGUAGES])
def test_documents_use_test_rows_alone_and_one_choice_is_right(language):
    test = []
    for task in utility.LOCAL_TASKS:
        test += split_pairs(load_pairs(paths.DATA / "icl" / f"{task}_{language}.json"), 0.3, 42).test
    found = utility.documents(language)
    assert len(found) == len(test)
    outputs = {row.output for row in test}
    for document in found:
        *shown, query = document["text"].split("\n\n")
        demonstrations = [Pair(*part.removeprefix("Q: ").split("\nA: ")) for part in shown]
        asked = query.removeprefix("Q: ").removesuffix("\nA:")
        answer = document["choices"][document["answer"]]
        wrong = [choice for at, choice in enumerate(document["choices"]) if at != document["answer"]]
        assert len(demonstrations) == 10 and set(demonstrations) <= set(test)
        assert Pair(asked, answer) in test
        assert len(set(wrong)) == 3 and answer not in wrong and set(wrong) <= outputs
        assert not {row.output for row in demonstrations} & set(document["choices"])


def test_documents_are_the_same_every_time_and_answers_take_every_place():
    found = utility.documents("Tamil")
    torch.manual_seed(1)
    assert utility.documents("Tamil") == found
    assert {document["answer"] for document in found} == {0, 1, 2, 3}


def test_a_limit_takes_both_tasks(lm_eval):
    inputs = [{row.input for row in load_pairs(paths.DATA / "icl" / f"{t}_English.json")} for t in utility.LOCAL_TASKS]
    asked = [d["text"].rpartition("Q: ")[2].removesuffix("\nA:") for d in utility.documents("English")[:LIMIT]]
    assert [sum(word in words for word in asked) for words in inputs] == [LIMIT // 2] * 2


# Models


def test_in_place_and_written_measure_the_same(lm_eval, base, steering, tmp_path):
    def measured(loaded):
        return utility.measure_utility(loaded, ["soteria_icl"], limit=LIMIT, languages=["hi"])

    steer_checkpoint(steering, tmp_path / "safe", language="Hindi")
    before = measured(base)
    with steered_in_place(base, steering):
        in_place = measured(base)
    assert measured(load_model(str(tmp_path / "safe"), "cpu")) == in_place != before
    assert measured(base) == before


def test_the_tokenizer_is_left_as_it_was(lm_eval, base):
    assert base.tokenizer.pad_token is None
    utility.measure_utility(base, ["soteria_icl_English"], limit=1)
    assert base.tokenizer.pad_token is None


def test_local_tasks_ask_for_no_address_and_leave_no_file(lm_eval, base, no_network, tmp_path, monkeypatch, capfd):
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.chdir(tmp_path)
    utility.measure_utility(base, ["soteria_icl_English"], limit=1)
    assert no_network == [] and list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


# The script


@pytest.fixture
def command(run_script, tmp_path):
    """`command(*more)`: the script on the embedded pair in Hindi, heads and results in a folder of its own."""
    files.write_json(tmp_path / "heads" / "Hindi_Heads.json", HEADS)
    given = {"base_model": BASE, "finetune_model": TUNED, "language": "Hindi", "scaling_factor": FACTOR}
    given |= {"head_folder": tmp_path / "heads", "limit": 2, "device": "cpu", "output": tmp_path / "utility"}
    given |= {"tasks": "soteria_icl_Hindi"}

    def run(without: tuple[str, ...] = (), **options) -> int:
        chosen = {name: value for name, value in (given | options).items() if name not in without}
        return run_script(script, *(part for name, value in chosen.items() for part in (f"--{name}", value)))

    return run


STEERING = ("finetune_model", "language", "scaling_factor", "head_folder")


def test_a_file_of_the_same_inputs_is_reused_and_another_is_made_anew(lm_eval, command, tmp_path, monkeypatch, capsys):
    measured, measure = [], utility.measure_utility
    monkeypatch.setattr(utility, "measure_utility", lambda *a, **o: measured.append(o) or measure(*a, **o))
    assert command() == 0
    table = capsys.readouterr().out
    found = {path.name: path.read_bytes() for path in (tmp_path / "utility").iterdir()}
    assert set(found) == {"polyglot-base_base.json", "polyglot-base_Hindi_scaling_40.json"}
    facts = json.loads(found["polyglot-base_Hindi_scaling_40.json"])
    assert facts["inputs"]["scaling_factor"] == 40 and len(measured) == 2

    assert command() == 0
    assert capsys.readouterr().out == table and len(measured) == 2

    (tmp_path / "utility" / "polyglot-base_Hindi_scaling_40.json").unlink()  # as if interrupted before it
    assert command() == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "utility").iterdir()} == found and len(measured) == 3

    files.write_json(tmp_path / "heads" / "Hindi_Heads.json", HEADS[:3])
    assert command() == 0
    assert len(measured) == 4


def test_a_written_model_gives_the_same_table(lm_eval, command, steering, tmp_path, capsys):
    steer_checkpoint(steering, tmp_path / "safe", language="Hindi")
    assert command() == 0
    table = capsys.readouterr().out
    assert command(STEERING, safe_model=tmp_path / "safe") == 0
    assert capsys.readouterr().out == table


def test_the_table_shows_the_difference_and_both_errors():
    def measured(value, error):
        metrics = {"acc": {"value": value, "stderr": error, "higher_is_better": True}}
        whole = {"version": 1, "group": None, "n_shot": 0, "n": 10, "metrics": metrics}
        return {"tasks": {"mmlu": whole, "mmlu_law": whole | {"group": "mmlu"}}}

    (row,) = utility.comparison_rows(measured(0.5, 0.03), measured(0.4, 0.04))
    assert row == {
        "task": "mmlu",
        "metric": "acc",
        "n": 10,
        "base": (0.5, 0.03),
        "safe": (0.4, 0.04),
        "difference": (-0.1, 0.05),
    }
    (row,) = utility.comparison_rows(measured(0.5, None), measured(0.4, 0.04))
    assert row["difference"] == (-0.1, None)


BAD = {
    "unknown task": ({"tasks": "no_such_task"}, "'no_such_task'"),
    "a task that needs the hub": ({"tasks": "far_away"}, "hub"),
    "unknown language in a task": ({"tasks": "soteria_icl_Klingon"}, "Klingon"),
    "no rows in the language": ({"tasks": "soteria_icl_Swahili"}, "Swahili"),
    "no such base": ({"base_model": "./nowhere"}, "./nowhere"),
    "no such tuned": ({"finetune_model": "./nowhere"}, "./nowhere"),
    "no such head folder": ({"head_folder": "nowhere"}, "nowhere"),
    "no list of the language": ({"language": "Tamil"}, "Tamil_Heads.json"),
    "safe beside steering": ({"safe_model": BASE}, "--safe_model"),
    "limit 0": ({"limit": 0}, "below 1"),
    "an output that is something else": ({"output": "other"}, "polyglot-base_base.json"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_ends_in_one_sentence_and_status_2(
    case, few_tasks, no_network, command, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    files.write_json(tmp_path / "other" / "polyglot-base_base.json", ["mine"])
    options, named = BAD[case]
    assert command(**options) == 2
    told = capsys.readouterr().err.strip()
    assert named in told and "Traceback" not in told
    assert len(told.splitlines()) == 1 or told.startswith("usage")
    assert not (tmp_path / "utility").exists()
    assert files.read_json(tmp_path / "other" / "polyglot-base_base.json") == ["mine"]


@pytest.mark.parametrize("safe", ["./nowhere", BASE])
def test_a_safe_model_that_steer_did_not_write_is_refused(safe, lm_eval, command, capsys):
    assert command(STEERING, safe_model=safe) == 2
    assert "soteria.json" in capsys.readouterr().err


def test_a_safe_model_of_another_base_is_refused(lm_eval, command, tmp_path, tiny_folder, capsys):
    files.write_json(tmp_path / "safe" / "soteria.json", {"format": "checkpoint", "base_weights": "other"})
    assert command(STEERING, safe_model=tmp_path / "safe") == 2
    assert "was not made from" in capsys.readouterr().err


def test_a_missing_lm_eval_is_explained(command, monkeypatch, capsys):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert command() == 2
    assert capsys.readouterr().err == ("error: lm-eval is not installed; pip install -r requirements-utility.txt\n")


def test_too_few_rows_for_the_shots_are_refused(monkeypatch):
    monkeypatch.setattr(utility, "load_pairs", lambda path: [Pair(f"q{i}", f"a{i}") for i in range(20)])
    with pytest.raises(UserError, match="too few"):
        utility.documents("English")
