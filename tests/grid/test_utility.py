"""Utility by lm-eval: the local task against a plain loop, steered models, files that are reused, refusals."""

import importlib.metadata
import json
import math
import socket

import pytest
import torch

import evaluate_utility as script
from soteria.errors import UserError
from soteria.grid import utility
from soteria.languages import PAPER_LANGUAGES
from soteria.models.loading import BOS_TEXT, load_model
from soteria.models.task_vector import TaskVector
from soteria.scoring.prompts import load_examples, split_examples
from soteria.steering.checkpoint import steer_checkpoint
from soteria.steering.formula import open_steering, steered_in_place
from soteria.storage import files, paths

BASE, TUNED = (str(paths.DATA / "models" / name) for name in ("polyglot-base", "polyglot-tuned"))
HEADS = [(layer, head) for layer in range(4) for head in range(8)]
FACTOR = 40.0  # far too much: answers of the embedded model go wrong, so accuracy is neither 0 nor 1
LIMIT = 12
IN_PLACE = ("finetune_model", "language", "scaling_factor", "head_folder")


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


def rows_of(language: str, split: str = "test", test_split: float = 0.3, seed: int = 42) -> set[tuple[str, str]]:
    """Input and output of the rows of one part of step 1's split."""
    found = set()
    for task in utility.ICL_TASKS:
        parts = split_examples(load_examples(paths.DATA / "icl" / f"{task}_{language}.json"), test_split, seed)
        found |= {(row.input, row.output) for row in getattr(parts, split)}
    return found


def shown_and_asked(document: dict) -> tuple[list[tuple[str, ...]], tuple[str, str]]:
    """The demonstrations of a document and its query, each with its output."""
    *shown, query = document["text"].split("\n\n")
    asked = query.removeprefix("Q: ").removesuffix("\nA:")
    demonstrations = [tuple(part.removeprefix("Q: ").split("\nA: ")) for part in shown]
    return demonstrations, (asked, document["choices"][document["answer"]])


@torch.no_grad()
def plain_accuracy(loaded, language: str, start: str = "") -> float:
    """The oracle: one forward pass per choice, the likeliest taken."""
    right = []
    for document in utility.documents(language)[:LIMIT]:
        text, found = start + document["text"], []
        for choice in document["choices"]:
            n, ids = len(loaded.tokenizer(text).input_ids), loaded.tokenizer(f"{text} {choice}").input_ids
            log_probs = loaded.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
            found.append(sum(log_probs[at - 1, ids[at]].item() for at in range(n, len(ids))))
        right.append(found.index(max(found)) == document["answer"])
    return sum(right) / len(right)


def accuracy(measured: dict, task: str) -> float:
    return measured["tasks"][task]["metrics"]["acc"]["value"]


# The local task


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
    short = {language.name: utility.documents("English")[i : i + 4] for i, language in enumerate(PAPER_LANGUAGES)}
    monkeypatch.setitem(utility.DOCUMENTS, "soteria_icl", lambda language, *_, **__: short[language])
    tasks = utility.measure_utility(tiny_loaded("llama"), ["soteria_icl"], limit=2)["tasks"]
    parts = [task for task in tasks.values() if task["group"] == "soteria_icl"]
    assert (len(parts), tasks["soteria_icl"]["n"]) == (12, 24)
    mean = sum(part["metrics"]["acc"]["value"] for part in parts) / 12
    assert tasks["soteria_icl"]["metrics"]["acc"]["value"] == pytest.approx(mean, abs=1e-6)


def test_headlines_are_read_whole_and_in_bits_per_byte(lm_eval, base, steering):
    shown = [row["text"] for row in utility.headlines("Hindi")[:LIMIT]]
    read = {row.input for row in split_examples(load_examples(paths.DATA / "icl/ag_news_Hindi.json")).test}
    assert set(shown) <= read
    nats = 0.0
    with steered_in_place(base, steering), torch.inference_mode():
        measured = utility.measure_utility(base, ["soteria_text_Hindi"], limit=LIMIT)["tasks"]["soteria_text_Hindi"]
        for text in shown:
            ids = [base.tokenizer.bos_token_id, *base.tokenizer(text, add_special_tokens=False).input_ids]
            logits = base.model(torch.tensor([ids])).logits[0, :-1]
            nats += torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum").item()
    bits = nats / math.log(2) / sum(len(text.encode()) for text in shown)
    assert measured["metrics"]["bits_per_byte"]["value"] == pytest.approx(bits, rel=1e-5)
    assert (measured["n"], measured["n_shot"]) == (LIMIT, 0)


def test_documents_hold_unseen_rows_alone_and_one_choice_is_right():
    for language in (each.name for each in PAPER_LANGUAGES):
        test, found = rows_of(language), utility.documents(language)
        assert len(found) == len(test)
        for document in found:
            shown, asked = shown_and_asked(document)
            wrong = set(document["choices"]) - {asked[1]}
            assert len(shown) == 10 and {*shown, asked} <= test
            assert len(wrong) == 3 and wrong <= {output for _, output in test}
            assert not {output for _, output in shown} & set(document["choices"])


@pytest.mark.parametrize(("seed", "test_split"), [(7, 0.3), (42, 0.5)])
def test_documents_are_unseen_under_the_split_of_the_scoring(lm_eval, base, seed, test_split, monkeypatch):
    split = {"seed": seed, "test_split": test_split}
    test = rows_of("Hindi", **split)
    assert test != rows_of("Hindi") and not test & (
        rows_of("Hindi", "train", **split) | rows_of("Hindi", "valid", **split)
    )
    found = utility.documents("Hindi", **split)
    assert {row for document in found for row in (*shown_and_asked(document)[0], shown_and_asked(document)[1])} <= test
    given = (BASE, ["soteria_icl_Hindi"], None, None, "float32")
    assert utility.utility_inputs(*given, **split) != utility.utility_inputs(*given)
    asked, documents = [], utility.documents
    noting = lambda *a, **o: asked.append(documents(*a, **o)) or asked[-1]  # noqa: E731
    monkeypatch.setitem(utility.DOCUMENTS, "soteria_icl", noting)
    utility.measure_utility(base, ["soteria_icl_Hindi"], limit=1, **split)
    assert asked == [found]


def test_inputs_of_the_default_split_are_recognized():
    inputs = utility.utility_inputs(BASE, ["soteria_icl"], 32, None, "float32", scaling_factor=4.0)
    assert inputs["documents_sha256"] == "79d2e38274e246cc22f278740b408ec8e8f43af9afad32bd4fe7e41b8dd5698e"
    keys = "base_model base_sha256 dtype scaling_factor tasks languages limit documents_sha256 lm_eval"
    assert list(inputs) == keys.split()


def test_documents_are_the_same_every_time_take_turns_and_answers_take_every_place():
    found = utility.documents("Tamil")
    torch.manual_seed(1)
    assert utility.documents("Tamil") == found
    assert {document["answer"] for document in found} == {0, 1, 2, 3}
    capitals = {row.input for row in load_examples(paths.DATA / "icl" / "country-capital_Tamil.json")}
    assert [shown_and_asked(document)[1][0] in capitals for document in found[:LIMIT]] == [True, False] * (LIMIT // 2)


def test_too_few_rows_for_the_shots_are_refused():
    with pytest.raises(UserError, match=r"antonym_Hindi has .* too few.*--test_split"):
        utility.documents("Hindi", test_split=0.1)


# Models


def test_in_place_and_written_measure_the_same_and_leave_nothing_behind(
    lm_eval, base, steering, no_network, tmp_path, monkeypatch, capfd
):
    import datasets.config

    def measured(loaded):
        return utility.measure_utility(loaded, ["soteria_icl"], limit=LIMIT, languages=["hi"])

    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "here")
    before = measured(base)
    with steered_in_place(base, steering):
        in_place = measured(base)
    assert measured(base) == before != in_place
    assert no_network == [] and list((tmp_path / "here").iterdir()) == [] and base.tokenizer.pad_token is None
    assert capfd.readouterr() == ("", "")
    steer_checkpoint(steering, tmp_path / "safe", language="Hindi")
    assert measured(load_model(str(tmp_path / "safe"), "cpu")) == in_place


# The script


@pytest.fixture
def command(run_script, tmp_path):
    """`command(without, **options)`: the script on the embedded pair in Hindi, with files in a folder of its own."""
    files.write_json(tmp_path / "heads" / "Hindi_Heads.json", HEADS)
    given = {"base_model": BASE, "finetune_model": TUNED, "language": "Hindi", "scaling_factor": FACTOR}
    given |= {"head_folder": tmp_path / "heads", "limit": 2, "device": "cpu", "output": tmp_path / "utility"}
    given |= {"tasks": "soteria_icl_Hindi"}

    def run(without: tuple[str, ...] = (), **options) -> int:
        chosen = {name: value for name, value in (given | options).items() if name not in without}
        return run_script(script, *(part for name, value in chosen.items() for part in (f"--{name}", value)))

    return run


def test_files_of_the_same_inputs_are_reused_and_others_are_measured_again(
    lm_eval, command, steering, tmp_path, monkeypatch, capsys
):
    measured, measure, folder = [], utility.measure_utility, tmp_path / "utility"
    monkeypatch.setattr(utility, "measure_utility", lambda *a, **o: measured.append(o) or measure(*a, **o))
    assert command() == 0
    table = capsys.readouterr().out
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    steered = "polyglot-base_Hindi_scaling_40.json"
    assert set(found) == {"polyglot-base_base.json", steered}
    assert json.loads(found[steered])["inputs"]["scaling_factor"] == 40 and len(measured) == 2

    assert command() == 0
    assert capsys.readouterr().out == table and len(measured) == 2

    (folder / steered).unlink()  # as if interrupted before it
    assert command() == 0
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == found and len(measured) == 3

    steer_checkpoint(steering, tmp_path / "safe", language="Hindi")
    capsys.readouterr()
    assert command(IN_PLACE, safe_model=tmp_path / "safe") == 0
    assert capsys.readouterr().out == table and len(measured) == 4

    files.write_json(tmp_path / "heads" / "Hindi_Heads.json", HEADS[:3])
    assert command() == 0 and len(measured) == 5
    assert command(seed=7, test_split=0.5) == 0 and len(measured) == 7
    assert measured[-1]["seed"] == 7 and measured[-1]["test_split"] == 0.5


def test_the_table_shows_the_difference_and_both_errors():
    def measured(value, error):
        metrics = {"acc": {"value": value, "stderr": error, "higher_is_better": True}}
        whole = {"version": 1, "group": None, "n_shot": 0, "n": 10, "metrics": metrics}
        return {"tasks": {"mmlu": whole, "mmlu_law": whole | {"group": "mmlu"}}}

    (row,) = utility.comparison_rows(measured(0.5, 0.03), measured(0.4, 0.04))
    numbers = {"base": (0.5, 0.03), "safe": (0.4, 0.04), "difference": (-0.1, 0.05)}
    assert row == {"task": "mmlu", "metric": "acc", "n": 10, **numbers}
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
    "neither": ({"without": ("head_folder",)}, "--head_folder"),
    "no such safe model": ({"without": IN_PLACE, "safe_model": "./nowhere"}, "soteria.json"),
    "a safe model that is not one": ({"without": IN_PLACE, "safe_model": BASE}, "soteria.json"),
    "a safe model of another base": ({"without": IN_PLACE, "safe_model": "safe"}, "was not made from"),
    "limit 0": ({"limit": 0}, "--limit"),
    "a split of everything": ({"test_split": 1.5}, "--test_split"),
    "an output that is something else": ({"output": "other"}, "polyglot-base_base.json"),
}


def test_bad_input_ends_in_one_sentence_and_status_2(lm_eval, no_network, command, tmp_path, capsys, monkeypatch):
    from lm_eval.tasks import TaskManager

    # One task whose data would come from the hub: looking through lm-eval's own thousands takes long.
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "far.yaml").write_text(
        "task: far_away\ndataset_path: no-such-owner/no-such-data\noutput_type: multiple_choice\ntest_split: test\n"
        "doc_to_text: text\ndoc_to_choice: choices\ndoc_to_target: answer\n"
    )
    manager = TaskManager(include_path=tmp_path / "tasks", include_defaults=False)
    monkeypatch.setattr(utility, "_task_manager", lambda _: manager)
    monkeypatch.chdir(tmp_path)
    files.write_json(tmp_path / "other" / "polyglot-base_base.json", ["mine"])
    steered = {"base_model": "x", "finetune_model": "y", "language": "Hindi", "scaling_factor": 1, "n_heads": 1}
    steered |= {"format": "checkpoint", "base_weights": "other", "share_of_parameters_changed": 0.1}
    files.write_json(tmp_path / "safe" / "soteria.json", steered)
    for case, (options, named) in BAD.items():
        assert command(**options) == 2, case
        told = capsys.readouterr().err.strip()
        assert named in told and "Traceback" not in told, case
        assert len(told.splitlines()) == 1 or told.startswith("usage"), case
        assert not (tmp_path / "utility").exists(), case
    assert files.read_json(tmp_path / "other" / "polyglot-base_base.json") == ["mine"]


def test_a_missing_lm_eval_is_explained(command, monkeypatch, capsys):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert command() == 2
    assert "requirements-utility.txt" in capsys.readouterr().err


def test_no_script_hides_an_installed_package():
    names = {path.stem for path in (paths.ROOT / "src").iterdir() if path.suffix == ".py" or path.is_dir()}
    assert names & set(importlib.metadata.packages_distributions()) <= {"soteria"}
