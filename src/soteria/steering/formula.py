"""The method's formula, steered = base - scaling_factor * (tuned - base), on the slices of the selected heads.

Every steering, written to files or applied to a loaded model, is checked by `open_steering` first.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from soteria.errors import UserError
from soteria.models.loading import LoadedModel
from soteria.models.task_vector import TaskVector
from soteria.scoring.heads import Head

Slice = tuple[slice, slice]


@dataclass(frozen=True)
class Steering:
    """A task vector, the heads it is subtracted on, and how much of it. Made by `open_steering`, which checks it."""

    vector: TaskVector
    heads: list[Head]
    scaling_factor: float
    source: str  # the file or the words that name the heads in messages

    def slices(self, layer: int) -> list[Slice]:
        """Where the layer's heads lie in the weight of its output projection: columns, or rows where transposed."""
        geometry, everything = self.vector.geometry, slice(None)
        own = [geometry.head_slice(head) for at, head in sorted(self.heads) if at == layer]
        return [(at, everything) if geometry.transposed else (everything, at) for at in own]

    @property
    def n_parameters(self) -> int:
        """How many weights the heads' slices hold."""
        geometry = self.vector.geometry
        return len(self.heads) * geometry.head_dim * self.vector.base_place(0).shape[1 if geometry.transposed else 0]


def open_steering(vector: TaskVector, heads: Sequence[Head], scaling_factor: float, *, source: str) -> Steering:
    """Check everything that decides whether a steering does what it says. `source` names the heads in messages.

    Raises UserError for no heads, heads outside the model or named twice, a scaling factor that is not a finite number
    >= 0, and a task vector that is zero on all of the heads or not finite in their layers.
    """
    check_scaling_factor(scaling_factor)
    heads, geometry = [(layer, head) for layer, head in heads], vector.geometry
    if not heads:
        raise UserError(f"{source} names no heads; give at least one [layer, head]")
    for layer, head in heads:
        if not (0 <= layer < geometry.n_layers and 0 <= head < geometry.n_heads):
            raise UserError(
                f"{source} names head [{layer}, {head}], "
                f"but {vector.base.name} has {geometry.n_layers} layers of {geometry.n_heads} heads"
            )
    if len(set(heads)) < len(heads):
        twice = next(head for head, count in Counter(heads).items() if count > 1)
        raise UserError(f"{source} names head {list(twice)} twice")
    vector.check_finite({layer for layer, _ in heads})
    if not any(vector.head_changes[layer, head] for layer, head in heads):
        raise vector.equality(source)
    return Steering(vector, heads, scaling_factor, source)


def check_scaling_factor(scaling_factor: float) -> None:
    """Raise UserError for a factor that is not a finite number >= 0."""
    if not 0 <= scaling_factor < float("inf"):
        raise UserError(
            f"a scaling factor must be a finite number >= 0, not {scaling_factor} (below 0, steering would add harm)"
        )


def steer(base: Tensor, task_vector: Tensor, scaling_factor: float) -> Tensor:
    """The formula, in float32; whoever stores the result rounds it once, to the weights' own dtype."""
    return base.float() - scaling_factor * task_vector


def head_list_hash(heads: Sequence[Head]) -> str:
    """A hash of the heads as a set: the order of a head list does not change what it steers."""
    return hashlib.sha256(json.dumps(sorted(heads)).encode()).hexdigest()


# What steering has overwritten in each loaded model: (weight, where, the base's values).
_overwritten: WeakKeyDictionary[nn.Module, list[tuple[Tensor, Slice, Tensor]]] = WeakKeyDictionary()


def is_steered(loaded: LoadedModel) -> bool:
    """Whether any weight of a loaded model is a steered one now."""
    return bool(_overwritten.get(loaded.model))


@contextmanager
def steered_in_place(loaded: LoadedModel, steering: Steering) -> Iterator[None]:
    """Steer a loaded model for the length of a block, then put its weights back exactly.

    Raises UserError for a model that is steered already, is not all in memory, or does not fit the task vector.
    """
    if is_steered(loaded):
        raise UserError(f"{loaded.name!r} is steered already; leave that steering before starting another")
    check_fits(loaded, steering.vector)
    try:
        apply(loaded, steering)
        yield
    finally:
        restore(loaded)


def check_fits(loaded: LoadedModel, vector: TaskVector) -> None:
    """Raise UserError where a task vector cannot be subtracted from a loaded model's weights in memory."""
    weights = [projection.weight for projection in loaded.projections]
    if any(weight.is_meta for weight in weights):  # what is written to weights on disk would be lost
        raise UserError(
            f"{loaded.name!r} is not all in memory here, so it cannot be steered in place; "
            "use a larger machine, or write the steered model with steer.py"
        )
    shapes = [vector.base_place(layer).shape for layer in range(vector.geometry.n_layers)]
    if loaded.geometry != vector.geometry or [tuple(weight.shape) for weight in weights] != shapes:
        raise UserError(
            f"the attention heads of {loaded.name!r} are not shaped like those of {vector.base.name!r}; "
            "load the base that the task vector was made from"
        )


@torch.no_grad()
def apply(loaded: LoadedModel, steering: Steering) -> None:
    """Put the steered values into a loaded model's weights; `restore` takes them back at any moment."""
    kept = _overwritten.setdefault(loaded.model, [])
    for layer, projection in enumerate(loaded.projections):
        weight = projection.weight.data
        for at in steering.slices(layer):
            kept.append((weight, at, weight[at].clone()))
            task_vector = steering.vector.layers[layer][at].to(weight.device)
            weight[at] = steer(weight[at], task_vector, steering.scaling_factor)


@torch.no_grad()
def restore(loaded: LoadedModel) -> None:
    """Put back exactly what `apply` has overwritten, if anything."""
    kept = _overwritten.get(loaded.model, [])
    while kept:  # each is forgotten only once it is back: Ctrl-C may come at any moment
        weight, at, values = kept[-1]
        weight[at] = values
        kept.pop()
