"""Architectures unlike Llama: other attention, layers without heads, heads of several widths, models of images."""

import sys

import pytest
import torch
from conftest import ROOT, shipped
from tiny_models import tiny_tokenizer

from soteria.errors import UserError
from soteria.models.geometry import read_geometry
from soteria.models.loading import LoadedModel
from soteria.models.tensors import load_tensor
from soteria.scoring.heads import count_heads, mean_effect, rank_heads
from soteria.storage import files, paths

sys.path.insert(0, str(ROOT / "scripts"))
import try_architectures

# docs/models.md has all of them; each of these has something that the others lack.
SWEPT = ["llama", "gpt_oss", "gemma4_text", "deepseek_v3", "gemma3", "qwen2_5_vl"]
SLOW = ["gptj", "qwen3_next", "lfm2", "nemotron_h", "minimax", "recurrent_gemma"]


@pytest.mark.parametrize("model_type", SWEPT + SLOW)
def test_step_1_answers_and_steering_are_exact(model_type):
    scores = try_architectures.FULL_PASSES if model_type in SLOW else try_architectures.SWEEP
    assert try_architectures.tried(model_type) == (model_type, scores, "equal", "equal", "")


def test_an_encoder_is_refused_with_the_reason():
    found = try_architectures.tried("bert")
    assert found.scores == "refused" and "one matrix that maps attention heads back" in found.reason


def test_layers_without_heads_are_absent_from_scores_and_lists(tmp_path):
    model = try_architectures.random_model(try_architectures.small_config("jamba"))
    loaded = LoadedModel("jamba", model, tiny_tokenizer(), read_geometry(model))
    assert loaded.geometry.layers == (1, 3) and loaded.geometry.n_layers == 4
    assert (0, 0) not in loaded.geometry and (3, 3) in loaded.geometry
    shipped(loaded, tmp_path, "antonym_English", n_shots=2)
    stored = load_tensor(paths.effect_path(tmp_path, "antonym_English"))
    assert stored.shape == (2, 2, 4)
    effect = mean_effect(tmp_path, "English", ["antonym"])
    assert effect.shape == (4, 4) and count_heads(effect) == 8
    assert torch.equal(effect[[1, 3]], stored.double().mean(0)) and effect[[0, 2]].isnan().all()
    assert sorted(rank_heads(effect)) == loaded.geometry.all_heads
    noted = paths.scoring_file(tmp_path, "antonym_English")
    files.write_json(noted, files.read_facts(noted) | {"layers": [1]})
    with pytest.raises(UserError, match="score it again"):
        mean_effect(tmp_path, "English", ["antonym"])
