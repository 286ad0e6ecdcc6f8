"""Heads ranked by safety: the sweep's divergences against one forward pass per head, resuming, and refusals."""

import random
import re
from pathlib import Path

import pytest
import torch
from tiny_models import VOCABULARY

from soteria.errors import UserError
from soteria.models.processes import Processes
from soteria.models.tensors import load_tensor, save_tensor
from soteria.scoring import indirect_effect, safety
from soteria.scoring.run import ScoringSettings, score_runs
from soteria.scoring.safety import SafetyRun, mean_divergence

DRAW = random.Random(3)
HARMLESS, HARMFUL = (
    [[DRAW.randrange(2, VOCABULARY) for _ in range(length)] for length in lengths]
    for lengths in ((9, 4, 9, 1), (5, 12))
)


def run_of(loaded, root: Path, asked: object = "these") -> SafetyRun:
    settings = ScoringSettings(model_name=loaded.name, dtype="float32")
    return SafetyRun("Hindi", root, settings, asked, lambda _: [HARMLESS, HARMFUL])


def score(loaded, root: Path, **options) -> int:
    return score_runs([run_of(loaded, root, **options)], Processes("cpu"), lambda: loaded)


def by_one_forward_per_head(loaded) -> torch.Tensor:
    """KL of every question and head from whole forward passes with a hook, in float64."""
    model, config = loaded.model, loaded.model.config
    pattern = r"\.\d+\.(self_attn\.o_proj|attn\.c_proj|attention\.dense)$"
    modules = [module for name, module in model.named_modules() if re.search(pattern, name)]

    def log_probs(ids: list[int], at: int | None = None, change=lambda heads: None) -> torch.Tensor:
        def hook(_module, inputs):
            heads = inputs[0].clone()
            change(heads[0, -1])
            return (heads,)

        handles = [] if at is None else [modules[at].register_forward_pre_hook(hook)]
        with torch.no_grad():
            logits = model(torch.tensor([ids]), use_cache=False).logits[0, -1]
        for handle in handles:
            handle.remove()
        return logits.double().log_softmax(-1)

    seen: dict[int, list] = {layer: [] for layer in range(len(modules))}
    for ids in HARMLESS:
        for layer in seen:
            log_probs(ids, layer, lambda heads, layer=layer: seen[layer].append(heads.clone()))
    found = torch.zeros(len(HARMFUL), len(modules), config.num_attention_heads)
    for question, ids in enumerate(HARMFUL):
        clean = log_probs(ids)
        for layer, head in torch.cartesian_prod(torch.arange(len(modules)), torch.arange(found.shape[2])).tolist():
            mean = torch.stack(seen[layer]).mean(0)
            own = slice(head * len(mean) // found.shape[2], (head + 1) * len(mean) // found.shape[2])

            def replace(heads: torch.Tensor, own=own, mean=mean) -> None:
                heads[own] = mean[own]

            patched = log_probs(ids, layer, replace)
            found[question, layer, head] = (clean.exp() * (clean - patched)).sum()
    return found


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2", "phi3"])
def test_divergences_are_those_of_one_forward_pass_per_head(architecture, tiny_loaded, tmp_path):
    loaded = tiny_loaded(architecture)
    assert score(loaded, tmp_path) == 1
    found, slow = load_tensor(run_of(loaded, tmp_path).effect_file), by_one_forward_per_head(loaded)
    assert found.dtype == torch.float32 and slow.max() > 0.01  # far above rounding
    torch.testing.assert_close(found, slow, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mean_divergence(tmp_path, "Hindi"), slow.double().mean(0), rtol=1e-4, atol=1e-5)


def test_an_interrupted_run_resumes_to_the_same_bytes_and_other_questions_are_refused(tiny_loaded, tmp_path):
    loaded = tiny_loaded("llama")
    score(loaded, tmp_path)
    run = run_of(loaded, tmp_path)
    whole = run.effect_file.read_bytes()
    assert score(loaded, tmp_path) == 0
    save_tensor(load_tensor(run.effect_file)[:1], run.partial_file)
    run.effect_file.unlink()
    assert score(loaded, tmp_path) == 1
    assert run.effect_file.read_bytes() == whole and not run.partial_file.exists()
    with pytest.raises(UserError, match="asked_sha256"):
        score(loaded, tmp_path, asked="others")


def test_a_wrong_score_is_not_written(tiny_loaded, tmp_path, monkeypatch):
    loaded, effects = tiny_loaded("llama"), indirect_effect.indirect_effects
    monkeypatch.setattr(indirect_effect, "indirect_effects", lambda *given: effects(*given) + 0.01)
    with pytest.raises(UserError, match="by the sweep"):
        score(loaded, tmp_path)
    assert not run_of(loaded, tmp_path).effect_file.exists()


def test_the_divergence_of_a_distribution_from_itself_is_0_and_of_two_as_by_hand():
    logits = torch.tensor([[[0.0, 0.0]], [[0.0, torch.log(torch.tensor(3.0))]]])
    found = safety.divergence(logits, logits[0])
    by_hand = 0.5 * torch.log(torch.tensor([0.5 / 0.25, 0.5 / 0.75])).sum()
    torch.testing.assert_close(found, torch.stack([torch.tensor(0.0), by_hand]))
