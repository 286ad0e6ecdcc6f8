"""A steered model as a complete folder: the base's files, with the slices of the selected heads steered in the copy.

Every other tensor is the base's, bit for bit. `soteria.json` in the folder says how it was made.
"""

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NotRequired

import safetensors
import torch
import transformers
from huggingface_hub import ModelCardData
from pydantic import NonNegativeFloat
from tqdm import tqdm
from typing_extensions import TypedDict

import soteria
from soteria.errors import UserError
from soteria.languages import find_language
from soteria.models.checkpoints import Checkpoint
from soteria.models.loading import DTYPES
from soteria.models.task_vector import TaskVector
from soteria.models.tensors import read_tensor, replace_tensor
from soteria.steering.formula import Steering, check_steered, head_list_hash, steer
from soteria.storage import files, outputs, paths
from soteria.storage.paths import FACTS
from soteria.storage.side_files import Count, PositiveCount, Text, fits, is_of, side_file

DELTA_WEIGHTS = "delta.safetensors"


@side_file
class Facts(TypedDict):
    """The facts file of a folder of this project: what its readers use. Those of earlier versions have no `weights`."""

    format: str
    base_model: Text
    weights: NotRequired[str]


@side_file
class SteeredFacts(Facts):
    finetune_model: Text
    base_weights: str
    language: Text
    scaling_factor: NonNegativeFloat
    n_heads: PositiveCount


@side_file
class CheckpointFacts(SteeredFacts):
    share_of_parameters_changed: float


@side_file
class AdapterFacts(SteeredFacts):
    rank: PositiveCount
    relative_error: float


@side_file
class DeltaFacts(Facts):
    languages: dict[Text, str]
    scaling_factor: NonNegativeFloat
    base_projections_xxh3: str


@side_file
class TunedFacts(Facts):
    rows: PositiveCount
    rows_left_out: Count
    answers_cut: Count
    max_tokens: Count
    output_projections: Count
    first_loss: float
    last_loss: float
    steps: Count


SCHEMAS = {
    "checkpoint": CheckpointFacts,
    "lora": AdapterFacts,
    "delta": DeltaFacts,
    "adapter": TunedFacts,
    "merged": TunedFacts,
}


def steer_checkpoint(
    steering: Steering, output: Path, *, language: str, dtype: str | None = None, overwrite: bool = False
) -> dict:
    """Write the steered model as a complete folder and return the facts in its `soteria.json`.

    One projection is in memory at a time. A folder already made from the same inputs is reused; `overwrite` replaces a
    steered model, never another folder. Raises UserError if the result is not finite, the disk has too little room, or
    the output folder holds something else.
    """
    vector, base = steering.vector, steering.vector.base
    inputs = steering_inputs(steering, "checkpoint", language, dtype)
    if made := made_before(output, inputs, (vector.base, vector.tuned), overwrite):
        return made
    base.check_links()
    with files.whole_folder(output) as folder:
        stored_as = DTYPES[dtype] if dtype else None
        with progress("copying the base", base.copied_bytes(stored_as)) as bar:
            base.copy_to(folder, stored_as, bar.update)
        copy = Checkpoint.open(str(folder))
        n_parameters = sum(torch.Size(place.shape).numel() for place in base.places.values())
        facts = inputs | {
            **steered_heads(steering),
            "parameters_changed": steering.n_parameters,
            "share_of_parameters_changed": steering.n_parameters / n_parameters,
            "relative_change_per_layer": [_patch(steering, layer, copy) for layer in vector.geometry.layers],
            "versions": versions(),
        }
        card = f"""# {paths.model_slug(base.name)}, steered for {language}

Made with Soteria (Banerjee et al., 2025): `base - {steering.scaling_factor:g} * (tuned - base)` on the
output-projection slices of {facts["n_heads"]} attention heads, {facts["share_of_parameters_changed"]:.2%} of the
parameters. Every other tensor is the base's. `{FACTS}` beside this file names the tuned model and every head.
"""
        describe(folder, card, [language], facts)
    return facts


def _patch(steering: Steering, layer: int, copy: Checkpoint) -> float:
    """Steer one layer in the files of a copy; return the norm of the change divided by that of the base's weight."""
    slices = steering.slices(layer)
    if not slices:
        return 0.0
    place = steering.vector.place(steering.vector.base, layer)
    weight, task_vector, written = read_tensor(place), steering.vector.at(layer), copy.places[place.key]
    steered = weight.to(written.dtype, copy=True)
    for at in slices:
        steered[at] = steer(weight[at], task_vector[at], steering.scaling_factor)
    check_steered(place.key, steered)
    replace_tensor(written, steered)
    moved = steered.to(torch.float32, copy=True).sub_(weight.to(written.dtype))
    return (moved.norm() / torch.linalg.vector_norm(weight.float())).item()


def steering_inputs(steering: Steering, kind: str, language: str, dtype: str | None, rank: int | None = None) -> dict:
    """What a folder of one language's steering is made from. `kind` is its format, `rank` what an adapter may have."""
    vector, is_lora = steering.vector, kind == "lora"
    return {
        "format": kind,
        **input_facts(vector),
        "language": language,
        "scaling_factor": steering.scaling_factor,
        "dtype": dtype or ("float32" if is_lora else "base"),
        "head_list_sha256": head_list_hash(steering.heads),
    } | ({"max_rank": None if vector.tuned.is_adapter else rank} if is_lora else {})


def steered_heads(steering: Steering) -> dict:
    """The heads of a steering, as facts."""
    heads = [list(head) for head in steering.heads]
    return {"head_list": paths.list_name(steering.source), "heads": heads, "n_heads": len(heads)}


def input_facts(vector: TaskVector) -> dict:
    """The two models that a result was made from: name, without this machine's folders, revision and a hash of each."""
    return {
        f"{role}_{fact}": value
        for role, model in (("base", vector.base), ("finetune", vector.tuned))
        for fact, value in (
            ("model", paths.model_name(model.name)),
            ("revision", model.revision),
            ("weights", model.fingerprint),
        )
    }


def versions() -> dict[str, str]:
    libraries = (soteria, torch, transformers, safetensors)
    return {it.__name__: it.__version__ for it in libraries} | {"python": sys.version.split()[0]}


def made_before(
    output: Path, inputs: dict, models: Iterable[Checkpoint], overwrite: bool = False, **words
) -> dict | None:
    """The facts of a folder already made from these inputs, or None if it has yet to be made.

    Raises UserError as `check_replaceable` does, which gets `words`.
    """
    found = check_replaceable(output, inputs, models, overwrite, **words)
    if found and not (fits(found, SCHEMAS[found["format"]]) and _has_its_weights(output, found)):
        print(f"{output} is damaged; it is made again", file=sys.stderr)
        return None
    return found


def check_replaceable(
    output: Path,
    inputs: dict,
    models: Iterable[Checkpoint],
    overwrite: bool = False,
    *,
    kind: str = "a steered model",
    key: str = "finetune_model",
    mend: str = "--overwrite",
) -> dict | None:
    """The facts in a folder that says it was made from these inputs; None if there is none, or it may be replaced.

    `key` is in the facts of every such folder. Raises UserError for a folder that lacks it, was made from other inputs
    unless `overwrite`, holds one of the models read, or cannot be written; `kind` and `mend` are words of its sentence.
    """
    if any(model.folder.resolve().is_relative_to(output.resolve()) for model in models):
        raise UserError(f"{output} holds one of the models to read; give another --output")
    outputs.check_folder(output, key, kind)
    if overwrite or not output.exists() or not any(output.iterdir()):
        return None
    found = files.read_facts(output / FACTS)
    if not is_of(found, inputs):
        raise UserError(f"{output} exists and was not made from these inputs; remove it or give {mend}")
    return found


def _has_its_weights(folder: Path, facts: dict) -> bool:
    """Whether the weights that a folder was made with are there and, as far as their hash is noted, unchanged."""
    try:
        weights = result_in(folder, facts).fingerprint
    except (OSError, UserError):
        return False
    return facts.get("weights", weights) == weights


def result_in(folder: Path, facts: dict) -> Checkpoint:
    """The weights in a folder that has these facts. Raises UserError if they are missing or broken."""
    if facts["format"] != "delta":
        return Checkpoint.open(str(folder))
    checkpoint = Checkpoint(str(folder), folder, None, (folder / DELTA_WEIGHTS,))
    _ = checkpoint.places
    return checkpoint


def progress(title: str, n_bytes: int) -> tqdm:
    return tqdm(total=n_bytes, desc=title, unit="B", unit_scale=True, disable=None)


def describe(
    folder: Path,
    card: str,
    languages: list[str],
    facts: dict,
    *,
    library: str = "transformers",
    tags: Sequence[str] = ("safety", "steering"),
) -> None:
    """Write `soteria.json` and the model card, and add a hash of the folder's weights to the facts."""
    facts["weights"] = result_in(folder, facts).fingerprint
    data = ModelCardData(
        base_model=facts["base_model"].partition("@")[0],
        language=[find_language(language).code.split("-")[0] for language in languages],
        library_name=library,
        tags=["soteria", *tags],
    )
    files.write_text(folder / "README.md", f"---\n{data.to_yaml()}\n---\n{card}")
    files.write_json(folder / FACTS, facts)
