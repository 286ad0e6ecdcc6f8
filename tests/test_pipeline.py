"""The whole chain on the embedded pair, small: scores, heads, run.sh, controls, tables, the notebook of heads."""

import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from conftest import shown_by

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
            "bash",
            "scripts/run.sh",
            TUNED,
            BASE,
            language,
            f"policy_{language}",
            2,
            "yes",
            48,
            "polyglot-base",
            results=root,
        )
    run(
        *(sys.executable, "src/compare_controls.py", "--finetune_model", TUNED, "--base_model", BASE),
        *("--head_folder", "polyglot-base", "--scaling_factor", 2, "--language", *LANGUAGES),
        results=root,
    )
    run(sys.executable, "src/make_tables.py", "--results", root, results=root)
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
def test_what_safety_costs_is_the_same_on_the_checkpoint_and_in_place(results, language):
    name = f"polyglot-base_{language}_policy_{language}_scaling_2"
    found = json.loads((results / "evaluated" / f"Evaluated_{name}.json").read_text())
    controls = json.loads((results / "controls" / f"polyglot-base_{language}_policy_scaling_2.json").read_text())
    method = controls["conditions"]["top heads"]
    assert found["benign"]["safe"]["refused"] == method["benign_refusals"]["count"]
    assert found["benign"]["kl_first_token"]["mean"] == pytest.approx(method["kl_first_token"]["value"], abs=1e-4)
    assert sum(own["rows"] for own in found["categories"].values()) == found["rows"]


def test_the_original_release_path_of_run_sh_does_the_same(results):
    before = {path: path.stat().st_mtime_ns for path in results.rglob("*.csv")}
    run(
        *("bash", "run.sh", TUNED, BASE, "bn", "policy_Bengali.csv", "2.0", "yes", 48, "polyglot-base"),
        results=results,
        cwd=ROOT / "src" / "Multilingual_Codes",
    )
    assert {path: path.stat().st_mtime_ns for path in results.rglob("*.csv")} == before  # reused, not made again


@pytest.mark.parametrize("language", LANGUAGES)
def test_steering_in_place_and_the_written_checkpoint_have_the_same_attack_success(results, language):
    controls = json.loads((results / "controls" / f"polyglot-base_{language}_policy_scaling_2.json").read_text())
    name = f"Evaluated_polyglot-base_{language}_policy_{language}_scaling_2.json"
    evaluated = json.loads((results / "evaluated" / name).read_text())
    assert controls["conditions"]["top heads"]["asr"]["value"] == evaluated["safe"]["asr"]
    assert controls["conditions"]["base"]["asr"]["value"] == evaluated["base"]["asr"]


def test_the_table_shows_every_control_beside_the_method(results):
    table = (results / "tables" / "main.md").read_text()
    for heads in ("top heads", "random heads", "bottom heads", "all heads"):
        assert table.count(f"| {heads}") == len(LANGUAGES) + 1
    assert "proxy" in table
    assert "KL, nats" in table
    assert (results / "tables" / "main.png").stat().st_size > 10_000
    paired = pd.read_csv(results / "tables" / "main_paired.csv")
    assert list(paired["name"])[:5] == [*LANGUAGES, "High", "Low", "all"]


def test_the_notebook_of_top_heads_runs_from_top_to_bottom_and_shows_a_picture(results, monkeypatch):
    monkeypatch.setenv("SOTERIA_RESULTS", str(results))
    assert any("image/png" in data for data in shown_by(ROOT / "notebooks" / "top_heads.ipynb"))


def test_the_original_release_path_of_the_notebook_is_a_link_to_it():
    link = ROOT / "src" / "chek_indirect_ST_get_top_heads.ipynb"
    assert link.is_symlink() and link.resolve() == ROOT / "notebooks" / "top_heads.ipynb"


def test_the_notebooks_are_committed_without_output():
    for notebook in (ROOT / "notebooks").glob("*.ipynb"):
        assert all(not cell.get("outputs") for cell in nbformat.read(notebook, as_version=4).cells)
