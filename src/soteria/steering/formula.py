"""The method's formula, steered = base - scaling_factor * (tuned - base), on the slices of the selected heads.

Every steering, whether written to files or applied to a loaded model, is first checked by `open_steering`.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from soteria.errors import UserError
from soteria.models.loading import LoadedModel
from soteria.models.task_vector import TaskVector
from soteria.models.tensors import all_finite
from soteria.scoring.heads import Head

Slice = tuple[slice, slice]
# A weight, where it is overwritten, and the base's values there, or how to read them again.
Overwritten = tuple[Tensor, Slice | slice, Tensor | Callable[[], Tensor]]
# What is overwritten in each loaded model that is steered now.
_overwritten: WeakKeyDictionary[nn.Module, list[Overwritten]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Steering:
    """A task vector, the heads to subtract it on, and how much of it. Only `open_steering`, which checks it, makes it.

    `source` is the file or the words that name the heads in messages.
    """

    vector: TaskVector
    heads: list[Head]
    scaling_factor: float
    source: str

    def slices(self, layer: int) -> list[Slice]:
        """Where a layer's heads are in the weight of its output projection: columns, or rows if transposed."""
        geometry, everything = self.vector.geometry, slice(None)
        own = [geometry.head_slice(geometry.row(at), head) for at, head in sorted(self.heads) if at == layer]
        return [(at, everything) if geometry.transposed else (everything, at) for at in own]

    @property
    def n_parameters(self) -> int:
        """The number of weights in the heads' slices."""
        geometry, vector = self.vector.geometry, self.vector
        width = vector.place(vector.base, geometry.layers[0]).shape[1 if geometry.transposed else 0]
        return width * sum(geometry.head_dims[geometry.row(layer)] for layer, _ in self.heads)


def open_steering(vector: TaskVector, heads: Sequence[Head], scaling_factor: float, *, source: str) -> Steering:
    """Check that a steering changes the heads that it names, and return it.

    Raises UserError for no heads, heads outside the model or named twice, a scaling factor that is not finite or below
    0, and a task vector that is zero on all of the heads or not finite in their layers.
    """
    check_scaling_factor(scaling_factor)
    heads, geometry = [(layer, head) for layer, head in heads], vector.geometry
    if not heads:
        raise UserError(f"{source} names no heads; give at least one [layer, head]")
    for layer, head in heads:
        if (layer, head) not in geometry:
            raise UserError(f"{source} names head [{layer}, {head}], but {vector.base.name} has {geometry}")
    head, count = Counter(heads).most_common(1)[0]
    if count > 1:
        raise UserError(f"{source} names head {list(head)} twice; remove one")
    vector.check_finite({layer for layer, _ in heads})
    if not any(vector.head_changes[head] for head in heads):
        base, tuned = vector.base.name, vector.tuned.name
        why = "does the adapter change other layers only?" if vector.tuned.is_adapter else "was one path given twice?"
        raise UserError(f"{tuned!r} equals {base!r} on all selected heads ({source}): {why}")
    vector.say_if_far()
    return Steering(vector, heads, scaling_factor, source)


def check_scaling_factor(scaling_factor: float) -> None:
    """Raise UserError unless the factor is a finite number >= 0."""
    if not 0 <= scaling_factor < float("inf"):
        raise UserError(f"the scaling factor must be a finite number >= 0, not {scaling_factor}: below 0 it adds harm")


def steer(base: Tensor, task_vector: Tensor, scaling_factor: float) -> Tensor:
    """The formula, in float32; the result is rounded once, when it is stored in the dtype of the weights."""
    return base.float() - scaling_factor * task_vector


def check_steered(name: str, steered: Tensor) -> None:
    """Raise UserError unless steered weights, in the dtype in which they are stored, are all finite."""
    if not all_finite(steered):
        raise UserError(f"{name} is not finite once steered; give a smaller scaling factor or another base")


def head_list_hash(heads: Sequence[Head]) -> str:
    """A hash of the heads as a set: their order makes no difference to the steering."""
    return hashlib.sha256(json.dumps(sorted(heads)).encode()).hexdigest()


def is_steered(loaded: LoadedModel) -> bool:
    """Whether a loaded model's weights are steered now."""
    return bool(_overwritten.get(loaded.model))


def overwritten(loaded: LoadedModel) -> list[Overwritten]:
    """What `restore` will undo; whoever overwrites more adds it here first."""
    return _overwritten.setdefault(loaded.model, [])


@contextmanager
def restoring(loaded: LoadedModel, vector: TaskVector) -> Iterator[None]:
    """A block that may overwrite a loaded model's weights, which are restored exactly when it ends.

    Raises UserError for a model that is steered already, is not all in memory, or does not fit the task vector.
    """
    if is_steered(loaded):
        raise UserError(f"{loaded.name!r} is steered already; end that steering before starting another")
    check_fits(loaded, vector)
    try:
        yield
    finally:
        restore(loaded)


@contextmanager
def steered_in_place(loaded: LoadedModel, steering: Steering) -> Iterator[None]:
    """Steer a loaded model for the duration of a block, then restore its weights exactly.

    Raises UserError as `restoring` does.
    """
    with restoring(loaded, steering.vector):
        apply(loaded, steering)
        yield


def check_fits(loaded: LoadedModel, vector: TaskVector) -> None:
    """Raise UserError unless a loaded model is all in memory and its projections are shaped like the base's."""
    weights = [projection.weight for projection in loaded.projections]
    if any(weight.is_meta for weight in weights):  # they are on disk, where changes to them would be lost
        raise UserError(f"{loaded.name!r} is not all in memory; use a larger machine, or write it with steer.py")
    shapes = [vector.place(vector.base, layer).shape for layer in vector.geometry.layers]
    if loaded.geometry != vector.geometry or [tuple(weight.shape) for weight in weights] != shapes:
        ours, theirs = loaded.name, vector.base.name
        raise UserError(f"the heads of {ours!r} are not shaped like those of {theirs!r}; load the task vector's base")


@torch.no_grad()
def apply(loaded: LoadedModel, steering: Steering) -> None:
    """Steer a loaded model's weights in place. `restore` undoes it, also after an interruption half way."""
    kept = overwritten(loaded)
    for name, layer, projection in zip(
        loaded.geometry.projection_names, loaded.geometry.layers, loaded.projections, strict=True
    ):
        weight = projection.weight.data
        for at in steering.slices(layer):
            kept.append((weight, at, weight[at].clone()))
            task_vector = steering.vector.layers[layer][at].to(weight.device)
            weight[at] = steer(weight[at], task_vector, steering.scaling_factor)
            check_steered(f"{name}.weight", weight[at])


@torch.no_grad()
def restore(loaded: LoadedModel) -> None:
    """Restore the values that `apply` has overwritten, exactly; nothing if there are none."""
    kept = _overwritten.get(loaded.model, [])
    while kept:  # each value is forgotten only once it is back, so that Ctrl-C may come at any moment
        weight, at, values = kept[-1]
        weight[at] = values if isinstance(values, Tensor) else values()
        kept.pop()
