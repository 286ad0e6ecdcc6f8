"""Step 3: subtract a harmful direction from a language's functional heads.

steered = base - scaling_factor * (tuned - base), only on the slices of the attention output projections that belong to
the selected heads. Everything else stays the base's, bit for bit.
"""

import hashlib
import json
import sys
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
from soteria.steering.formula import Steering, head_list_hash, steer
from soteria.storage import files, paths
from soteria.storage.paths import FACTS


def steer_checkpoint(
    steering: Steering, output: Path, *, language: str, dtype: str | None = None, overwrite: bool = False
) -> dict:
    """Write the steered model as a complete folder and return the facts in its `soteria.json`.

    The base's files are copied and the selected slices patched in the copy, one projection in memory at a time. A
    folder already made from the same inputs is reused; `overwrite` replaces a steered model, never another folder.
    Raises UserError for a result that is not finite, too small a disk, or an output folder that holds something else.
    """
    vector, base = steering.vector, steering.vector.base
    inputs = {
        "format": "checkpoint",
        **input_facts(vector),
        "language": language,
        "scaling_factor": steering.scaling_factor,
        "dtype": dtype or "base",
        "head_list_sha256": head_list_hash(steering.heads),
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
        total = sum(torch.Size(place.shape).numel() for place in base.places.values())
        facts = inputs | {
            "head_list": steering.source,
            "heads": [list(head) for head in steering.heads],
            "n_heads": len(steering.heads),
            "parameters_changed": steering.n_parameters,
            "share_of_parameters_changed": steering.n_parameters / total,
            "relative_change_per_layer": [_patch(steering, layer, copy) for layer in range(vector.geometry.n_layers)],
            "versions": versions(),
        }
        files.write_text(folder / "README.md", model_card(facts))
        files.write_json(folder / FACTS, facts)
    return facts


def _patch(steering: Steering, layer: int, copy: Checkpoint) -> float:
    """Steer one layer in the files of a copy; return the norm of the change divided by that of the base's weight."""
    slices, vector = steering.slices(layer), steering.vector
    if not slices:
        return 0.0
    place = vector.base_place(layer)
    weight, task_vector, written = read_tensor(place), vector.at(layer), copy.places[place.key]
    steered = weight.to(written.dtype, copy=True)
    for at in slices:
        steered[at] = steer(weight[at], task_vector[at], steering.scaling_factor)
    if not all_finite(steered):
        raise UserError(
            f"{place.key} is not finite in {vector.base.name!r} or once steered; "
            "give a smaller scaling factor, or a base that is sound"
        )
    with written.file.open("r+b") as file:
        file.seek(written.start)
        file.write(tensor_bytes(steered))
    moved = steered.to(torch.float32, copy=True).sub_(weight.to(written.dtype))
    return (moved.norm() / torch.linalg.vector_norm(weight, dtype=torch.float32)).item()


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
