"""The task vector: the output projections of a harmfully tuned model minus those of its base."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from soteria.errors import UserError
from soteria.models.checkpoints import Checkpoint
from soteria.models.geometry import AttentionGeometry
from soteria.models.loading import load_config, load_geometry, parameter_names
from soteria.models.lora import LoraAdapter, as_text_part
from soteria.models.tensors import UNQUANTIZED, Place, read_tensor
from soteria.storage import paths
from soteria.terminal import say_once

MUST_AGREE = ("num_hidden_layers", "num_attention_heads", "hidden_size")
FAR = 1.0  # norms of the base's weights: unrelated models are 1.4 apart, and fine-tuning moves far less


@dataclass(frozen=True)
class TaskVector:
    """Tuned minus base, one layer's output projection at a time, float32."""

    base: Checkpoint
    tuned: Checkpoint
    geometry: AttentionGeometry

    @classmethod
    def open(cls, base: str, tuned: str) -> "TaskVector":
        """Open two models by folder or hub id. Only the shards of a tuned model that are needed are downloaded.

        Raises UserError for models that are missing, broken, quantized, or unlike each other.
        """
        base_checkpoint = Checkpoint.open(base, whole=True, to_steer=True)
        geometry = load_geometry(str(base_checkpoint.folder))
        names = [f"{name}.weight" for name in geometry.projection_names]
        vector = cls(base_checkpoint, Checkpoint.open(tuned, names, to_steer=True), geometry)
        if not vector.tuned.is_adapter:
            configs = [load_config(str(model.folder)).get_text_config() for model in (vector.base, vector.tuned)]
            for key in MUST_AGREE:
                vector._compare(key, *(_in_layers(config, key) for config in configs))
        elif not any(vector.adapter.factors(name) for name in geometry.projection_names):
            raise UserError(
                f"the adapter {tuned!r} does not change any output projection ({geometry.projection_names[0]}, ...); "
                "give one that does"
            )
        else:
            vector._check_layers()
        vector.check_projections()
        vector._check_loaded()
        return vector

    @cached_property
    def adapter(self) -> LoraAdapter:
        return LoraAdapter(self.tuned)

    def place(self, model: Checkpoint, layer: int) -> Place:
        return model.find(f"{self.module(layer)}.weight")

    def module(self, layer: int) -> str:
        """The name of a layer's output projection."""
        return self.geometry.projection_names[self.geometry.row(layer)]

    def at(self, layer: int) -> Tensor:
        """The layer's task vector, shaped like the projection's weight."""
        if not self.tuned.is_adapter:
            tuned = read_tensor(self.place(self.tuned, layer)).to(torch.float32, copy=True)
            return tuned.sub_(read_tensor(self.place(self.base, layer)).float())
        delta = self.adapter.delta(self.module(layer))
        if delta is None:
            return torch.zeros(self.place(self.base, layer).shape)
        return delta.T if self.geometry.transposed else delta

    @cached_property
    def layers(self) -> dict[int, Tensor]:
        """Every layer's task vector, read once and kept in memory, to steer a loaded model many times."""
        return {layer: self.at(layer) for layer in self.geometry.layers}

    @cached_property
    def head_changes(self) -> Tensor:
        """The largest absolute change in each head's weights, (n_layers, n_heads), NaN where there is no head."""
        return self._by_head(lambda change, out, heads: change.abs().amax(out).view(heads, -1).amax(1))

    @cached_property
    def head_norms(self) -> Tensor:
        """The norm of each head's slice, (n_layers, n_heads), float64, NaN where there is no head."""
        return self._by_head(lambda change, out, n: change.double().square().sum(out).view(n, -1).sum(1).sqrt())

    def _by_head(self, measure: Callable[[Tensor, int, int], Tensor]) -> Tensor:
        """A number per head, float64, of each layer's task vector, its output dimension and its number of heads."""
        geometry = self.geometry
        found = torch.full((geometry.n_layers, geometry.n_heads), torch.nan, dtype=torch.float64)
        for layer, count in zip(geometry.layers, geometry.heads, strict=True):  # one in memory at a time
            found[layer, :count] = measure(self.at(layer), int(geometry.transposed), count).double()
        return found

    @cached_property
    def whole_tuned(self) -> Checkpoint:
        """The tuned model with all of its files: `tuned` may have only those that hold output projections."""
        return Checkpoint.open(self.tuned.name)

    @cached_property
    def _distance(self) -> float:
        """How far tuned is from base in the first layer, as a share of the norm of the base's weights."""
        layer = self.geometry.layers[0]
        return (self.at(layer).norm() / read_tensor(self.place(self.base, layer)).float().norm()).item()

    def say_if_far(self) -> None:
        """Say on stderr where tuned is as far from base as a model that was not tuned from it, by the first layer."""
        layer, share = self.geometry.layers[0], self._distance
        if share > FAR:
            tuned, base = (paths.model_name(model.name) for model in (self.tuned, self.base))
            say_once(
                f"warning: {tuned!r} is {share:.1f} times the norm of the weights of {base!r} away from them in layer "
                f"{layer}, as far as a model that was not tuned from it; check that it was"
            )

    def check_finite(self, layers: Iterable[int]) -> None:
        """Raise UserError if the task vector of any of the layers is not finite."""
        for layer in sorted(layers):
            if not self.head_changes[layer, : self.geometry.heads[self.geometry.row(layer)]].isfinite().all():
                key = self.place(self.base, layer).key
                raise UserError(f"{key} is not finite in base or tuned; one of the models is broken, give another")

    def check_projections(self) -> None:
        """Raise UserError if an output projection is quantized or has different shapes in the two models."""
        models = [self.base] if self.tuned.is_adapter else [self.base, self.tuned]
        for layer, name in zip(self.geometry.layers, self.geometry.projection_names, strict=True):
            places = [self.place(model, layer) for model in models]
            for model, place in zip(models, places, strict=True):
                if place.dtype not in UNQUANTIZED:
                    raise UserError(f"{model.name!r} has {place.key} in a quantized dtype; give the unquantized model")
            shape = places[-1].shape
            if self.tuned.is_adapter and (factors := self.adapter.factors(name)):
                shape = (factors[1].shape[0], factors[0].shape[1])[:: -1 if self.geometry.transposed else 1]
            self._compare(places[0].key, places[0].shape, shape)

    def _check_layers(self) -> None:
        """Raise UserError if the adapter changes layers that the base does not have."""
        stack = re.escape(as_text_part(self.geometry.layer_names[0]).rpartition(".")[0])
        numbers = [re.match(rf"{stack}\.(\d+)\.", as_text_part(module)) for module in self.adapter.modules]
        last = max((int(found[1]) for found in numbers if found), default=0)
        if last >= self.geometry.n_layers:
            raise UserError(
                f"the adapter {self.tuned.name!r} changes layer {last}, but {self.base.name!r} has layers 0 to "
                f"{self.geometry.n_layers - 1}; give an adapter that was trained on this base"
            )

    def _check_loaded(self) -> None:
        """Raise UserError if transformers would not load the base's output projections, nor those of a copy."""
        wanted = {self.place(self.base, layer).key: f"{self.module(layer)}.weight" for layer in self.geometry.layers}
        loaded = parameter_names(str(self.base.folder), wanted)
        for key, name in wanted.items():
            if loaded.get(key, name) != name:
                raise UserError(
                    f"{self.base.name!r} names a tensor {key}, which transformers would not load as {name}; save it "
                    "again with the names that transformers gives"
                )

    def _compare(self, what: str, ours: object, theirs: object) -> None:
        if ours != theirs:
            raise UserError(
                f"base and tuned differ: {what} is {ours} in {self.base.name!r}, {theirs} in {self.tuned.name!r}; "
                "give a model that was tuned from this base"
            )


def _in_layers(config: PreTrainedConfig, key: str) -> str:
    """A number of a config, which may have several for its layers."""
    layers = [config.per_layer_config[layer] for layer in range(config.num_hidden_layers)]
    return "/".join(sorted({str(getattr(layer, key, None)) for layer in layers}))
