"""Batches of texts of different lengths, as the models of this project read them."""

import inspect
from collections.abc import Sequence

import torch
from torch import Tensor, nn


def left_padded(rows: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Token ids and mask (1 for a row's own tokens), both (rows, longest row), so that all rows end together.

    Logits of the last positions only (`logits_to_keep`) are then those of every row's end. In a vocabulary of 262,144
    tokens, the logits of a position cost more than the rest of a small model.
    """
    longest = max(map(len, rows))
    ids = torch.tensor([[pad] * (longest - len(row)) + list(row) for row in rows])
    return ids, torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])


def positions(mask: Tensor) -> Tensor:
    """The position of each token in its own text, (rows, tokens); 0 in the padding."""
    return (mask.cumsum(1) - 1).clamp(min=0)


def takes_positions(model: nn.Module) -> bool:
    return "position_ids" in inspect.signature(model.forward).parameters


def logits_off(found: Tensor, wanted: Tensor) -> float:
    """How far logits are from those wanted: the largest difference, by the standard deviation of the latter."""
    return (found.float() - wanted.float()).abs().max().item() / (wanted.float().std().item() or 1)  # 0: all are alike


def most_rounding(dtype: torch.dtype) -> float:
    """The most that two ways of computing a model's logits may be off by rounding: `logits_off`."""
    return 1e-3 if dtype.itemsize >= 4 else 0.2
