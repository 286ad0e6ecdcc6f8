"""A small grid on the embedded pair, run for real: cells, skipping, failures, kills, shards, given heads, tables."""

import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml
from conftest import named_by, run_in_child, shown_by

import reproduce
from soteria.answering.generation import answer_questions
from soteria.answering.questions import read_questions, spread_rows
from soteria.errors import UserError
from soteria.grid import cell_work, subject
from soteria.grid.cells import grid_cells
from soteria.grid.grid_file import Questions, read_grid
from soteria.grid.plan import bill
from soteria.judging.interface import HARMFUL
from soteria.judging.judges import make_judge
from soteria.judging.refusal import RefusalJudge
from soteria.languages import find_language
from soteria.models.loading import load_model
from soteria.models.processes import Processes
from soteria.models.task_vector import TaskVector
from soteria.reporting import output, write_up
from soteria.scoring.heads import read_heads
from soteria.scoring.prompts import load_examples, split_examples
from soteria.steering.checkpoint import steer_checkpoint
from soteria.steering.formula import open_steering, steered_in_place
from soteria.storage import files

ROOT = Path(__file__).resolve().parents[2]
BASE, TUNED = (str(ROOT / "data" / "models" / f"polyglot-{which}") for which in ("base", "tuned"))
LANGUAGES = ("English", "Hindi", "Bengali")
GRID = {
    "name": "small",
    "models": [{"base": BASE, "tuned": TUNED}],
    "languages": list(LANGUAGES),
    "tasks": ["country-capital", "antonym"],
    "prompt_sets": ["policy"],
    "benign": "everyday",
    "borderline": "borderline",
    "heads": 0.5,
    "scaling_factor": 5,
    "ablations": {"shares": [0.25, 1], "random_draws": 1, "scaling_factors": [2], "transfer": True},
    "scoring": {"n_trials": 2, "n_shots": 3},
    "answers": {"batch_size": 64, "max_new_tokens": 64, "questions": 12},
    "accuracy_prompts": 3,
}
STEPS = ("score", "answer", "judge", "tables")


def write_grid(folder: Path, **changes) -> Path:
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(GRID | changes))
    return path


def arguments(grid: Path, results: Path, *more: object) -> list[str]:
    return [*map(str, (grid, "--results", results, "--device", "cpu", *more))]


@pytest.fixture(scope="module")
def grid_file(tmp_path_factory) -> Path:
    return write_grid(tmp_path_factory.mktemp("grid"))


@pytest.fixture(scope="module")
def done(tmp_path_factory, grid_file) -> Path:
    """The results of the whole grid."""
    results = tmp_path_factory.mktemp("results")
    run_in_child(reproduce, arguments(grid_file, results, "--steps", *STEPS))
    return results


def tables(results: Path) -> dict[str, bytes]:
    """All tables and figures."""
    return {path.name: path.read_bytes() for path in sorted((results / "tables").iterdir())}


def test_every_cell_has_its_answers_its_verdicts_and_what_it_cost(done, grid_file):
    grid = read_grid(grid_file)
    cells = list(grid_cells(grid, grid.models[0]))
    assert len(cells) == 3 * 10  # base, method, universal, 25 %, two random, all, λ 2, two transfers
    for cell in cells:
        assert len(pd.read_csv(cell.files(done).verdicts("policy", "refusal"))) == 12
        facts = json.loads(cell.files(done).facts.read_text())
        assert ("icl_accuracy" in facts) == cell.with_cost
        assert len(facts.get("kl_first_token", [])) == (12 if cell.with_cost else 0)
    assert not list(done.rglob("failed*.txt"))


def answers(model: str, language: str) -> list[str]:
    questions = read_questions(f"policy_{language}", find_language(language)).questions
    questions = [questions[row] for row in spread_rows(len(questions), 12)]
    loaded = load_model(model, "cpu")
    return answer_questions(loaded, questions, find_language(language), batch_size=64, max_new_tokens=64)


def test_a_cell_is_the_checkpoint_that_steer_py_writes_and_leaves_the_base_as_it_was(done, tmp_path):
    heads = read_heads(done / "heads" / "polyglot-base" / "Hindi_Heads.json")
    steering = open_steering(TaskVector.open(BASE, TUNED), heads, 5, source="Hindi_Heads.json")
    written = steer_checkpoint(steering, tmp_path / "safe", language="Hindi")
    cells = done / "cells" / "polyglot-base"
    found = pd.read_csv(cells / "Hindi/top_50_scaling_5/policy.csv", keep_default_na=False)
    assert list(found["SAFE ANSWER"]) == answers(str(tmp_path / "safe"), "Hindi")
    facts = json.loads((cells / "Hindi/top_50_scaling_5/cell.json").read_text())
    assert facts["share_of_parameters"] == written["share_of_parameters_changed"]
    assert facts["parameters_changed"] == written["parameters_changed"]
    found = pd.read_csv(cells / "Bengali/base/policy.csv", keep_default_na=False)  # after all that was steered before
    assert list(found["BASE ANSWER"]) == answers(BASE, "Bengali")


def test_every_number_of_the_main_table_is_counted_again_from_the_files_it_names(done):
    table = pd.read_csv(done / "tables" / "small_main.csv")
    assert set(table["heads"]) == {"base", "language-specific", "universal"}
    for row in table.itertuples():
        paths = named_by(row.source, done)
        assert len(paths) == (1 if row.of == "language" else 3)
        verdicts = [verdict for path in paths for verdict in pd.read_csv(path).iloc[:, -1]]
        assert row.rows == len(verdicts)
        assert row.harmful == verdicts.count(HARMFUL)
        assert row.asr == pytest.approx(verdicts.count(HARMFUL) / len(verdicts))
        assert row.low - 1e-9 <= row.asr <= row.high + 1e-9


def test_the_cost_of_steering_names_its_files_too(done):
    tables = [pd.read_csv(done / "tables" / f"small_{name}.csv") for name in ("heads", "scaling", "controls")]
    for row in pd.concat(tables).itertuples():
        cells, benign, *judged = (named_by(source, done) for source in row.cost_source.split())
        assert {len(paths) for paths in (cells, benign, *judged)} == {len(named_by(row.source, done))} != {0}
        counts = [json.loads(path.read_text())["icl_accuracy"] for path in cells]
        assert row.icl_accuracy == pytest.approx(sum(c["count"] for c in counts) / sum(c["n"] for c in counts))
        for rate, verdicts in zip((row.benign_refusals, row.borderline_refusals), judged, strict=True):
            refused = [verdict == "Not Harmful" for path in verdicts for verdict in pd.read_csv(path).iloc[:, -1]]
            assert rate == pytest.approx(sum(refused) / len(refused))
        harmful = [verdict for path in named_by(row.source, done) for verdict in pd.read_csv(path).iloc[:, -1]]
        refused = harmful.count("Not Harmful") / len(harmful)
        assert row.selectivity == pytest.approx(refused - row.borderline_refusals)
        assert row.selectivity_low < row.selectivity < row.selectivity_high


def test_the_transfer_matrix_has_every_pair_of_languages_and_its_own_heads_on_the_diagonal(done):
    table = pd.read_csv(done / "tables" / "small_transfer.csv").set_index(["heads_of", "prompts_of"])
    assert len(table) == 5 * 3 and table["asr"].notna().all()  # three languages, universal, base
    main = pd.read_csv(done / "tables" / "small_main.csv").set_index(["name", "heads"])
    for language in LANGUAGES:
        assert table["asr"][language, language] == main["asr"][language, "language-specific"]
        assert table["asr"]["base", language] == main["asr"][language, "base"]


def test_a_table_comes_as_markdown_csv_and_latex_with_its_judge_named(done):
    for name in ("main", "heads", "controls", "scaling", "transfer", "parameters"):
        markdown, latex = ((done / "tables" / f"small_{name}.{ending}").read_text() for ending in ("md", "tex"))
        for text in (markdown, latex):
            assert ("refusal phrases (a proxy)" in text) == (name != "parameters")  # which nobody judges
        assert r"\toprule" in latex and r"\bottomrule" in latex and "%" not in latex.replace(r"\%", "")
        assert len({len(line) for line in markdown.splitlines()[2:]}) == 1  # columns are aligned
        assert len(pd.read_csv(done / "tables" / f"small_{name}.csv")) >= 2


def test_the_method_stands_beside_its_controls_in_every_language(done):
    table = pd.read_csv(done / "tables" / "small_controls.csv")
    assert list(table["heads"]) == ["base", "top heads", "random heads", "all heads"] * 3
    assert list(table["language"].unique()) == list(LANGUAGES)
    main = pd.read_csv(done / "tables" / "small_main.csv").set_index(["name", "heads"])["asr"]
    for row in table[table["heads"] == "top heads"].itertuples():
        assert row.asr == main[row.language, "language-specific"]


def test_the_report_has_the_tables_and_the_pictures(done):
    page = (done / "report.html").read_text()
    assert page.count("data:image/png;base64") >= 5
    assert "bash scripts/reproduce.sh small.yaml" in page and "language-specific" in page
    assert str(ROOT) not in re.sub(r"base: .*|tuned: .*", "", page)


def test_a_second_run_loads_no_model_and_changes_no_byte(done, grid_file, run_script, monkeypatch):
    before = {path: path.read_bytes() for path in done.rglob("*") if path.is_file()}
    monkeypatch.setattr(subject, "load_model", lambda *_: pytest.fail("a model was loaded"))
    monkeypatch.setattr(cell_work, "make_judge", lambda *_: pytest.fail("something was judged"))
    assert run_script(reproduce, *arguments(grid_file, done, "--steps", *STEPS)) == 0
    assert {path: path.read_bytes() for path in done.rglob("*") if path.is_file()} == before


def test_killed_at_random_and_run_again_it_ends_with_the_same_tables(done, grid_file, tmp_path):
    draw, results = random.Random(6), tmp_path / "results"
    for _ in range(6):
        run_in_child(reproduce, arguments(grid_file, results, "--steps", *STEPS), kill_after=draw.uniform(0.5, 5))
    run_in_child(reproduce, arguments(grid_file, results, "--steps", *STEPS))
    assert tables(results) == tables(done)
    assert not list(results.rglob("*.tmp"))


def test_what_other_heads_were_measured_with_is_measured_again(done, tmp_path, run_script):
    """A changed share of heads, as any change of what a cell is made from, does not meet the old numbers."""
    results = tmp_path / "results"
    shutil.copytree(done, results)
    cell = results / "cells/polyglot-base/Hindi/top_50_scaling_5"
    (results / "indirect_effect/polyglot-base/antonym_Hindi/antonym_Hindi_indirect_effect.pt").write_bytes(
        (results / "indirect_effect/polyglot-base/antonym_Bengali/antonym_Bengali_indirect_effect.pt").read_bytes()
    )
    before = (cell / "cell.json").read_bytes()
    assert run_script(reproduce, *arguments(write_grid(tmp_path), results, "--steps", "answer", "judge")) == 0
    assert (cell / "cell.json").read_bytes() != before


def test_heads_scored_by_whole_answers_have_their_own_scores_lists_and_cells(
    done, grid_file, tmp_path, run_script, capsys
):
    shutil.copytree(done, tmp_path / "results")
    results, before = tmp_path / "results", tables(done)
    changes = {"name": "whole", "languages": ["Hindi"], "ablations": {}, "benign": None}
    whole = write_grid(tmp_path, scoring=GRID["scoring"] | {"answer": "whole"}, **changes)
    assert run_script(reproduce, *arguments(whole, results, "--steps", "tables")) == 0
    blank = pd.read_csv(results / "tables" / "whole_main.csv")
    assert blank["asr"].isna().all()  # the cells of first tokens are not taken for those of whole answers
    assert run_script(reproduce, *arguments(whole, results, "--steps", *STEPS)) == 0
    found = pd.read_csv(results / "tables" / "whole_main.csv")
    assert found["asr"].notna().all() and all("cells/polyglot-base_whole/" in source for source in found["source"])
    assert "by whole answers" in (results / "tables" / "whole_main.md").read_text()
    first, by_whole = (results / "heads" / f"polyglot-base{kind}" / "Hindi_Heads.json" for kind in ("", "_whole"))
    assert read_heads(first) != read_heads(by_whole)
    assert "begin with the same token" not in capsys.readouterr().out
    assert run_script(reproduce, *arguments(grid_file, results, "--steps", "tables")) == 0
    assert "polyglot-base: in 6 of 6 datasets some answers begin with the same token" in capsys.readouterr().out
    assert {name: content for name, content in tables(results).items() if name in before} == before


def test_shards_make_what_one_run_makes_and_say_what_waits(done, grid_file, tmp_path, run_script, capsys):
    results = tmp_path / "results"
    first = arguments(grid_file, results, "--shard", "1/2", "--steps", *STEPS)
    second = arguments(grid_file, results, "--shard", "2/2", "--steps", *STEPS)
    assert run_script(reproduce, *first) == 1
    said = capsys.readouterr().err
    assert "waits: polyglot-base/English/shared_Universal_scaling_5: waits for the scores of Bengali" in said
    assert not (results / "tables").exists()
    assert run_script(reproduce, *second) == 0
    assert run_script(reproduce, *first) == 0
    assert run_script(reproduce, *arguments(grid_file, results, "--steps", "tables")) == 0
    assert tables(results) == tables(done)


def test_two_processes_share_a_cell_and_write_the_same_bytes(done, tmp_path):
    results, grid = tmp_path / "results", write_grid(tmp_path, ablations={"shared": []})
    shutil.copytree(done / "indirect_effect", results / "indirect_effect")
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "src/reproduce.py"]
    words = [*start, *arguments(grid, results, "--steps", "answer", "judge", "tables")]
    ran = subprocess.run(
        words, env=os.environ | {"OMP_NUM_THREADS": "1"}, cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert ran.returncode == 0, ran.stderr
    for path in results.rglob("policy*.csv"):
        assert path.read_bytes() == (done / path.relative_to(results)).read_bytes()
    assert len(list(results.rglob("policy.csv"))) == 6
    assert ran.stdout.count("wrote ") == 1  # the tables, by one of the two


def test_a_job_of_a_slurm_array_takes_its_shard(done, grid_file, tmp_path):
    """Shard 3 of 3 is Bengali: jobs may be numbered from anywhere."""
    results = tmp_path / "results"
    shutil.copytree(done, results)
    job = {"SLURM_ARRAY_TASK_ID": "12", "SLURM_ARRAY_TASK_MIN": "10", "SLURM_ARRAY_TASK_COUNT": "3"}
    words = ["bash", ROOT / "scripts" / "reproduce.sh", grid_file, "--results", results, "--steps", "judge"]
    ran = subprocess.run(
        [*map(str, words)], env=os.environ | job, cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert ran.returncode == 0, ran.stderr
    assert "judging, polyglot-base: 0 of 10 cells now" in ran.stdout


def test_a_cell_that_fails_is_skipped_listed_and_blank_and_is_run_later(done, tmp_path, run_script, capsys):
    results, prompts = tmp_path / "results", tmp_path / "mine_{language}.csv"
    for language in ("English", "Bengali"):
        shutil.copy(ROOT / f"data/prompts/policy_{language}.csv", str(prompts).format(language=language))
    grid = write_grid(
        tmp_path,
        prompt_sets=[{"name": "mine", "dataset": str(prompts)}],
        ablations={"shared": []},
        benign=None,
    )
    shutil.copytree(done / "indirect_effect", results / "indirect_effect")
    words = arguments(grid, results, "--steps", *STEPS)
    assert run_script(reproduce, *words) == 1
    said = capsys.readouterr()
    assert said.err.count("failed: polyglot-base/Hindi/") == 2 and "mine_Hindi.csv" in said.err
    table = pd.read_csv(results / "tables" / "small_main.csv")
    hindi, everything = (table[table["name"] == name] for name in ("Hindi", "all languages"))
    assert hindi["asr"].isna().all() and everything["asr"].isna().all()
    assert table[table["name"] == "Bengali"]["asr"].notna().all()
    assert "4 of 8 numbers: not run, blank." in (results / "tables" / "small_main.md").read_text()
    assert "mine_Hindi.csv" in (results / "report.html").read_text()
    shutil.copy(ROOT / "data/prompts/policy_Hindi.csv", str(prompts).format(language="Hindi"))
    assert run_script(reproduce, *words) == 0
    assert pd.read_csv(results / "tables" / "small_main.csv")["asr"].notna().all()
    assert not list(results.rglob("failed*.txt"))


def test_a_set_out_of_reach_is_asked_for_once_and_does_not_stop_the_others(
    done, tmp_path, run_script, capsys, monkeypatch
):
    results, asked = tmp_path / "results", []
    shutil.copytree(done / "indirect_effect", results / "indirect_effect")
    read = Questions.read

    def read_noting(self, language):
        asked.append(self.dataset)
        if self.dataset == "some/set":
            raise UserError("the hub does not answer")
        return read(self, language)

    monkeypatch.setattr(Questions, "read", read_noting)
    sets = [{"name": "away", "dataset": "some/set"}, "policy"]
    grid = write_grid(tmp_path, prompt_sets=sets, languages=["hi"], ablations={"shared": [], "scaling_factors": [2]})
    assert run_script(reproduce, *arguments(grid, results, "--steps", "answer", "judge")) == 1
    assert asked.count("some/set") == 1
    assert capsys.readouterr().err.count("the hub does not answer") == 3
    for path in results.rglob("policy*.csv"):
        assert path.read_bytes() == (done / path.relative_to(results)).read_bytes()
    assert len(list(results.rglob("policy.csv"))) == 2  # λ 2 is measured on the first set alone, which is away
    assert len(list(results.rglob("cell.json"))) == 3


def test_a_missing_model_fails_its_own_cells_and_not_the_others(done, tmp_path, run_script, capsys):
    results = tmp_path / "results"
    shutil.copytree(done, results)
    grid = write_grid(tmp_path, models=[{"base": str(tmp_path / "none"), "tuned": TUNED}, *GRID["models"]])
    assert run_script(reproduce, *arguments(grid, results, "--steps", *STEPS)) == 1
    said = capsys.readouterr().err
    assert len(re.findall("^failed: .*_none: ", said, re.M)) == 1 and "1 failed" in said and "polyglot-base" not in said
    assert "_none: " in (results / "report.html").read_text()
    table = pd.read_csv(results / "tables" / "small_main.csv")
    assert table[table["model"] == "polyglot-base"]["asr"].notna().all()


@pytest.mark.parametrize(
    "missing", [{"models": [{"base": BASE, "tuned": "none"}]}, {"utility": {"tasks": ["no_such_task"]}}]
)
def test_a_missing_twin_or_task_of_utility_is_found_before_anything_is_scored(tmp_path, run_script, capsys, missing):
    pytest.importorskip("lm_eval")
    grid = write_grid(tmp_path, **missing)
    assert run_script(reproduce, *arguments(grid, tmp_path / "results", "--steps", *STEPS, "utility")) in (1, 2)
    assert "none" in (said := capsys.readouterr().err) or "no_such_task" in said
    assert not (tmp_path / "results" / "indirect_effect").exists()


def test_the_notebook_of_the_tables_runs_from_top_to_bottom_and_shows_them(done, tmp_path, monkeypatch):
    relative = [{"base": os.path.relpath(BASE, ROOT), "tuned": os.path.relpath(TUNED, ROOT)}]
    monkeypatch.setenv("SOTERIA_RESULTS", str(done))
    monkeypatch.setenv("SOTERIA_GRID", str(write_grid(tmp_path, models=relative)))
    shown = shown_by(ROOT / "notebooks" / "paper_tables.ipynb")
    assert sum("image/png" in data for data in shown) == 4
    main = next(data["text/html"] for data in shown if "language-specific" in data.get("text/html", ""))
    assert main.count("%") > 20


def test_tables_by_themselves_show_what_the_cells_hold_now_in_the_languages_asked_for(
    done, grid_file, tmp_path, run_script, capsys
):
    results = tmp_path / "results"
    shutil.copytree(done, results)
    words = (reproduce, *arguments(grid_file, results, "--steps", "tables"))
    shutil.rmtree(results / "tables")
    assert run_script(*words) == 0
    assert tables(results) == tables(done)
    cell = next(results.rglob("Hindi/top_50_scaling_5/policy.by_refusal.csv"))
    capsys.readouterr()
    cell.write_text(cell.read_text().replace("Not Harmful", "Harmful", 1))
    assert run_script(*words) == 0
    assert "Hindi/top_50_scaling_5: left blank: policy.by_refusal.csv" in capsys.readouterr().out
    main = pd.read_csv(results / "tables" / "small_main.csv").set_index(["name", "heads"])["asr"]
    is_blank = main.xs("language-specific", level="heads").isna()
    assert list(is_blank[is_blank].index) == ["Hindi", "all languages"]
    cell.unlink()
    assert run_script(*words, "--language", "en", "--name", "english") == 0
    assert list(pd.read_csv(results / "tables" / "english_main.csv")["name"].unique()) == ["English"]
    assert "small.yaml --language en --name english" in (results / "report.html").read_text()


def edit_json(path: Path, change) -> None:
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))


def replace_cell(cell: Path, name: str) -> None:
    shutil.rmtree(cell)
    shutil.copytree(cell.with_name(name), cell)


UNLIKE = {  # what is done to a cell, what the grid says instead, and why files are left out
    "another cell's files": (lambda cell: replace_cell(cell, "random_50_0_scaling_5"), {}, "other heads or weights"),
    "another language's scores": (
        lambda cell: [
            shutil.copy(effect.parent.with_name(f"{task}_Bengali") / f"{task}_Bengali_indirect_effect.pt", effect)
            for task in GRID["tasks"]
            for effect in [*cell.parents[3].rglob(f"{task}_Hindi_indirect_effect.pt")]
        ],
        {},
        "other heads or weights",
    ),
    "answers edited": (
        lambda cell: (cell / "policy.csv").write_text((cell / "policy.csv").read_text() + "one,more\n"),
        {},
        "other answers",
    ),
    "another judge's verdicts": (
        lambda cell: edit_json(cell / "policy.by_refusal.json", lambda found: found.update(judge="openai:x")),
        {},
        "judge",
    ),
    "costs edited": (
        lambda cell: edit_json(cell / "cell.json", lambda found: found.update(share_of_parameters=0.5)),
        {},
        "changed since",
    ),
    "fewer questions": (None, {"answers": GRID["answers"] | {"questions": 6}}, "other questions"),
    "fewer tokens": (None, {"answers": GRID["answers"] | {"max_new_tokens": 8}}, "max_new_tokens 64, not 8"),
    "another seed of accuracy": (None, {"accuracy_seed": 7}, "costs of other"),
    "another dtype": (None, {"dtype": "bfloat16"}, "dtype"),
    "other scores": (None, {"scoring": {"n_trials": 5, "n_shots": 3}}, "n_trials 2, not 5"),
    "another tuned model": (
        None,
        {"models": [{"base": BASE, "tuned": "some/other"}]},
        "polyglot-tuned, not some/other",
    ),
    "other weights of the tuned model": (None, {"models": [{"base": BASE, "tuned": BASE}]}, "other heads or weights"),
}


@pytest.mark.parametrize("what", UNLIKE)
def test_what_was_made_from_other_inputs_is_blank_in_tables_and_left_to_do_in_plans(done, tmp_path, monkeypatch, what):
    damage, changes, reason = UNLIKE[what]
    results = tmp_path / "results"
    shutil.copytree(done, results)
    if damage:
        damage(results / "cells" / "polyglot-base" / "Hindi" / "top_50_scaling_5")
    before = {path: path.read_bytes() for path in results.rglob("*") if path.is_file()}
    monkeypatch.setattr(write_up, "DRAWINGS", {})
    grid = read_grid(write_grid(tmp_path, **changes))
    found = write_up.compose(grid, results)
    said = [line for line in output.not_run(found) if "Hindi/top_50_scaling_5: left blank" in line]
    assert any(reason in line for line in said), output.not_run(found)
    row = found.tidy("controls").set_index(["language", "heads"]).loc[("Hindi", "top heads")]
    assert pd.isna(row["icl_accuracy" if "costs" in reason or "changed" in reason else "asr"])
    planned = bill(grid, results)
    assert int(re.search(r"(\d+) done", planned)[1]) < 30 and reason in planned
    assert before == {path: path.read_bytes() for path in results.rglob("*") if path.is_file()}


def test_a_judge_that_fails_is_asked_once_and_the_others_continue(done, tmp_path, run_script, capsys, monkeypatch):
    results, asked = tmp_path / "results", []
    shutil.copytree(done, results)
    for path in results.rglob("*.by_refusal.*"):
        path.unlink()

    class Dead:
        description = "dead"

        def judge(self, rows):
            asked.append(next(iter(rows)))
            raise UserError("the endpoint does not answer")
            yield

    class Flaky(RefusalJudge):
        def judge(self, rows):
            for row in rows:
                yield from [(row[0], "FAILED: no connection")] if row[0] == 3 else super().judge([row])

    make = make_judge
    monkeypatch.setattr(cell_work, "make_judge", lambda name: Dead() if name.startswith("openai:") else make(name))
    grid = write_grid(tmp_path, judges=["openai:none", "refusal"])
    assert run_script(reproduce, *arguments(grid, results, "--steps", "judge", "tables")) == 1
    said = capsys.readouterr().err
    assert len(asked) == 1 and said.count("the endpoint does not answer") == 3 and "27 more" in said
    table = pd.read_csv(results / "tables" / "small_main.csv")
    assert table[table["judge"] == "openai:none"]["asr"].isna().all()
    assert table[table["judge"] == "refusal"]["asr"].notna().all()
    for make_again, status in ((lambda *_: Flaky(), 1), (lambda *_: RefusalJudge(), 0)):
        monkeypatch.setattr(cell_work, "make_judge", make_again)
        assert run_script(reproduce, *arguments(grid, results, "--steps", "judge", "tables")) == status
        assert ("1 of 12 calls got no reply" in capsys.readouterr().err) == bool(status)
        table = pd.read_csv(results / "tables" / "small_main.csv")
        assert (table[table["judge"] == "openai:none"]["unjudged"] > 0).all() == bool(status)
    assert not list(results.rglob("failed*.txt"))


def test_a_model_that_cannot_be_loaded_is_tried_once(done, grid_file, tmp_path, run_script, capsys, monkeypatch):
    results, tried = tmp_path / "results", []
    shutil.copytree(done / "indirect_effect", results / "indirect_effect")

    def load_model(*_):
        tried.append(1)
        raise UserError("the weights do not fit")

    monkeypatch.setattr(subject, "load_model", load_model)
    assert run_script(reproduce, *arguments(grid_file, results, "--steps", "answer")) == 1
    assert len(tried) == 1 and "30 failed" in capsys.readouterr().err


def test_a_cell_records_the_dtype_it_ran_in_and_a_run_in_another_is_refused(done, tmp_path, run_script, capsys):
    """The grid file says `auto`: what that is depends on the machine."""
    facts = json.loads((done / "cells/polyglot-base/Hindi/base/cell.json").read_text())
    answers = json.loads((done / "cells/polyglot-base/Hindi/base/policy.json").read_text())
    assert facts["answers_from"]["dtype"] == answers["columns"]["BASE ANSWER"]["dtype"] == "float32"
    results = tmp_path / "results"
    shutil.copytree(done, results)
    shutil.rmtree(results / "cells/polyglot-base/Hindi")
    before = {path: path.read_bytes() for path in results.rglob("*.csv")}
    words = ("--steps", "score", "answer", "judge")
    assert run_script(reproduce, *arguments(write_grid(tmp_path, dtype="bfloat16"), results, *words)) == 1
    said = capsys.readouterr().err
    assert "float32" in said and "bfloat16" in said and "1 failed" in said
    assert {path: path.read_bytes() for path in results.rglob("*.csv")} == before
    assert run_script(reproduce, *arguments(write_grid(tmp_path, dtype="float32"), results, "--steps", "answer")) == 0


def test_held_out_rows_are_those_of_step_1s_own_split(tmp_path):
    """With the seed that chose the heads, accuracy asks no row that step 1 could draw from."""
    for scoring in ({"seed": 7}, {"test_split": 0.5}):
        grid = read_grid(write_grid(tmp_path, scoring=scoring))
        asked = subject.Subject(grid, grid.models[0], tmp_path, Processes("cpu")).tasks("Hindi")
        for task, split in asked.items():
            rows = load_examples(ROOT / "data" / "icl" / f"{task}_Hindi.json")
            step_1 = split_examples(rows, scoring.get("test_split", 0.3), scoring.get("seed", 42))
            drawn = [*step_1.train, *step_1.valid]
            assert split.test and not [row for row in split.test if row in drawn]


def test_the_bases_log_probabilities_are_refused_while_the_model_is_steered(tmp_path):
    grid = read_grid(write_grid(tmp_path, answers=GRID["answers"] | {"questions": 2}))
    own = subject.Subject(grid, grid.models[0], tmp_path, Processes("cpu"))
    with (
        steered_in_place(own.loaded, open_steering(own.vector, [(0, 0)], 5, source="a list")),
        pytest.raises(RuntimeError, match="steered"),
    ):
        own.base_log_probs("Hindi")
    assert own.base_log_probs("Hindi").shape[0] == 2


@pytest.fixture
def lists(tmp_path) -> Path:
    """A folder of given head lists, of unequal lengths."""
    for language, heads in {"Hindi": [[1, 2], [0, 3], [3, 7]], "Bengali": [[1, 2], [2, 0]]}.items():
        files.write_json(tmp_path / "lists" / f"{language}_Heads.json", heads)
    return tmp_path / "lists"


def given(lists: Path, **changes) -> Path:
    """A grid of the lists in a folder."""
    path = lists.parent / "given.yaml"
    keys = GRID.keys() - {"heads"}
    grid = {key: GRID[key] for key in keys} | {"languages": ["hi", "bn"], "ablations": {"random_draws": 1}}
    path.write_text(yaml.safe_dump(grid | {"head_folder": str(lists)} | changes))
    return path


def test_given_head_lists_go_through_the_same_tables_without_being_scored(lists, tmp_path, run_script):
    assert run_script(reproduce, *arguments(given(lists), tmp_path / "results", "--steps", *STEPS)) == 0
    assert not (tmp_path / "results" / "indirect_effect").exists()
    heads = pd.read_csv(tmp_path / "results" / "tables" / "small_heads.csv").set_index("heads")
    assert heads["asr"].notna().all() and heads["n_heads"].to_dict() == {
        "base": 0,
        "top heads": 2.5,
        "random heads": 2.5,
        "universal": 1,
    }
    assert pd.notna(heads["over_top"]["random heads"])


def test_a_list_or_a_twin_that_steers_nothing_is_not_reported_as_a_result(lists, tmp_path, run_script, capsys):
    files.write_json(lists / "Hindi_Heads.json", [[99, 0], [0, 99]])
    results, words = tmp_path / "results", ("--steps", *STEPS)
    grid = given(lists, languages=["hi"], ablations={"shared": []})
    assert run_script(reproduce, *arguments(grid, results, *words)) == 1
    assert "[99, 0]" in capsys.readouterr().err
    main = pd.read_csv(results / "tables" / "small_main.csv").set_index("heads")["asr"]
    assert pd.notna(main["base"]) and pd.isna(main["language-specific"])
    files.write_json(lists / "Hindi_Heads.json", [[0, 0]])
    twin = given(lists, languages=["hi"], ablations={"shared": []}, models=[{"base": BASE, "tuned": BASE}])
    assert run_script(reproduce, *arguments(twin, results, *words)) == 1
    assert "equals" in capsys.readouterr().err
    assert pd.isna(pd.read_csv(results / "tables" / "small_main.csv").set_index("heads")["asr"]["language-specific"])


def test_a_plan_starts_nothing_and_reckons_with_what_was_measured_here(done, grid_file, tmp_path, run_script, capsys):
    assert run_script(reproduce, *arguments(grid_file, tmp_path / "none", "--plan")) == 0
    assert not (tmp_path / "none").exists()
    fresh = capsys.readouterr().out
    assert "30 (0 done)" in fresh and "cost: measured on two cores of an AMD EPYC" in fresh
    results = tmp_path / "results"
    shutil.copytree(done, results)
    for path in results.rglob("Hindi/*/cell.json"):
        path.unlink()
    assert run_script(reproduce, *arguments(grid_file, results, "--plan")) == 0
    some = capsys.readouterr().out
    assert "30 (20 done)" in some and "cost: measured here on cpu" in some


def test_the_papers_plan_needs_no_network_and_says_what_was_measured_where(tmp_path, run_script, capsys, monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the network was asked"))
    assert run_script(reproduce, ROOT / "configs/paper.yaml", "--plan", "--results", tmp_path / "none") == 0
    said = capsys.readouterr().out
    found = re.search(r"one GPU: ([\d.]+) hours. Eight, .*: ([\d.]+) hours", said)
    alone, eight = map(float, found.groups())
    assert 10 < alone < 500 and alone / 10 < eight < alone / 5
    assert "Measured on two cores" in said and "assumed" in said
    assert float(re.search(r"Disk: ([\d.]+) GB", said)[1]) > 100  # four models and their tuned twins


def test_bad_arguments_end_in_a_sentence(grid_file, tmp_path, run_script, capsys):
    for words, named in (
        (["none.yaml"], "no grid file none.yaml"),
        ([grid_file, "--shard", "3/2"], "'3/2' is not i/n"),
        ([grid_file, "--steps", "dance"], "invalid choice: 'dance'"),
        ([grid_file, "--language", "Klingon"], "Klingon"),
        ([grid_file, "--name", "a/b"], "name"),
    ):
        assert run_script(reproduce, *words) == 2
        assert named in capsys.readouterr().err
    long = write_grid(tmp_path, models=[{"base": letter * 150, "tuned": TUNED} for letter in "ab"])
    assert run_script(reproduce, *arguments(long, tmp_path / "none", "--name", "n" * 60)) == 2
    assert "too long" in capsys.readouterr().err and not (tmp_path / "none").exists()
