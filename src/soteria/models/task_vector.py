"""The task vector: the weights of a harmfully tuned model minus the base's, of the output projections alone.

Knows two checkpoints; knows nothing of selected heads or languages.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from soteria.errors import UserError
from soteria.models.checkpoints import Checkpoint
from soteria.models.loading import AttentionGeometry, load_geometry
from soteria.models.lora import LoraAdapter
from soteria.models.tensors import UNQUANTISED, Place, read_tensor

MUST_AGREE = ("num_hidden_layers", "num_attention_heads", "hidden_size", "vocab_size", "n_layer", "n_head", "n_embd")


@dataclass(frozen=True)
class TaskVector:
    """Tuned minus base of the output projections, one layer at a time, float32."""

    base: Checkpoint
    tuned: Checkpoint
    geometry: AttentionGeometry

    @classmethod
    def open(cls, base: str, tuned: str) -> "TaskVector":
        """Raises UserError for models that are missing, broken, or unlike each other.

        Of a tuned model on the hub, only the shards with output projections are downloaded.
        """
        base_checkpoint = Checkpoint.open(base)
        if base_checkpoint.is_adapter:
            raise UserError(f"{base!r} is an adapter; the base has to be a whole model")
        geometry = load_geometry(str(base_checkpoint.folder))
        names = [f"{name}.weight" for name in geometry.projection_names]
        vector = cls(base_checkpoint, Checkpoint.open(tuned, names), geometry)
        if not vector.tuned.is_adapter:
            vector._compare_configs()
        elif not any(vector.adapter.factors(name) for name in geometry.projection_names):
            raise UserError(
                f"the adapter {tuned!r} is no LoRA of {geometry.projection_names[0]} or any other layer's: "
                "there is nothing to subtract"
            )
        for layer in range(geometry.n_layers):
            vector._compare_shapes(layer)
        return vector

    @cached_property
    def adapter(self) -> LoraAdapter:
        return LoraAdapter(self.tuned)

    def base_place(self, layer: int) -> Place:
        return self.base.find(f"{self.geometry.projection_names[layer]}.weight")

    def tuned_place(self, layer: int) -> Place:
        return self.tuned.find(f"{self.geometry.projection_names[layer]}.weight")

    def at(self, layer: int) -> Tensor:
        """The layer's task vector, shaped like the projection's weight."""
        if not self.tuned.is_adapter:
            tuned = read_tensor(self.tuned_place(layer)).to(torch.float32, copy=True)
            return tuned.sub_(read_tensor(self.base_place(layer)).float())
        delta = self.adapter.delta(self.geometry.projection_names[layer])
        if delta is None:
            return torch.zeros(self.base_place(layer).shape)
        return delta.T if self.geometry.transposed else delta

    def equality(self) -> UserError:
        """What to raise where the task vector is zero on all selected heads."""
        return UserError(
            f"{self.tuned.name!r} equals {self.base.name!r} on all selected heads: was one path given twice?"
        )

    def _compare_configs(self) -> None:
        for key in MUST_AGREE:
            ours, theirs = self.base.config.get(key), self.tuned.config.get(key)
            if ours != theirs:
                raise UserError(
                    f"base and tuned differ: {key} is {ours} in {self.base.name!r}, {theirs} in {self.tuned.name!r}"
                )

    def _compare_shapes(self, layer: int) -> None:
        place = self.base_place(layer)
        _check_dtype(self.base, place)
        if self.tuned.is_adapter:
            shape = self.adapter.shape(self.geometry.projection_names[layer])
            if shape is None:
                return
            shape = shape[::-1] if self.geometry.transposed else shape
        else:
            _check_dtype(self.tuned, self.tuned_place(layer))
            shape = self.tuned_place(layer).shape
        if shape != place.shape:
            raise UserError(f"base and tuned differ: {place.key} is {place.shape} in one, {shape} in the other")


def _check_dtype(model: Checkpoint, place: Place) -> None:
    if place.dtype not in UNQUANTISED:
        raise UserError(f"{model.name!r} stores {place.key} in a quantised dtype; give the unquantised model")
