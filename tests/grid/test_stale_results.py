"""Results that a grid finds: those of other weights or questions do not count, and what must fail fails before them."""

import json
import os
import shutil
from collections.abc import Callable

import pandas as pd
import pytest
import yaml

import reproduce
from soteria.grid.grid_file import read_grid
from soteria.reporting import numbers
from soteria.reporting.conditions import Cells
from soteria.storage import files

GRID = {
    "name": "g",
    "models": [{"base": "base", "tuned": "tuned"}],
    "languages": ["Hindi"],
    "tasks": ["antonym"],
    "prompt_sets": ["policy"],
    "scaling_factor": 1,
    "scoring": {"n_trials": 1, "n_shots": 2},
    "answers": {"questions": 2, "max_new_tokens": 4},
    "ablations": {"shared": []},
}
STEPS = ("score", "answer", "judge")


@pytest.fixture
def run(tmp_path, tiny_folder, run_script, monkeypatch) -> Callable[..., int]:
    """`run(*steps, **changes)`: a grid of tiny models with other keys, in a folder that holds them."""
    for name in [name for name in os.environ if name.startswith(("OPENAI_", "AZURE_", "SOTERIA_"))]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    for name, seed in {"base": 0, "tuned": 1, "other/base": 2}.items():
        shutil.copytree(tiny_folder("llama", seed=seed), tmp_path / name)

    def run_grid(*steps: str, **changes) -> int:
        (tmp_path / "g.yaml").write_text(yaml.safe_dump(GRID | changes))
        words = ["g.yaml", "--results", "results", "--device", "cpu"]
        return run_script(reproduce, *words, *(("--steps", *steps) if steps else ()))

    return run_grid


@pytest.mark.parametrize("at_the_same_path", [True, False])
def test_results_of_another_model_of_the_same_name_do_not_count(run, tmp_path, capsys, at_the_same_path):
    assert run(*STEPS) == 0

    def rates() -> pd.Series:
        grid = read_grid(tmp_path / "g.yaml")
        return numbers.main_rows(Cells(grid, grid.models[0], tmp_path / "results")).set_index("heads")["asr"]

    assert rates().notna().all()
    capsys.readouterr()
    if at_the_same_path:
        shutil.copy(tmp_path / "other" / "base" / "model.safetensors", tmp_path / "base")
        assert run(*STEPS) in (1, 2)
    else:
        assert run(*STEPS, models=[{"base": "other/base", "tuned": "tuned"}]) in (1, 2)
    said = capsys.readouterr().err
    assert "other weights" in said or "made with model_name 'base', not 'other/base'" in said
    assert rates().isna()["language-specific"]  # neither asked with the old heads nor compared with another base


def test_costs_that_were_measured_on_other_questions_are_left_blank(run, tmp_path):
    assert run(*STEPS, benign="everyday") == 0

    def divergence() -> float | None:
        grid = read_grid(tmp_path / "g.yaml")
        found = Cells(grid, grid.models[0], tmp_path / "results")
        return numbers.costs(found, numbers.method_conditions(grid)[1], ["Hindi"]).get("kl")

    assert divergence() > 0
    (cell,) = [path for path in (tmp_path / "results").rglob("cell.json") if path.parent.name != "base"]
    files.write_json(cell, json.loads(cell.read_text()) | {"cost_measured_on_sha256": "others"})
    assert divergence() is None


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"judges": ["oracle"]}, "oracle"),
        ({"judges": ["openai:m"]}, "OPENAI_API_KEY"),
        ({"benign": "nowhere"}, "nowhere"),
        ({"borderline": "nowhere"}, "nowhere"),
        ({"prompt_sets": ["nowhere"]}, "nowhere"),
    ],
)
def test_what_a_later_step_needs_is_missed_before_the_first(run, tmp_path, capsys, changes, named):
    assert run(**changes) == 2
    assert named in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "results").exists()
