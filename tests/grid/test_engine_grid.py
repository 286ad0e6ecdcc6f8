"""A grid whose answers come from an engine: the same tables, from a folder written for each cell."""

import shutil
from contextlib import nullcontext
from pathlib import Path

import peft
import pytest
import torch
import yaml
from conftest import run_in_child
from fake_endpoint import KEY
from served_models import serve, stand_in_for_vllm
from transformers import AutoModelForCausalLM

import reproduce
from soteria.answering.engines import Asked
from soteria.answering.generation import all_inputs, answer_questions
from soteria.errors import UserError
from soteria.grid.grid_file import read_grid
from soteria.grid.serving import Serving
from soteria.judging import costs
from soteria.languages import find_language
from soteria.models.loading import describe_model, load_model
from soteria.models.task_vector import TaskVector
from soteria.steering.formula import open_steering, steered_in_place
from soteria.storage import paths

BASE, TUNED = (str(paths.DATA / "models" / f"polyglot-{which}") for which in ("base", "tuned"))
ANSWERS = {"batch_size": 64, "max_new_tokens": 24, "questions": 3}
GRID = {
    "name": "small",
    "models": [{"base": BASE, "tuned": TUNED}],
    "languages": ["Hindi"],
    "tasks": ["country-capital", "antonym"],
    "prompt_sets": ["policy"],
    "benign": "everyday",
    "scaling_factor": 5,
    "ablations": {"random_draws": 1, "scaling_factors": [0], "shared": []},
    "scoring": {"n_trials": 2, "n_shots": 3},
    "answers": ANSWERS,
}


@pytest.fixture
def grid_file(tmp_path):
    def write(**changes) -> Path:
        path = tmp_path / "small.yaml"
        path.write_text(yaml.safe_dump(GRID | changes))
        return path

    return write


def run(grid: Path, results: Path, *steps: str) -> None:
    run_in_child(reproduce, [str(grid), "--results", str(results), "--device", "cpu", "--steps", *steps])


def found(results: Path) -> dict[str, bytes]:
    """All tables, answers and verdicts."""
    every = [*(results / "tables").iterdir(), *(results / "cells").rglob("*.csv")]
    return {str(path.relative_to(results)): path.read_bytes() for path in every}


def test_a_grid_answered_through_transformers_serve_has_the_same_tables_to_the_byte(grid_file, tmp_path, monkeypatch):
    monkeypatch.setattr(costs, "N_PROMPTS", 3)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    own, served = tmp_path / "own", tmp_path / "results"
    (served / "served").mkdir(parents=True)
    with serve(served / "served") as address:
        run(grid_file(), own, "score", "answer", "judge", "tables")
        for folder in ("indirect_effect", "heads"):
            shutil.copytree(own / folder, served / folder)
        grid = grid_file(answers=ANSWERS | {"engine": "openai", "concurrency": 2})
        run(grid, served, "models")
        cells = served / "served" / "polyglot-base" / "Hindi"
        # Neither the base nor λ 0 is written: both are the base.
        assert sorted(path.name for path in cells.iterdir()) == ["random_50_0_scaling_5", "top_50_scaling_5"]
        monkeypatch.setenv("OPENAI_BASE_URL", address)
        run(grid, served, "score", "answer", "judge", "tables")
    assert found(served) == found(own)
    assert not list(served.rglob("failed*.txt"))


@pytest.mark.parametrize("is_adapter", [False, True])
def test_vllm_has_each_cells_model_as_long_as_it_answers(tiny_folder, grid_file, tmp_path, monkeypatch, is_adapter):
    """As a checkpoint, or as a LoRA of a base that stays loaded."""
    made, base = stand_in_for_vllm(monkeypatch), tiny_folder("llama")
    tuned = tiny_folder("llama", seed=1)
    if is_adapter:
        torch.manual_seed(0)
        tuned = tmp_path / "tuned"
        model = AutoModelForCausalLM.from_pretrained(base)
        config = peft.LoraConfig(r=4, target_modules=["o_proj"], init_lora_weights=False)
        peft.get_peft_model(model, config).save_pretrained(tuned)
    serving = Serving(read_grid(grid_file(answers={"engine": "vllm"}, dtype="float32")))
    loaded, questions, english = load_model(str(base), "cpu", "float32"), ["hot?", "Is it big?"], find_language("en")
    described = describe_model(str(base))
    asked = {row: Asked(ids, "", None, 8) for row, ids in enumerate(all_inputs(described, questions, english, False))}
    for heads in (None, [(0, 1), (1, 2)], [(2, 0)], None):
        folder = tmp_path / "served" / str(heads)
        steering = heads and open_steering(TaskVector.open(str(base), str(tuned)), heads, 2, source="heads")
        with serving.of(str(base), "a/cell", steering, folder, "English") as engine:
            (answers,) = engine.answers(described, asked)
            assert folder.exists() == bool(heads)
        with steered_in_place(loaded, steering) if steering else nullcontext():
            assert list(answers.values()) == answer_questions(loaded, questions, english, max_new_tokens=8)
        assert not folder.exists()
    adapters = [each.get("max_lora_rank") for each in made]
    assert adapters == ([None, 8] if is_adapter else [None] * 4) and {each["dtype"] for each in made} == {"float32"}


def test_engines_that_a_grid_cannot_use_are_refused_by_its_file(grid_file):
    for changes, named in [
        ({"answers": {"engine": "tgi"}}, "answers.engine"),
        ({"answers": {"engine": "openai:one-name"}}, "cell"),
        ({"answers": {"engine": "vllm:name"}}, "answers.engine"),
        ({"answers": {"engine": "openai"}, "preset": "release"}, "greedily"),
        ({"answers": {"engine": "vllm"}, "ablations": {"rankings": ["all_parameters"]}}, "all_parameters"),
    ]:
        with pytest.raises(UserError, match=named):
            read_grid(grid_file(**changes))
