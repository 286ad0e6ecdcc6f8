"""Files that the project writes for itself, damaged: they are read right, made again, or refused in a sentence."""

import copy
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

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
from soteria.models.processes import Processes
from soteria.models.tensors import save_tensor
from soteria.reporting import numbers
from soteria.reporting.conditions import Cells
from soteria.scoring.heads import mean_effect, read_heads, write_heads
from soteria.scoring.notes import describe_first_tokens, scored_split
from soteria.scoring.run import DatasetRun, ScoringSettings
from soteria.scoring.safety import mean_divergence
from soteria.steering.checkpoint import made_before, result_in
from soteria.storage import files, paths
from soteria.storage.csv_files import read_table
from soteria.storage.original import recorded
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


WRITERS = [
    *(scores, safety_scores, head_list, steered_model, answers, verdicts, verdict_journal, answer_journal, cell),
    *(step_durations, cells_dtype, utility, tuning, tuning_journal, training_state, fetched),
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
