"""What float16 and bfloat16 do to indirect effects of about 1e-4, on the embedded base.

The same prompts are scored in each dtype; float32 is taken for the truth. Prints one line a dtype: the median error
among effects between 5e-5 and 2e-4, how many of them change sign, how many of the top half of the heads stay in it.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

from soteria.icl import MeanSlots, PromptForm, draw_prompt, load_pairs, split_pairs  # noqa: E402
from soteria.indirect_effect import indirect_effects, mean_head_activations, tokenize  # noqa: E402
from soteria.models import load_model  # noqa: E402
from soteria.sweep import ForkingSweep  # noqa: E402

DATASETS = ("antonym_Hindi", "country-capital_Hindi", "sentiment_Hindi")
N_PROMPTS = 5


def effects_in(dtype: str) -> Tensor:
    """(prompts, heads), float32."""
    loaded = load_model(str(ROOT / "data" / "models" / "polyglot-base"), "cpu", dtype)
    sweep, form = ForkingSweep(loaded), PromptForm()
    slots, found = MeanSlots(10, form, loaded.tokenizer), []
    for dataset in DATASETS:
        split = split_pairs(load_pairs(ROOT / "data" / "icl" / f"{dataset}.json"), 0.3, 42)
        np.random.seed(42)
        clean, scored = (
            [tokenize(draw_prompt(split, 10, form, shuffle_labels=shuffled), loaded, slots) for _ in range(N_PROMPTS)]
            for shuffled in (False, True)
        )
        means = mean_head_activations(loaded, clean, len(slots))
        found += [indirect_effects(sweep, prompt, means).flatten() for prompt in scored]
    return torch.stack(found)


def main() -> None:
    whole = effects_in("float32")
    small = (whole.abs() > 5e-5) & (whole.abs() < 2e-4)
    top = set(whole.mean(0).topk(whole.shape[1] // 2).indices.tolist())
    for dtype in ("float16", "bfloat16"):
        half = effects_in(dtype)
        error = (half - whole).abs()[small].median().item()
        flipped = (half.sign() != whole.sign())[small].sum().item()
        kept = len(top & set(half.mean(0).topk(len(top)).indices.tolist()))
        print(
            f"{dtype}: median error {error:.1e}, {flipped} of {small.sum()} signs, {kept} of {len(top)} top heads kept"
        )


if __name__ == "__main__":
    main()
