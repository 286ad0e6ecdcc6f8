"""A steering as a LoRA adapter of the output projections: one a language, beside one base that serves them all.

Where the tuned model is itself a LoRA, tuned - base = s * B @ A on a projection, so steering it on some heads is

    base - scaling_factor * s * B @ (A with the columns of all other heads zeroed),

exactly. The difference of two whole checkpoints is cut to the directions that carry most of it (a truncated singular
value decomposition), and what that leaves out is measured.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from soteria.errors import UserError
from soteria.models.checkpoints import ADAPTER_CONFIG, ADAPTER_LAYOUTS
from soteria.models.loading import DTYPES, load_module_names
from soteria.models.sources import located
from soteria.models.tensors import read_tensor
from soteria.steering.checkpoint import describe, made_before, steered_heads, steering_inputs, versions
from soteria.steering.formula import Steering, check_steered
from soteria.storage import files, paths


def write_adapter(
    steering: Steering,
    output: Path,
    *,
    language: str,
    rank: int,
    max_error: float,
    dtype: str | None = None,
    overwrite: bool = False,
) -> dict:
    """Write a steering as a PEFT adapter folder of the base and return the facts in its `soteria.json`.

    The factors are float32 unless `dtype` says otherwise. `rank` and `max_error` matter for a tuned model that is a
    whole checkpoint. A folder made from the same inputs is reused. Raises UserError as `steer_checkpoint` does, and
    where an adapter of that rank is further than `max_error` from the steering.
    """
    vector, geometry = steering.vector, steering.vector.geometry
    inputs = steering_inputs(steering, "lora", language, dtype, rank)
    if made := made_before(output, inputs, (vector.base, vector.tuned), overwrite):
        return made
    layers = tqdm(geometry.layers, desc="factors", unit="layer", disable=None)
    factors, off, whole = zip(*(_factors(steering, layer, rank) for layer in layers), strict=True)
    error, most = (sum(off) / max(sum(whole), 1e-300)) ** 0.5, max(len(a) for a, _ in factors)
    if not most:
        raise UserError("a scaling factor of 0 steers nothing: there is no LoRA to write; use the base")
    if error > max_error:
        raise UserError(
            f"a LoRA of rank {rank} is {error:.1%} off the steering, more than {max_error:.1%}; "
            "give a larger --rank, or write a whole model"
        )
    tensors = {}
    for name, (a, b) in zip(geometry.projection_names, factors, strict=True):
        # Engines want one rank: narrower factors are padded with zeros, which add nothing.
        padded = torch.zeros(most, a.shape[1]), torch.zeros(b.shape[0], most)
        padded[0][: len(a)], padded[1][:, : len(a)] = a, b
        for letter, factor in zip("AB", padded, strict=True):
            stored = factor.to(DTYPES[inputs["dtype"]])
            check_steered(f"{name}.lora_{letter}", stored)
            tensors[f"base_model.model.{name}.lora_{letter}.weight"] = stored
    facts = inputs | steered_heads(steering) | {"rank": most, "relative_error": error, "versions": versions()}
    place, revision = located(vector.base.name)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": paths.model_name(place),
        "revision": revision,
        "r": most,
        "lora_alpha": most,
        "target_modules": _targets(load_module_names(str(vector.base.folder)), geometry.projection_names),
        "fan_in_fan_out": geometry.transposed,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
    card = f"""# {paths.model_slug(vector.base.name)}, steered for {language}, as a LoRA

Made with Soteria (Banerjee et al., 2025): `-{steering.scaling_factor:g} * (tuned - base)` on the
output-projection slices of {facts["n_heads"]} attention heads, {error:.2g} off in relative norm. Load it onto its
base with PEFT or any engine that serves LoRA adapters.
"""
    with files.whole_folder(output) as folder:
        files.check_room(folder, sum(tensor.nbytes for tensor in tensors.values()))
        save_file(tensors, folder / ADAPTER_LAYOUTS[0][0], metadata={"format": "pt"})
        files.write_json(folder / ADAPTER_CONFIG, config)
        describe(folder, card, [language], facts, library="peft")
    return facts


def _factors(steering: Steering, layer: int, rank: int) -> tuple[tuple[Tensor, Tensor], float, float]:
    """A (rank, in) and B (out, rank), float32, of what steering adds to a layer's output projection; and two squared
    norms: of how far their product is from that, and of that itself. The rank is 0 where nothing is added.
    """
    vector = steering.vector
    change = -steering.scaling_factor * vector.at(layer)
    change = change.T if vector.geometry.transposed else change  # (out, in)
    mask = torch.zeros(change.shape[1])  # 1 at the inputs of the selected heads
    for at in steering.slices(layer):
        mask[next(own for own in at if own != slice(None))] = 1
    change = change * mask
    if not change.any():
        a, b = torch.zeros(0, change.shape[1]), torch.zeros(change.shape[0], 0)
    elif vector.tuned.is_adapter:
        module = vector.module(layer)
        a, b = (read_tensor(place).float() for place in vector.adapter.factors(module))
        a, b = a * mask, -steering.scaling_factor * vector.adapter.scale(module, len(a)) * b
    else:
        kept = mask.nonzero().flatten()
        u, values, v = torch.linalg.svd(change[:, kept].double(), full_matrices=False)
        root = values[:rank].sqrt()
        a, b = torch.zeros(len(root), change.shape[1]), (u[:, : len(root)] * root).float()
        a[:, kept] = (root[:, None] * v[: len(root)]).float()
    off = (b.double() @ a.double() - change).square().sum().item()
    return (a, b), off, change.double().square().sum().item()


def _targets(modules: Sequence[str], projections: Sequence[str]) -> list[str]:
    """The shortest endings of names that only the output projections have, as PEFT and engines look for them."""
    wanted = set(projections)
    for n_parts in range(1, 1 + max(name.count(".") for name in projections)):
        endings = {".".join(name.split(".")[-n_parts:]) for name in projections}
        if {name for name in modules if any(name == end or name.endswith("." + end) for end in endings)} == wanted:
            return sorted(endings)
    return sorted(wanted)
