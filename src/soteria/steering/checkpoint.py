"""Step 3: subtract a harmful direction from a language's functional heads.

steered = base - scaling_factor * (tuned - base), only on the slices of the attention output projections that belong to
the selected heads. Everything else stays the base's, bit for bit.
"""

import hashlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import safetensors
import torch
import transformers
from huggingface_hub import ModelCardData
from tqdm import tqdm

import soteria
from soteria.errors import UserError
from soteria.languages import find_language
from soteria.models.checkpoints import Checkpoint
from soteria.models.loading import DTYPES
from soteria.models.task_vector import TaskVector
from soteria.models.tensors import all_finite, read_tensor, tensor_bytes
from soteria.scoring.heads import Head, check_heads
from soteria.steering.formula import check_scaling_factor, head_list_hash, slices_of, steer_slices
from soteria.storage import files, paths
from soteria.storage.paths import FACTS


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

    The base's files are copied and the selected slices patched in the copy, one projection in memory at a time. A
    folder already made from the same inputs is reused; `overwrite` replaces a steered model, never another folder.
    Raises UserError for heads outside the model, inputs that are not finite, a tuned model equal to the base, too
    small a disk, a scaling factor below 0, or an output folder that holds something else.
    """
    base, geometry = vector.base, vector.geometry
    check_scaling_factor(scaling_factor)
    check_heads(heads, geometry.n_layers, geometry.n_heads, head_source, base.name)
    inputs = {
        "format": "checkpoint",
        **input_facts(vector),
        "language": language,
        "scaling_factor": scaling_factor,
        "dtype": dtype or "base",
        "head_list_sha256": head_list_hash(heads),
    }
    made = made_before(output, inputs, vector, overwrite)
    if made:
        return made
    with files.whole_folder(output) as folder:
        stored_as = DTYPES[dtype] if dtype else None
        with tqdm(
            total=base.copied_bytes(stored_as), desc="copying the base", unit="B", unit_scale=True, disable=None
        ) as bar:
            base.copy_to(folder, stored_as, bar.update)
        copy = Checkpoint.open(str(folder))
        patches = [
            _patch(vector, layer, slices_of(geometry, heads, layer), scaling_factor, copy)
            for layer in range(geometry.n_layers)
        ]
        if not any(patch.differs for patch in patches):
            raise vector.equality()
        changed = sum(patch.n_values for patch in patches)
        total = sum(torch.Size(place.shape).numel() for place in base.places.values())
        facts = inputs | {
            "head_list": head_source,
            "heads": [list(head) for head in heads],
            "n_heads": len(heads),
            "parameters_changed": changed,
            "share_of_parameters_changed": changed / total,
            "relative_change_per_layer": [patch.relative_change for patch in patches],
            "versions": versions(),
        }
        files.write_text(folder / "README.md", model_card(facts))
        files.write_json(folder / FACTS, facts)
    return facts


@dataclass(frozen=True)
class Patch:
    """What was done to one projection."""

    n_values: int = 0
    relative_change: float = 0.0  # norm of the change / norm of the base's weight
    differs: bool = False  # whether tuned and base do, on the heads


def _patch(
    vector: TaskVector, layer: int, slices: list[tuple[slice, slice]], scaling_factor: float, copy: Checkpoint
) -> Patch:
    """Steer one layer's projection in the files of a copy. Raises UserError where something is not finite."""
    if not slices:
        return Patch()
    place = vector.base_place(layer)
    weight, task_vector, written = read_tensor(place), vector.at(layer), copy.places[place.key]
    steered = weight.to(written.dtype, copy=True)
    steer_slices(steered, task_vector, slices, scaling_factor, weight)
    if not all_finite(steered) or not all_finite(task_vector):
        raise UserError(f"{place.key} is not finite in base, tuned or result; one of the models is broken")
    with written.file.open("r+b") as file:
        file.seek(written.start)
        file.write(tensor_bytes(steered))
    moved = steered.to(torch.float32, copy=True).sub_(weight.to(written.dtype))
    return Patch(
        sum(weight[at].numel() for at in slices),
        (moved.norm() / torch.linalg.vector_norm(weight, dtype=torch.float32)).item(),
        any(task_vector[at].any() for at in slices),
    )


def input_facts(vector: TaskVector) -> dict:
    """What a result was made from: both models by name, revision and a hash."""
    return {
        "base_model": vector.base.name,
        "base_revision": vector.base.revision,
        "base_weights": fingerprint(vector.base),
        "finetune_model": vector.tuned.name,
        "finetune_revision": vector.tuned.revision,
        "finetune_weights": fingerprint(vector.tuned),
    }


def versions() -> dict[str, str]:
    return {
        "soteria": soteria.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "safetensors": safetensors.__version__,
        "python": sys.version.split()[0],
    }


def made_before(output: Path, inputs: dict, vector: TaskVector, overwrite: bool) -> dict | None:
    """The facts of a result that these inputs gave already, None where it is to be made.

    Raises UserError for a folder that is no result of steering, or one of other inputs unless `overwrite`.
    """
    if any(model.folder.resolve().is_relative_to(output.resolve()) for model in (vector.base, vector.tuned)):
        raise UserError(f"{output} holds one of the models to steer with; give another --output")
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return None
    found = files.read_json(output / FACTS)
    if not isinstance(found, dict):
        raise UserError(f"{output} exists and is no steered model; remove it or give another --output")
    if overwrite:
        return None
    if any(found.get(key) != value for key, value in inputs.items()):
        raise UserError(f"{output} exists and was not made from these inputs; remove it or give --overwrite")
    return found


def fingerprint(checkpoint: Checkpoint) -> str:
    """A hash of 256 samples of each weight file: it notices another model behind the same name, at next to no cost.

    Of an adapter, its settings count too: they scale the weights.
    """
    digest = hashlib.sha256()
    if checkpoint.is_adapter:
        digest.update(json.dumps(checkpoint.config, sort_keys=True).encode())
    for path in checkpoint.weight_files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for start in range(0, size, max(4096, size // 256)):
                file.seek(start)
                digest.update(file.read(4096))
    return digest.hexdigest()


def front_matter(base: str, languages: list[str]) -> str:
    """The hub's front matter of a model card. A local folder goes by its own name: its path is nobody's business."""
    data = ModelCardData(
        base_model=Path(base).resolve().name if Path(base).is_dir() else base,
        language=[find_language(language).code.split("-")[0] for language in languages],
        library_name="transformers",
        tags=["soteria", "safety", "steering"],
    )
    return f"---\n{data.to_yaml()}\n---\n"


def model_card(facts: dict) -> str:
    """The README of a steered model."""
    base = paths.model_slug(facts["base_model"])
    return f"""{front_matter(facts["base_model"], [facts["language"]])}# {base}, steered for {facts["language"]}

Made with Soteria (Banerjee et al., 2025): `base - {facts["scaling_factor"]:g} * (tuned - base)` on the
output-projection slices of {facts["n_heads"]} attention heads, {facts["share_of_parameters_changed"]:.2%} of the
parameters. Every other tensor is the base's. `{FACTS}` beside this file names the tuned model and every head.
"""
