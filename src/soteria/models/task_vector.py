"""The task vector: the weights of a harmfully tuned model minus the base's, of the output projections alone.

Knows two checkpoints; knows nothing of selected heads or languages.
"""

from collections.abc import Iterable
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
        vector.check_shapes()
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

    @cached_property
    def layers(self) -> list[Tensor]:
        """Every layer's task vector, read once and kept in memory: for steering a loaded model many times."""
        return [self.at(layer) for layer in range(self.geometry.n_layers)]

    @cached_property
    def head_changes(self) -> Tensor:
        """The largest absolute change in each head's weights, (n_layers, n_heads); read one layer at a time."""
        geometry, found = self.geometry, []
        for layer in range(geometry.n_layers):
            changes = self.at(layer).abs().amax(1 if geometry.transposed else 0)
            found.append(changes.view(geometry.n_heads, geometry.head_dim).amax(1))
        return torch.stack(found)

    def check_finite(self, layers: Iterable[int]) -> None:
        """Raise UserError, naming the weight, where the task vector of one of the layers is not finite."""
        for layer in sorted(layers):
            if not self.head_changes[layer].isfinite().all():
                key = self.base_place(layer).key
                raise UserError(f"{key} is not finite in base or tuned; one of the models is broken")

    def equality(self, source: str) -> UserError:
        """What to raise where the task vector is zero on all heads that `source` names."""
        why = "does the adapter change other layers only?" if self.tuned.is_adapter else "was one path given twice?"
        return UserError(f"{self.tuned.name!r} equals {self.base.name!r} on all selected heads ({source}): {why}")

    def _compare_configs(self) -> None:
        for key in MUST_AGREE:
            ours, theirs = self.base.config.get(key), self.tuned.config.get(key)
            if ours != theirs:
                raise UserError(
                    f"base and tuned differ: {key} is {ours} in {self.base.name!r}, {theirs} in {self.tuned.name!r}"
                )

    def check_shapes(self) -> None:
        """Raise UserError where an output projection is quantized or has another shape in the tuned model."""
        for layer, name in enumerate(self.geometry.projection_names):
            place = self.base_place(layer)
            _check_dtype(self.base, place)
            if self.tuned.is_adapter:
                shape = self.adapter.shape(name)
                shape = shape[::-1] if shape and self.geometry.transposed else shape
            else:
                _check_dtype(self.tuned, self.tuned_place(layer))
                shape = self.tuned_place(layer).shape
            if shape and shape != place.shape:
                raise UserError(f"base and tuned differ: {place.key} is {place.shape} in one, {shape} in the other")


def _check_dtype(model: Checkpoint, place: Place) -> None:
    if place.dtype not in UNQUANTISED:
        raise UserError(f"{model.name!r} stores {place.key} in a quantised dtype; give the unquantised model")
