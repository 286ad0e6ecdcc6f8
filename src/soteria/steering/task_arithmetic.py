"""Plain task arithmetic, the baseline without heads: the method's formula on every parameter of a loaded model.

A parameter is steered piece by piece. What a piece was is read again from the base's files afterwards; a copy is kept
in memory only of pieces that these files do not give bit for bit, so the model is in memory once.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from soteria.errors import UserError
from soteria.models.loading import LoadedModel
from soteria.models.task_vector import TaskVector
from soteria.models.tensors import PIECE, UNQUANTIZED, all_finite, read_tensor
from soteria.steering.formula import check_scaling_factor, check_steered, overwritten, restoring, steer


@contextmanager
def all_parameters_steered(loaded: LoadedModel, vector: TaskVector, scaling_factor: float) -> Iterator[None]:
    """Steer every parameter of a loaded model for the duration of a block, then restore it exactly.

    Raises UserError for a model that is steered already or is not all in memory, a factor below 0, and a tuned model
    that equals its base, is quantized, broken or unlike its base, or is an adapter of more than linear layers.
    """
    check_scaling_factor(scaling_factor)
    with restoring(loaded, vector):
        _apply(loaded, vector, scaling_factor)
        yield


@torch.no_grad()
def _apply(loaded: LoadedModel, vector: TaskVector, scaling_factor: float) -> None:
    kept, any_change = overwritten(loaded), False
    change_of = _adapter_changes(loaded, vector) if vector.tuned.is_adapter else _changes(vector)
    for name, parameter in loaded.model.named_parameters():  # tied ones once
        if parameter.is_meta:  # it is on disk, where changes to it would be lost
            raise UserError(f"{loaded.name!r} is not all in memory; use a larger machine, or steer heads only")
        change = change_of(name)
        if change is None:
            continue
        weight, place = parameter.data.view(-1), vector.base.find(name)

        def stored(at: slice, place=place) -> Tensor:
            return read_tensor(place).reshape(-1)[at]

        for start in range(0, len(weight), PIECE):
            at = slice(start, start + PIECE)
            task_vector = change(at)
            if not all_finite(task_vector):
                raise UserError(f"{name} is not finite in base or tuned; one of the models is broken, give another")
            any_change = any_change or bool(task_vector.any())
            is_stored = torch.equal(stored(at).to(weight), weight[at])
            kept.append((weight, at, (lambda at=at, read=stored: read(at)) if is_stored else weight[at].clone()))
            weight[at] = steer(weight[at], task_vector.to(weight.device), scaling_factor)
            check_steered(name, weight[at])
    if not any_change:
        raise UserError(f"{vector.tuned.name!r} equals {vector.base.name!r}: was one path given twice?")


def _changes(vector: TaskVector) -> Callable[[str], Callable[[slice], Tensor]]:
    """For a parameter's name: tuned minus base, float32, of a slice of its values."""

    def change_of(name: str) -> Callable[[slice], Tensor]:
        places = vector.whole_tuned.find(name), vector.base.find(name)
        if places[0].shape != places[1].shape or not all(place.dtype in UNQUANTIZED for place in places):
            raise UserError(
                f"{name} of {vector.tuned.name!r} is quantized or not shaped like {vector.base.name!r}'s; "
                "give an unquantized model that was tuned from this base"
            )
        tuned, base = (read_tensor(place).reshape(-1) for place in places)
        return lambda at: tuned[at].float() - base[at].float()

    return change_of


def _adapter_changes(loaded: LoadedModel, vector: TaskVector) -> Callable[[str], Callable[[slice], Tensor] | None]:
    """For a parameter's name: what the adapter adds to a slice of its values; None where it adds nothing."""
    weights = {name.removesuffix(".weight") for name, _ in loaded.model.named_parameters() if name.endswith(".weight")}
    changed = {module for module in weights if vector.adapter.factors(module)}
    if 2 * len(changed) != len(vector.tuned.places):
        raise UserError(
            f"the adapter {vector.tuned.name!r} changes more than the weights of linear layers; merge it into its base "
            "to steer all parameters"
        )

    def change_of(name: str) -> Callable[[slice], Tensor] | None:
        module = name.removesuffix(".weight")
        if module not in changed or module == name:
            return None
        delta = vector.adapter.delta(module)
        delta = delta.T if isinstance(loaded.model.get_submodule(module), Conv1D) else delta
        flat = delta.reshape(-1)
        return lambda at: flat[at]

    return change_of
