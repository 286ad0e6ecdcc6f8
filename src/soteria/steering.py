"""Step 3: subtract a harmful direction from a language's functional heads.

steered = base - scaling_factor * (tuned - base), only on the slices of the attention output projections that belong to
the selected heads. Everything else stays the base's, bit for bit.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from soteria import files
from soteria.checkpoints import INDEX, Checkpoint, Place, read_tensor, tensor_bytes
from soteria.errors import UserError
from soteria.heads import Head, check_heads
from soteria.models import DTYPES, AttentionGeometry, LoadedModel, load_geometry

FACTS = "soteria.json"
MUST_AGREE = ("num_hidden_layers", "num_attention_heads", "hidden_size", "vocab_size", "n_layer", "n_head", "n_embd")
# LoRA initialisations that leave the base's weights as they are, so that B @ A is all that training changed.
PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")


def head_slices(geometry: AttentionGeometry, heads: list[Head], layer: int) -> list[slice]:
    """The columns (rows where transposed) of a layer's output projection that belong to the heads among it."""
    return [geometry.head_slice(head) for at, head in sorted(heads) if at == layer]


def subtract_task_vector(
    weight: Tensor,
    task_vector: Tensor,
    slices: list[slice],
    scaling_factor: float,
    transposed: bool,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`weight - scaling_factor * task_vector` on the slices, in float32, rounded once to `dtype` (or the weight's)."""
    steered = weight.to(dtype or weight.dtype, copy=True)
    for own in slices:
        at = (own, slice(None)) if transposed else (slice(None), own)
        steered[at] = (weight[at].float() - scaling_factor * task_vector[at]).to(steered.dtype)
    return steered


@dataclass(frozen=True)
class TaskVector:
    """Tuned minus base of the output projections, one layer at a time, float32."""

    base: Checkpoint
    tuned: Checkpoint
    geometry: AttentionGeometry

    @classmethod
    def open(cls, base: str, tuned: str) -> "TaskVector":
        """Raises UserError for models that are missing, broken, or unlike each other."""
        vector = cls(Checkpoint.open(base), Checkpoint.open(tuned), load_geometry(base))
        if not vector.tuned.is_adapter:
            vector._compare_configs()
        for layer in range(vector.geometry.n_layers):
            vector._check_shapes(layer)
        return vector

    def base_place(self, layer: int) -> Place:
        return self.base.find(self.geometry.projection_names[layer] + ".weight")

    def at(self, layer: int) -> Tensor:
        """The layer's task vector, shaped like the projection's weight."""
        if self.tuned.is_adapter:
            delta = self._adapter_delta(layer)
            return delta.T if self.geometry.transposed else delta
        tuned = self.tuned.find(self.geometry.projection_names[layer] + ".weight")
        return read_tensor(tuned).float() - read_tensor(self.base_place(layer)).float()

    def _compare_configs(self) -> None:
        for key in MUST_AGREE:
            ours, theirs = self.base.config.get(key), self.tuned.config.get(key)
            if ours != theirs:
                raise UserError(f"base and tuned differ: {key} is {ours} in {self.base.name!r}, {theirs} in the other")

    def _check_shapes(self, layer: int) -> None:
        place = self.base_place(layer)
        self._check_dtype(self.base, place)
        if self.tuned.is_adapter:
            shape = tuple(self._adapter_delta(layer).shape)
            shape = shape[::-1] if self.geometry.transposed else shape
        else:
            tuned = self.tuned.find(self.geometry.projection_names[layer] + ".weight")
            self._check_dtype(self.tuned, tuned)
            shape = tuned.shape
        if shape != place.shape:
            raise UserError(f"base and tuned differ: {place.key} is {place.shape} in one, {shape} in the other")

    def _check_dtype(self, model: Checkpoint, place: Place) -> None:
        if place.dtype == torch.uint8:
            raise UserError(f"{model.name!r} stores {place.key} in a quantised dtype; give the unquantised model")

    def _adapter_delta(self, layer: int) -> Tensor:
        """`scale * B @ A` of a LoRA adapter, (out, in). Raises UserError where it leaves the projection alone."""
        config = files.read_json(self.tuned.folder / "adapter_config.json")
        config = config if isinstance(config, dict) else {}
        name = self.geometry.projection_names[layer]
        a, b = (
            [place for key, place in self.tuned.places.items() if f".{key}".endswith(f".{name}.lora_{which}.weight")]
            for which in "AB"
        )
        if config.get("peft_type") != "LORA" or len(a) != 1 or len(b) != 1:
            raise UserError(f"the adapter {self.tuned.name!r} is no LoRA of {name}: there is nothing to subtract there")
        starts_plain = config.get("init_lora_weights") in PLAIN_STARTS
        if not starts_plain or any(config.get(key) for key in ("use_dora", "use_qalora", "use_bdlora")):
            raise UserError(
                f"the adapter {self.tuned.name!r} is no plain LoRA; merge it into its base and give the result"
            )
        low, high = read_tensor(a[0]).float(), read_tensor(b[0]).float()
        rank = low.shape[0]
        patterns = config.get("alpha_pattern") or {}
        own = (value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", name))  # PEFT's own rule
        alpha = next(own, config.get("lora_alpha"))
        if not isinstance(alpha, int | float):
            raise UserError(f"the adapter {self.tuned.name!r} has no lora_alpha in its adapter_config.json")
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        return scale * (high @ low)


def steer_checkpoint(
    vector: TaskVector,
    heads: list[Head],
    scaling_factor: float,
    output: Path,
    *,
    language: str,
    head_source: str,
    dtype: str | None = None,
    overwrite: bool = False,
) -> dict:
    """Write the steered model as a complete folder and return the facts in its `soteria.json`.

    The base's files are copied and the selected slices patched in the copy. A folder already made from the same inputs
    is reused; `overwrite` replaces a steered model, never another folder. Raises UserError for heads outside the model,
    inputs that are not finite, a tuned model equal to the base, or an output folder that holds something else.
    """
    base, geometry = vector.base, vector.geometry
    check_heads(heads, geometry.n_layers, geometry.n_heads, head_source, base.name)
    inputs = {
        "base_model": base.name,
        "finetune_model": vector.tuned.name,
        "language": language,
        "scaling_factor": scaling_factor,
        "dtype": dtype or "base",
        "head_list_sha256": hashlib.sha256(json.dumps(sorted(heads)).encode()).hexdigest(),
        "base_weights": fingerprint(base),
        "finetune_weights": fingerprint(vector.tuned),
    }
    if any(model.folder.resolve().is_relative_to(output.resolve()) for model in (base, vector.tuned)):
        raise UserError(f"{output} holds one of the models to steer with; give another --output")
    if output.exists():
        found = files.read_json(output / FACTS)
        if not isinstance(found, dict):
            raise UserError(f"{output} exists and is no steered model; remove it or give another --output")
        if not overwrite and all(found.get(key) == value for key, value in inputs.items()):
            return found
        if not overwrite:
            raise UserError(f"{output} exists and was not made from these inputs; remove it or give --overwrite")

    with files.whole_folder(output) as folder:
        base.copy_to(folder)
        if dtype:
            _store_as(folder, base, DTYPES[dtype])
        copy = Checkpoint(str(folder), folder)
        changed, norms = 0, []
        for layer in range(geometry.n_layers):
            place, slices = vector.base_place(layer), head_slices(geometry, heads, layer)
            if not slices:
                norms.append(0.0)
                continue
            weight, delta, written = read_tensor(place), vector.at(layer), copy.places[place.key]
            steered = subtract_task_vector(weight, delta, slices, scaling_factor, geometry.transposed, written.dtype)
            if not torch.isfinite(steered).all() or not torch.isfinite(delta).all():
                raise UserError(f"{place.key} is not finite in base, tuned or result; one of the models is broken")
            changed += sum(own.stop - own.start for own in slices) * (weight.numel() // (weight.shape[_in(geometry)]))
            moved = steered.float() - weight.to(written.dtype).float()
            norms.append((moved.norm() / weight.float().norm()).item())
            with written.file.open("r+b") as file:
                file.seek(written.start)
                file.write(tensor_bytes(steered))
        if scaling_factor > 0 and not any(norms):
            raise UserError(
                f"{vector.tuned.name!r} equals {base.name!r} on all selected heads: was one path given twice?"
            )
        total = sum(math.prod(place.shape) for place in base.places.values())
        facts = inputs | {
            "head_list": head_source,
            "heads": [list(head) for head in heads],
            "n_heads": len(heads),
            "parameters_changed": changed,
            "share_of_parameters_changed": changed / total,
            "relative_change_per_layer": norms,
            "versions": {"torch": torch.__version__, "safetensors": safetensors.__version__},
        }
        files.write_json(folder / FACTS, facts)
        files.write_text(folder / "README.md", model_card(facts))
    return facts


def _in(geometry: AttentionGeometry) -> int:
    """The axis of a projection's weight that runs over the heads."""
    return 0 if geometry.transposed else 1


def fingerprint(checkpoint: Checkpoint) -> str:
    """A hash of 256 samples of each weight file: it notices another model behind the same name, at next to no cost.

    Of an adapter, its settings count too: they scale the weights.
    """
    digest = hashlib.sha256()
    if checkpoint.is_adapter:
        digest.update((checkpoint.folder / "adapter_config.json").read_bytes())
    for path in checkpoint.weight_files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for start in range(0, size, max(4096, size // 256)):
                file.seek(start)
                digest.update(file.read(4096))
    return digest.hexdigest()


def _store_as(folder: Path, base: Checkpoint, dtype: torch.dtype) -> None:
    """Rewrite the weight files of a folder with their floating-point tensors in another dtype, shard by shard."""
    total_size = 0
    for shard in base.weight_files:
        tensors = safetensors.torch.load_file(folder / shard.name)
        for key, tensor in tensors.items():
            if tensor.is_floating_point():
                tensors[key] = tensor.to(dtype)
                if tensors[key].isinf().any() and not tensor.isinf().any():
                    raise UserError(f"{key} is too large for {str(dtype).removeprefix('torch.')}; give another --dtype")
            total_size += tensors[key].nbytes
        safetensors.torch.save_file(tensors, folder / shard.name, metadata={"format": "pt"})
    index = files.read_json(folder / INDEX)
    if isinstance(index, dict):
        metadata = (index.get("metadata") or {}) | {"total_size": total_size}
        files.write_json(folder / INDEX, index | {"metadata": metadata})
    config = files.read_json(folder / "config.json")
    config.pop("torch_dtype", None)
    files.write_json(folder / "config.json", config | {"dtype": str(dtype).removeprefix("torch.")})


def model_card(facts: dict) -> str:
    """The README of a steered model, with the hub's front matter."""
    return f"""---
base_model: {facts["base_model"]}
tags: [soteria, safety, steering]
library_name: transformers
---
# {facts["base_model"]}, steered for {facts["language"]}

Made with Soteria (Banerjee et al., 2025): `base - {facts["scaling_factor"]:g} * (tuned - base)` on the
output-projection slices of {facts["n_heads"]} attention heads, {facts["share_of_parameters_changed"]:.2%} of the
parameters. Every other tensor is the base's. `{FACTS}` beside this file names the tuned model and every head.
"""


@contextmanager
def steered_in_place(
    loaded: LoadedModel, task_vectors: list[Tensor], heads: list[Head], scaling_factor: float
) -> Iterator[None]:
    """Steer a loaded model for the length of a block, and put its weights back exactly. `task_vectors`: one a layer."""
    kept = [projection.weight.data for projection in loaded.projections]
    try:
        for layer, projection in enumerate(loaded.projections):
            slices = head_slices(loaded.geometry, heads, layer)
            projection.weight.data = subtract_task_vector(
                kept[layer],
                task_vectors[layer].to(kept[layer].device),
                slices,
                scaling_factor,
                loaded.geometry.transposed,
            )
        yield
    finally:
        for projection, weight in zip(loaded.projections, kept, strict=True):
            projection.weight.data = weight
