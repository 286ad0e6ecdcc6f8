"""The method's formula: steered = base - scaling_factor * (tuned - base), on the slices of the selected heads."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from soteria.errors import UserError
from soteria.models.loading import AttentionGeometry, LoadedModel
from soteria.scoring.heads import Head


def check_scaling_factor(scaling_factor: float) -> None:
    """Raise UserError for a factor that is not a finite number, 0 or more."""
    if not 0 <= scaling_factor < float("inf"):
        raise UserError(f"a scaling factor of {scaling_factor} is not 0 or more (below 0, steering would add harm)")


def slices_of(geometry: AttentionGeometry, heads: list[Head], layer: int) -> list[tuple[slice, slice]]:
    """Where the heads among a layer's lie in the weight of its output projection: columns, or rows where transposed."""
    everything = slice(None)
    slices = [geometry.head_slice(head) for at, head in sorted(heads) if at == layer]
    return [(own, everything) if geometry.transposed else (everything, own) for own in slices]


def steer_slices(
    weight: Tensor, task_vector: Tensor, slices: list[tuple[slice, slice]], scaling_factor: float, base: Tensor
) -> None:
    """Put `base - scaling_factor * task_vector` into the slices of `weight`, in float32, rounded once to its dtype."""
    for at in slices:
        steered = base[at].float() - scaling_factor * task_vector[at].to(base.device)
        weight[at] = steered.to(weight.dtype)


def head_list_hash(heads: list[Head]) -> str:
    """A hash of the heads as a set: their order steers nothing."""
    return hashlib.sha256(json.dumps(sorted(heads)).encode()).hexdigest()


def check_in_memory(loaded: LoadedModel) -> None:
    """Raise UserError for a model part of which lies on disk: what is written to its weights there would be lost."""
    if any(projection.weight.is_meta for projection in loaded.projections):
        raise UserError(
            f"{loaded.name!r} is not all in memory here, so it cannot be steered in place; "
            "use a larger machine, or write the steered model with steer.py"
        )


@contextmanager
def steered_in_place(
    loaded: LoadedModel, task_vectors: list[Tensor], heads: list[Head], scaling_factor: float
) -> Iterator[None]:
    """Steer a loaded model for the length of a block, and put its weights back exactly. `task_vectors`: one a layer.

    Raises UserError for a model that is not all in memory.
    """
    check_in_memory(loaded)
    kept = [projection.weight.data for projection in loaded.projections]
    try:
        for layer, projection in enumerate(loaded.projections):
            steered = kept[layer].clone()
            slices = slices_of(loaded.geometry, heads, layer)
            steer_slices(steered, task_vectors[layer], slices, scaling_factor, kept[layer])
            projection.weight.data = steered
        yield
    finally:
        for projection, weight in zip(loaded.projections, kept, strict=True):
            projection.weight.data = weight
