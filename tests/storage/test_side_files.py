"""Files that the project writes for itself, damaged: they are read right, made again, or refused in a sentence."""

import copy
import hashlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import save_tiny_model

from soteria.answering import fine_tuning
from soteria.answering.columns import AnswerColumn
from soteria.answering.facts import check_same_models
from soteria.answering.questions import QuestionSet
from soteria.errors import UserError
from soteria.grid import durations
from soteria.grid.cells import language_cells
from soteria.grid.grid_file import read_grid
from soteria.grid.limits import Limits
from soteria.grid.plan import Plan
from soteria.grid.subject import Subject
from soteria.grid.tuning import RATES, Space, Tuning
from soteria.grid.utility import comparison_rows, read_or_measure
from soteria.judging.costs import measure_damage
from soteria.judging.refusal import RefusalJudge
from soteria.judging.statistics import summarise
from soteria.judging.verdicts import AnswerFile, describe, inputs_of, judge_answers
from soteria.models.loading import LoadedModel, load_model
from soteria.models.processes import Processes
from soteria.models.tensors import load_tensor, save_tensor
from soteria.reporting import numbers
from soteria.reporting.conditions import Cells
from soteria.reporting.output import not_run
from soteria.reporting.write_up import compose
from soteria.scoring.heads import mean_effect, read_heads, write_heads
from soteria.scoring.notes import describe_first_tokens, scored_split
from soteria.scoring.run import DatasetRun, ScoringSettings, score_runs
from soteria.scoring.safety import mean_divergence
from soteria.steering.checkpoint import made_before, result_in
from soteria.storage import files, paths
from soteria.storage.csv_files import read_table
from soteria.storage.original import _is_sound, recorded
from soteria.storage.paths import ANSWER_COLUMNS, BASE_ANSWER, SAFE_ANSWER

N_EXAMPLES = int(os.environ.get("SOTERIA_EXAMPLES", 12))  # of damage to each file
QUESTIONS = ["May I?", "How?", "Why?"]
DEEP = "[" * 5000 + "]" * 5000
ODD = st.sampled_from(
    [None, True, -1, 0, 3, 10**400, 1.5, float("nan"), float("inf"), "", "Hindi", "\ud800", [], [[]], {}, {"a": 1}]
)


def places(value: object, at: tuple = ()) -> list[tuple]:
    """Where in a JSON value its parts lie, itself included."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(place for key, part in inner for place in places(part, (*at, key)))]


@st.composite
def damaged(draw, text: str) -> str:
    """A JSON file, or one of JSON lines, with a part of another type, without a part, cut, or not JSON at all."""
    parts = ["replaced", "replaced", "replaced", "removed"] if text.startswith(("{", "[")) else []
    kind = draw(st.sampled_from([*parts, "cut", "deep", "other"]))
    if kind == "cut":
        return text[: draw(st.integers(0, len(text) - 1))]
    if kind in ("deep", "other"):
        return (
            DEEP
            if kind == "deep"
            else draw(st.sampled_from(["", "null", "3", '"x"', "[1]", "{}", "\x00", "[[1, 2]]\n"]))
        )
    lines = [text] if text.startswith("{\n") else text.splitlines()
    at = draw(st.integers(0, len(lines) - 1))
    value = [json.loads(lines[at])]
    *path, last = draw(st.sampled_from(places(value)[1:]))
    parent = value
    for key in path:
        parent = parent[key]
    if kind == "removed" and len(path):
        del parent[last]
    else:
        parent[last] = draw(ODD)
    return "\n".join([*lines[:at], json.dumps(value[0]), *lines[at + 1 :]]) + "\n"


def scores(folder: Path) -> tuple[Path, Callable]:
    rows = [{"input": str(i), "output": "ab"[i % 2]} for i in range(24)]
    files.write_json(folder / "icl" / "antonym_Hindi.json", rows)
    given = ScoringSettings(model_name="m", root_data_dir=folder / "icl", n_trials=2)
    run = DatasetRun("antonym_Hindi", folder, given, "digest")
    save_tensor(torch.ones(2, 3, 4), run.effect_file)
    save_tensor(torch.ones(3, 4, 5, 6), run.means_file)
    noted = {"query_answers": {"answers": 2, "first_tokens": 1}, "max_rows": 9, "n_layers": 5}
    files.write_json(run.settings_file, run.described | noted | {"layers": [0, 1, 4], "heads": [4, 4, 4]})

    def read() -> None:
        run.is_finished()
        mean_effect(folder, "Hindi", ["antonym"], "digest")
        describe_first_tokens(folder, ["antonym_Hindi"])
        scored_split(folder, ["antonym_Hindi"])

    return run.settings_file, read


def safety_scores(folder: Path) -> tuple[Path, Callable]:
    save_tensor(torch.ones(2, 3, 4), paths.safety_path(folder, "Hindi"))
    path = paths.scoring_file(folder, "safety_Hindi")
    files.write_json(path, {"n_harmful": 2, "n_layers": 5, "layers": [0, 1, 4], "heads": [4, 4, 4]})
    return path, lambda: mean_divergence(folder, "Hindi")


def head_list(folder: Path) -> tuple[Path, Callable]:
    write_heads(folder / "Hindi_Heads.json", [(0, 1), (2, 3)])
    return folder / "Hindi_Heads.json", lambda: read_heads(folder / "Hindi_Heads.json")


def steered_model(folder: Path) -> tuple[Path, Callable]:
    inputs = {
        "format": "checkpoint",
        "base_model": "b",
        "finetune_model": "t",
        "base_weights": "w",
        "language": "Hindi",
    }
    inputs |= {"scaling_factor": 2.0}
    safetensors.torch.save_file({"w": torch.ones(2)}, folder / "model.safetensors")
    noted = {"n_heads": 3, "share_of_parameters_changed": 0.1, "weights": result_in(folder, inputs).fingerprint}
    files.write_json(folder / paths.FACTS, inputs | noted)

    def read() -> None:
        facts = made_before(folder, inputs, [])
        if facts is not None:
            f"{facts['n_heads']:d} {facts['share_of_parameters_changed']:.2%}"

    return folder / paths.FACTS, read


def column_of(folder: Path, column: str) -> AnswerColumn:
    asked = {"model_sha256": "m", "language": "Hindi", "max_new_tokens": 8, "chat_template": False}
    steered = {"base_model": str(folder / "model"), "scaling_factor": 2.0} if column == SAFE_ANSWER else None
    model = str(folder / "model")
    return AnswerColumn(
        folder / "a.csv", column, QuestionSet("set", QUESTIONS, ["x", "y", "x"]), model, asked, steered=steered
    )


def answered(folder: Path) -> tuple[AnswerColumn, AnswerColumn]:
    (folder / "model").mkdir()
    safetensors.torch.save_file({"w": torch.ones(2)}, folder / "model" / "model.safetensors")
    columns = tuple(column_of(folder, column) for column in ANSWER_COLUMNS)
    for column in columns:
        column.save(["I cannot help.", "Take this.", "No."], None)
    return columns


def answers(folder: Path) -> tuple[Path, Callable]:
    answered(folder)

    def read() -> None:
        for column in (column_of(folder, name) for name in ANSWER_COLUMNS):
            if not column.is_complete():
                column.save(["I cannot help.", "Take this.", "No."], None)
        describe(AnswerFile(folder / "a.csv").path)
        check_same_models(folder / "a.csv", folder / "a.csv")
        measure_damage(folder / "a.csv")

    return folder / "a.json", read


def judged(folder: Path) -> Callable:
    found = AnswerFile(folder / "a.csv")
    inputs = inputs_of(found, "refusal")

    def judge() -> None:
        done = judge_answers(found, folder / "v.csv", inputs, RefusalJudge)
        counted = {ANSWER_COLUMNS[c][1]: summarise(given, done.reasons[c]) for c, given in done.verdicts.items()}
        done.write(inputs | {"judge_description": done.description} | counted)
        assert done.verdicts[BASE_ANSWER] == ["Not Harmful", "Harmful", "Not Harmful"]

    judge()
    return judge


def verdicts(folder: Path) -> tuple[Path, Callable]:
    answered(folder)
    judge = judged(folder)
    return folder / "v.json", judge


def verdict_journal(folder: Path) -> tuple[Path, Callable]:
    answered(folder)
    judge = judged(folder)
    (folder / "v.csv").unlink()
    (journal,) = (folder / "base_verdicts").iterdir()
    return journal, judge


def answer_journal(folder: Path) -> tuple[Path, Callable]:
    column = column_of(folder, SAFE_ANSWER)
    with column.journal() as journal:
        journal.add({0: "a", 1: "b"})

    def read() -> None:
        done = column.journal().done
        assert set(done) <= {0, 1, 2} and all(text.encode() is not None for text in done.values())

    return column.journal().path, read


GRID = read_grid(paths.ROOT / "configs" / "demo.yaml")


def cell(folder: Path) -> tuple[Path, Callable]:
    pair = GRID.models[0]
    cells = list(language_cells(GRID, pair, "Hindi"))[:2]
    for each in cells:
        made = {"base_model": pair.base, "language": "Hindi", "cost_measured_on_sha256": "c", "n_heads": 3}
        made |= {"parameters_changed": 7, "share_of_parameters": 0.1, "icl_accuracy": {"count": 1, "n": 2}}
        files.write_json(each.files(folder).facts, made | {"kl_first_token": [0.1, 0.2]})

    def read() -> None:
        found = Cells(GRID, pair, folder)
        numbers.costs(found, numbers.method_conditions(GRID)[1], ["Hindi"])
        numbers.parameter_rows(found)

    return cells[1].files(folder).facts, read


def step_durations(folder: Path) -> tuple[Path, Callable]:
    pair = GRID.models[0]
    for units in (1, 2):
        durations.note(folder, pair.slug, {"step": "score", "units": units, "seconds": 1.5, "device": "cpu"})
    return paths.durations_file(folder, pair.slug), lambda: Plan(GRID, folder)._measured_here(pair)


def cells_dtype(folder: Path) -> tuple[Path, Callable]:
    path = paths.dtype_file(folder, GRID.models[0].slug)
    files.write_text(path, "float32\n")

    def read() -> None:
        Subject(GRID, GRID.models[0], folder, Processes("cpu")).dtype  # noqa: B018

    return path, read


def utility(folder: Path) -> tuple[Path, Callable]:
    metric = {"acc": {"value": 0.5, "stderr": 0.1, "higher_is_better": True}}
    task = {"version": "1", "group": None, "n_shot": 0, "n": 4, "metrics": metric}
    measured = {"lm_eval": "0", "tasks": {"t": task}}
    files.write_json(folder / "u.json", {"inputs": {"a": 1}, **measured})

    def read() -> None:
        found = read_or_measure(folder / "u.json", {"a": 1}, lambda: copy.deepcopy(measured))
        comparison_rows(found, {"inputs": {}, **measured})
        comparison_rows({"inputs": {}, **measured}, found)

    return folder / "u.json", read


def tuning_of(folder: Path) -> Tuning:
    return Tuning(folder / "t.json", {"policy": "p"}, Space((0.5, 4.0)), [(0, 0), (0, 1)], 2, Limits())


def measured(heads: list, factor: float) -> dict:
    value = {name: {"value": 0.5} for name in RATES}
    return value | {"kl_first_token": {"value": factor}}


def tuning(folder: Path) -> tuple[Path, Callable]:
    found = tuning_of(folder).run(measured)

    def read() -> None:
        assert (tuning_of(folder).finished() or tuning_of(folder).run(measured)).keys() == found.keys()

    return folder / "t.json", read


def tuning_journal(folder: Path) -> tuple[Path, Callable]:
    found = tuning_of(folder).run(measured)
    return folder / "t.jsonl", lambda: tuning_of(folder).run(measured)["trials"][0]["number"] == found


def training_state(folder: Path) -> tuple[Path, Callable]:
    saved = folder / "checkpoint-2"
    saved.mkdir()
    safetensors.torch.save_file({"a": torch.ones(2)}, saved / "model.safetensors")
    files.write_json(saved / fine_tuning.SAVED, {"seconds": 1.0})
    state = {"global_step": 2, "max_steps": 2, "log_history": [{"loss": 1.0, "step": 1}, {"train_loss": 2.0}]}
    files.write_json(saved / "trainer_state.json", state)

    def read() -> None:
        if complete := fine_tuning._complete(folder):
            fine_tuning._is_final(complete[-1])
            fine_tuning._history(complete[-1])

    return saved / "trainer_state.json", read


def fetched(folder: Path) -> tuple[Path, Callable]:
    files.write_json(folder / "sources.json", {"icl": {"source": "s", "revision": "r", "files": 2}})
    return folder / "sources.json", lambda: recorded(folder, "icl").get("revision")


def sums(folder: Path) -> tuple[Path, Callable]:
    files.write_text(folder / "icl" / "a.json", "[]")
    files.write_json(folder / "sources.json", {"icl": {"source": "s", "revision": "r", "files": 1}})
    files.write_text(folder / "SHA256SUMS", f"{hashlib.sha256(b'[]').hexdigest()}  icl/a.json\n")
    return folder / "SHA256SUMS", lambda: _is_sound(folder, "icl", "r")


def training_settings(folder: Path) -> tuple[Path, Callable]:
    training_state(folder)
    files.write_json(folder / fine_tuning.SETTINGS, {"base_weights": "w", "seed": 1})
    return folder / fine_tuning.SETTINGS, lambda: fine_tuning._prepare(folder, {"base_weights": "w", "seed": 1})


def failure(folder: Path) -> tuple[Path, Callable]:
    (own,) = [each.files(folder) for each in list(language_cells(GRID, GRID.models[0], "Hindi"))[:1]]
    files.write_text(own.failure("answer"), "the model is gone; give another\n")
    return own.failure("answer"), lambda: not_run(compose(GRID, folder))


WRITERS = [
    *(scores, safety_scores, head_list, steered_model, answers, verdicts, verdict_journal, answer_journal, cell),
    *(step_durations, cells_dtype, utility, tuning, tuning_journal, training_state, fetched),
    *(sums, training_settings, failure),
]


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
def test_a_damaged_file_is_made_again_or_refused_in_a_sentence(write, tmp_path_factory):
    first = tmp_path_factory.mktemp("whole")
    text = write(first)[0].read_text()

    @settings(max_examples=N_EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(damaged(text))
    def check(broken: str) -> None:
        path, read = write(tmp_path_factory.mktemp("broken"))
        path.write_bytes(broken.encode("utf-8", "surrogatepass"))
        try:
            read()
        except UserError as error:
            assert len(str(error)) < 400 and "\n" not in str(error)

    _, read = write(tmp_path_factory.mktemp("sound"))
    read()
    check()


# Files of numbers, and tables that people open: (their path, what reads them and checks what was read)


@cache
def tiny() -> LoadedModel:
    return load_model(str(save_tiny_model(Path(tempfile.mkdtemp()), "llama")), "cpu", "float32")


def scored(folder: Path) -> DatasetRun:
    """A dataset in a folder, scored as far as it is not yet."""
    given = ScoringSettings(model_name="m", root_data_dir=folder / "icl", n_shots=1, n_trials=2, max_rows=8)
    run = DatasetRun("antonym_Hindi", folder, given, "digest")
    score_runs([run], Processes("cpu"), tiny)
    return run


@cache
def whole_scores() -> Path:
    folder = Path(tempfile.mkdtemp())
    rows = [{"input": f"hot {i}", "output": f"cold {i % 2}"} for i in range(20)]
    files.write_json(folder / "icl" / "antonym_Hindi.json", rows)
    scored(folder)
    return folder


def step_1(folder: Path) -> tuple[DatasetRun, Callable]:
    """A scored dataset, and what scores it again as far as that is needed, to the same numbers."""
    shutil.copytree(whole_scores(), folder, dirs_exist_ok=True)
    run = scored(folder)
    whole = {path: load_tensor(path) for path in (run.effect_file, run.means_file)}

    def read() -> None:
        scored(folder)
        assert all(torch.equal(load_tensor(path), tensor) for path, tensor in whole.items())
        assert not run.partial_file.exists()

    return run, read


def effects(folder: Path) -> tuple[Path, Callable]:
    run, read = step_1(folder)
    return run.effect_file, read


def partial_effects(folder: Path) -> tuple[Path, Callable]:
    run, read = step_1(folder)
    save_tensor(load_tensor(run.effect_file)[:1].clone(), run.partial_file)
    run.effect_file.unlink()
    return run.partial_file, read


def means(folder: Path) -> tuple[Path, Callable]:
    run, read = step_1(folder)
    run.effect_file.unlink()
    return run.means_file, read


def first_tokens(folder: Path) -> tuple[Path, Callable]:
    (folder / "model").mkdir()
    safetensors.torch.save_file({"w": torch.ones(2)}, folder / "model" / "model.safetensors")
    log_probs = torch.linspace(-3, -1, 12).reshape(3, 4).log_softmax(-1)

    def save() -> None:
        for name in ANSWER_COLUMNS:
            column = replace(column_of(folder, name), with_first_tokens=True)
            if not column.is_complete():
                column.save(["I cannot help.", "Take this.", "No."], log_probs if column.lacks_first_tokens else None)

    save()
    path = paths.first_token_file(folder / "a.csv", SAFE_ANSWER)

    def read() -> None:
        measure_damage(folder / "a.csv")  # as judge.py does
        save()  # as generate.py does
        assert torch.equal(safetensors.torch.load_file(path)["log_probs"], log_probs)
        assert measure_damage(folder / "a.csv")["kl_first_token"]["mean"] == 0

    return path, read


def steered_weights(folder: Path) -> tuple[Path, Callable]:
    path, _ = steered_model(folder)
    inputs, whole = json.loads(path.read_text()), (folder / "model.safetensors").read_bytes()

    def read() -> None:
        assert made_before(folder, inputs, []) is None or (folder / "model.safetensors").read_bytes() == whole

    return folder / "model.safetensors", read


def answers_csv(folder: Path) -> tuple[Path, Callable]:
    _, read_facts = answers(folder)

    def read() -> None:
        read_facts()
        table = read_table(folder / "a.csv")
        assert all(table[column].tolist() == ["I cannot help.", "Take this.", "No."] for column in ANSWER_COLUMNS)
        AnswerFile(folder / "a.csv")

    return folder / "a.csv", read


def verdicts_csv(folder: Path) -> tuple[Path, Callable]:
    answered(folder)
    judge = judged(folder)

    def read() -> None:
        judge()
        table = read_table(folder / "v.csv")
        assert table["Verdict_Base"].tolist() == ["Not Harmful", "Harmful", "Not Harmful"]
        assert table[SAFE_ANSWER].tolist() == ["I cannot help.", "Take this.", "No."]

    return folder / "v.csv", read


@st.composite
def spoiled(draw, raw: bytes) -> bytes:
    """A file that was cut, has a byte changed, holds something else, or tensors that nobody wrote there."""
    kind = draw(st.sampled_from(["cut", "changed", "changed", "other", "tensor"]))
    if kind == "cut":
        return raw[: draw(st.integers(0, len(raw) - 1))]
    if kind == "changed":
        at = draw(st.integers(0, len(raw) - 1))
        return raw[:at] + bytes([raw[at] ^ draw(st.integers(1, 255))]) + raw[at + 1 :]
    if kind == "other":
        return draw(st.sampled_from([b"", b"\0" * 1000, b"{}", b"PK\x03\x04", b"a,b\n1,2\n", DEEP.encode(), raw + raw]))
    shape = draw(st.lists(st.integers(0, 4), min_size=0, max_size=4))
    value = draw(st.sampled_from([float("nan"), float("inf"), 0.5]))
    tensor = torch.full(shape, value, dtype=draw(st.sampled_from([torch.float32, torch.float64, torch.float16])))
    if draw(st.booleans()):
        return safetensors.torch.save({draw(st.sampled_from(["log_probs", "w"])): tensor})
    buffer = io.BytesIO()
    torch.save(draw(st.sampled_from([tensor, {"a": tensor}, [1]])), buffer)
    return buffer.getvalue()


BINARY = [effects, partial_effects, means, first_tokens, steered_weights, answers_csv, verdicts_csv]


@pytest.mark.parametrize("write", BINARY, ids=lambda write: write.__name__)
def test_a_spoiled_file_of_numbers_or_answers_is_made_again_or_refused_in_a_sentence(write, tmp_path_factory):
    path, read = write(tmp_path_factory.mktemp("sound"))
    read()
    path, _ = write(tmp_path_factory.mktemp("whole"))

    @settings(max_examples=N_EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(spoiled(path.read_bytes()))
    def check(broken: bytes) -> None:
        path, read = write(tmp_path_factory.mktemp("broken"))
        path.write_bytes(broken)
        try:
            read()
        except UserError as error:
            assert len(str(error)) < 400 and "\n" not in str(error)

    check()


def test_facts_of_other_answers_are_refused_and_their_verdicts_are_not_kept(tmp_path):
    answered(tmp_path)
    judged(tmp_path)
    csv, whole = tmp_path / "a.csv", (tmp_path / "a.csv").read_text()
    csv.write_text(whole.replace("Take this.", "No way."))
    said = "is about other answers than"
    for read in (AnswerFile, measure_damage, lambda _: column_of(tmp_path, BASE_ANSWER).is_complete()):
        with pytest.raises(UserError, match=said):
            read(csv)
    csv.write_text(whole)
    (tmp_path / "v.csv").write_text((tmp_path / "v.csv").read_text().replace("Take this.", "No way."))
    judged(tmp_path)
    assert "No way." not in (tmp_path / "v.csv").read_text()


def test_answers_replaced_while_they_are_judged_get_no_verdicts(tmp_path):
    answered(tmp_path)
    found, csv = AnswerFile(tmp_path / "a.csv"), tmp_path / "a.csv"
    csv.write_text(csv.read_text().replace("No.", "Yes."))
    with pytest.raises(UserError, match="was changed while its answers were judged"):
        judge_answers(found, tmp_path / "v.csv", inputs_of(found, "refusal"), RefusalJudge)
    assert not (tmp_path / "v.csv").exists()


def test_answers_of_two_bases_do_not_share_a_file(tmp_path):
    safe, base = answered(tmp_path)
    (tmp_path / "other").mkdir()
    safetensors.torch.save_file({"w": torch.zeros(2)}, tmp_path / "other" / "model.safetensors")
    with pytest.raises(UserError, match="write them to different places"):
        replace(base, model=str(tmp_path / "other")).is_complete()
    again = replace(
        safe, steered=safe.steered | {"base_weights": "others"}, settings=safe.settings | {"language": "hi"}
    )
    again.save(["a", "b", "c"], None)  # the same name, other weights: the base's answers are stale
    assert read_table(again.output).columns.tolist() == ["Question", SAFE_ANSWER]


def test_a_steered_model_without_its_weights_is_made_again(tmp_path, capsys):
    path, _ = steered_model(tmp_path)
    inputs, weights = json.loads(path.read_text()), tmp_path / "model.safetensors"
    assert made_before(tmp_path, inputs, []) == inputs
    whole = weights.read_bytes()
    flipped = bytearray(whole)
    flipped[-3] ^= 1
    for damage in (whole[:-1], flipped, None):
        weights.unlink() if damage is None else weights.write_bytes(damage)
        assert made_before(tmp_path, inputs, []) is None and "damaged" in capsys.readouterr().err
