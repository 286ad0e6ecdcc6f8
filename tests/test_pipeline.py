"""The whole chain on the embedded pair, small: scores, heads, run.sh, the same in place by a grid, the notebook."""

import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import torch
import yaml
from conftest import shown_by
from nbclient.exceptions import CellExecutionError

from soteria.models.tensors import save_tensor
from soteria.storage.paths import effect_path, scores_folder

ROOT = Path(__file__).resolve().parents[1]
BASE, TUNED = ROOT / "data" / "models" / "polyglot-base", ROOT / "data" / "models" / "polyglot-tuned"
LANGUAGES = ("English", "Bengali")


def run(*command: object, results: Path, cwd: Path = ROOT, status: int = 0) -> subprocess.CompletedProcess:
    environment = os.environ | {
        "SOTERIA_RESULTS": str(results),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    done = subprocess.run([*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr
    return done


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    """A results folder after steps 1 to 4 for two languages, with two trials a task."""
    root = tmp_path_factory.mktemp("results")
    scores = root / "indirect_effect" / "polyglot-base"
    run(
        sys.executable,
        "src/compute_indirect_effect.py",
        *("--model_name", BASE, "--n_trials", 2, "--save_path_root", scores, "--dataset_name"),
        *(f"*_{language}" for language in LANGUAGES),
        results=root,
    )
    run(
        *(sys.executable, "src/select_heads.py", "--results", scores, "--head_folder", "polyglot-base"),
        *("--heads_root", root / "heads", "--language", *LANGUAGES),
        results=root,
    )
    for language in LANGUAGES:
        run(
            *("bash", "scripts/run.sh", TUNED, BASE, language, f"policy_{language}", 2, "yes", 48, "polyglot-base"),
            results=root,
        )
    grid = {
        "name": "chain",
        "models": [{"base": str(BASE), "tuned": str(TUNED)}],
        "languages": list(LANGUAGES),
        "head_folder": str(root / "heads" / "polyglot-base"),
        "prompt_sets": ["policy"],
        "benign": "everyday",
        "scaling_factor": 2,
        "ablations": {"shared": []},
        "answers": {"batch_size": 48},
    }
    (root / "chain.yaml").write_text(yaml.safe_dump(grid))
    run(sys.executable, "src/reproduce.py", root / "chain.yaml", "--results", root, results=root)
    return root


def test_run_sh_leaves_the_three_results_under_their_names(results):
    assert (results / "models" / "Bengali_polyglot-base_scaling_2" / "soteria.json").exists()
    answers = pd.read_csv(results / "generations" / "polyglot-base_Bengali_policy_Bengali_scaling_2.csv")
    assert list(answers.columns) == ["Question", "SAFE ANSWER", "BASE ANSWER"]
    evaluated = results / "evaluated" / "Evaluated_polyglot-base_Bengali_policy_Bengali_scaling_2.csv"
    assert {"Verdict_Safe", "Verdict_Base"} <= set(pd.read_csv(evaluated).columns)
    facts = json.loads(evaluated.with_suffix(".json").read_text())
    assert facts["language"] == "Bengali" and facts["scaling_factor"] == 2 and facts["rows"] == len(answers)


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_written_checkpoint_and_steering_in_place_give_the_same_answers_verdicts_and_costs(results, language):
    name = f"polyglot-base_{language}_policy_{language}_scaling_2"
    found = json.loads((results / "evaluated" / f"Evaluated_{name}.json").read_text())
    written = pd.read_csv(results / "evaluated" / f"Evaluated_{name}.csv", keep_default_na=False)
    cells = {"BASE ANSWER": "base", "SAFE ANSWER": "top_given_scaling_2"}
    for column, cell in cells.items():
        folder = results / "cells" / "polyglot-base" / language / cell
        in_place = pd.read_csv(folder / "policy.by_refusal.csv", keep_default_na=False)
        for each in (column, "Verdict_" + column.split()[0].title()):
            assert list(in_place[each]) == list(written[each])
    costs = pd.read_csv(results / "tables" / "chain_parameters.csv")
    assert costs["share_of_parameters"].notna().all()
    folder = results / "cells" / "polyglot-base" / language / "top_given_scaling_2"
    refused = list(pd.read_csv(folder / "benign.by_refusal.csv")["Verdict_Safe"]).count("Not Harmful")
    divergences = json.loads((folder / "cell.json").read_text())["kl_first_token"]
    assert found["benign"]["safe"]["refused"] == refused
    assert found["benign"]["kl_first_token"]["mean"] == pytest.approx(sum(divergences) / len(divergences), abs=1e-4)
    assert sum(own["rows"] for own in found["categories"].values()) == found["rows"]


def test_the_original_release_path_of_run_sh_does_the_same(results):
    before = {path: path.stat().st_mtime_ns for path in results.rglob("*.csv")}
    run(
        *("bash", "run.sh", TUNED, BASE, "bn", "policy_Bengali.csv", "2.0", "yes", 48, "polyglot-base"),
        results=results,
        cwd=ROOT / "src" / "Multilingual_Codes",
    )
    assert {path: path.stat().st_mtime_ns for path in results.rglob("*.csv")} == before  # reused, not made again


def test_the_notebook_of_top_heads_runs_from_top_to_bottom_and_shows_a_picture(results, monkeypatch):
    monkeypatch.setenv("SOTERIA_RESULTS", str(results))
    assert any("image/png" in data for data in shown_by(ROOT / "notebooks" / "top_heads.ipynb"))


@pytest.mark.parametrize("languages", [["Hindi"], ["Hindi", "Thai", "German"]])
def test_the_notebook_of_top_heads_takes_what_was_scored_and_says_where_nothing_was(languages, tmp_path, monkeypatch):
    monkeypatch.setenv("SOTERIA_RESULTS", str(tmp_path))
    with pytest.raises(CellExecutionError, match=r"(?s)UserError.*no scores; run"):
        shown_by(ROOT / "notebooks" / "top_heads.ipynb")
    for language in languages:
        path = effect_path(scores_folder(tmp_path, "polyglot-base"), f"antonym_{language}")
        save_tensor(torch.rand(2, 4, 8), path)
    shown = shown_by(ROOT / "notebooks" / "top_heads.ipynb")
    assert sum("image/png" in data for data in shown) == 2


def test_the_original_release_path_of_the_notebook_is_a_link_to_it():
    link = ROOT / "src" / "chek_indirect_ST_get_top_heads.ipynb"
    assert link.is_symlink() and link.resolve() == ROOT / "notebooks" / "top_heads.ipynb"


def test_the_notebooks_are_committed_without_output():
    for notebook in (ROOT / "notebooks").glob("*.ipynb"):
        assert all(not cell.get("outputs") for cell in nbformat.read(notebook, as_version=4).cells)
