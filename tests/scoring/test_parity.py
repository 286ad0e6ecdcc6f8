"""Step 1 against the numbers of the original release, from the kit beside the repository."""

import sys

import pytest
import torch

import compute_indirect_effect

DATASET = "country-capital_English"


@pytest.mark.parametrize(
    ("mode", "n_trials", "last_token_only"),
    [("last_token", 3, "True"), ("all_classes", 2, "False")],
    ids=["last-token", "all-classes"],
)
def test_scores_equal_the_original_releases(mode, n_trials, last_token_only, shared, tmp_path, monkeypatch):
    kit = shared / "parity"
    options = {
        "dataset_name": DATASET,
        "model_name": kit / "checkpoint-tiny-llama",
        "root_data_dir": kit / "icl",
        "save_path_root": tmp_path,
        "n_trials": n_trials,
        "seed": 42,
        "device": "cpu",
        "dtype": "float32",
        "last_token_only": last_token_only,
    }
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    monkeypatch.setattr(sys, "argv", ["compute_indirect_effect.py", *words])
    compute_indirect_effect.main()
    for what, bound in (("indirect_effect", 1e-6), ("mean_head_activations", 1e-4)):
        name = f"{DATASET}_{what}.pt"
        got = torch.load(tmp_path / DATASET / name, weights_only=True)
        expected = torch.load(kit / "expected" / mode / name, weights_only=True)
        assert got.shape == expected.shape
        assert (got - expected).abs().max() <= bound
