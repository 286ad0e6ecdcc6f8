"""What float16 and bfloat16 do to indirect effects of about 1e-4, on the embedded base.

The same prompts are scored in each dtype; float32 is taken for the truth. Prints one line a dtype: the median error
among effects between 5e-5 and 2e-4, how many of them change sign, how many of the top half of the heads stay in it.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

from soteria.models.tensors import load_tensor  # noqa: E402
from soteria.storage.paths import effect_path  # noqa: E402

DATASETS = ("antonym_Hindi", "country-capital_Hindi", "sentiment_Hindi")


def effects_in(dtype: str) -> Tensor:
    """(prompts, heads), float32."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "src" / "compute_indirect_effect.py"), "--dataset_name", *DATASETS]
        command += ["--model_name", str(ROOT / "data" / "models" / "polyglot-base"), "--save_path_root", folder]
        subprocess.run([*command, "--n_trials", "5", "--device", "cpu", "--dtype", dtype], check=True)
        return torch.cat([load_tensor(effect_path(Path(folder), dataset)) for dataset in DATASETS]).flatten(1)


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
