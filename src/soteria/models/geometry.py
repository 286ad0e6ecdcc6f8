"""Attention geometry: where a model's heads meet its residual stream, read from its modules and never from its name."""

import re
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from soteria.errors import UserError

# What attention blocks call the matrix that maps the concatenated heads back to the residual stream.
OUTPUT_PROJECTION_NAMES = ("o_proj", "out_proj", "dense", "c_proj", "wo")


@dataclass(frozen=True)
class AttentionGeometry:
    """The heads of each layer and the names of its modules.

    `projection_names[l]` names layer l's output projection. It has `n_heads * head_dim` inputs; head h's are the slice
    `[h * head_dim, (h + 1) * head_dim)`: columns of its weight, or rows if `transposed` (GPT-2). `layer_names[l]` names
    the whole layer.
    """

    n_heads: int
    head_dim: int
    layer_names: tuple[str, ...]
    projection_names: tuple[str, ...]
    transposed: bool

    @property
    def n_layers(self) -> int:
        return len(self.projection_names)

    def head_slice(self, head: int) -> slice:
        return slice(head * self.head_dim, (head + 1) * self.head_dim)


def read_geometry(model: PreTrainedModel) -> AttentionGeometry:
    """The attention geometry of a model. Raises UserError, naming the architecture, if it cannot be determined."""
    config = model.config.get_text_config()

    def refuse(reason: str) -> UserError:
        name = type(model).__name__
        return UserError(f"{name} cannot be handled: {reason}; see the README for the architectures that can")

    n_layers, n_heads = getattr(config, "num_hidden_layers", None), getattr(config, "num_attention_heads", None)
    if not all(isinstance(count, int) and count > 0 for count in (n_layers, n_heads)):
        raise refuse("its config does not give one number of layers and one of heads")
    stacks = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == n_layers and _output_projection(module[0])
    ]
    if len(stacks) != 1:
        raise refuse(f"it has {len(stacks)} stacks of {n_layers} attention layers, not one")
    stack_name, layers = stacks[0]
    names, shapes, blocks = [], set(), set()
    for index, layer in enumerate(layers):
        found = _output_projection(layer)
        if not found:
            raise refuse(f"layer {index} has no attention output projection ({', '.join(OUTPUT_PROJECTION_NAMES)})")
        name, projection = found
        transposed = isinstance(projection, Conv1D)
        names.append(f"{stack_name}.{index}.{name}")
        blocks.add(type(layer.get_submodule(name.rpartition(".")[0])).__name__)
        shapes.add((projection.weight.shape[0 if transposed else 1], transposed))
    if len(blocks) > 1:  # as in Qwen3-Next, which mixes linear and full attention: their heads are not alike
        raise refuse(f"its layers have different kinds of attention ({', '.join(sorted(blocks))})")
    width, transposed = shapes.pop()
    if shapes or width % n_heads:
        raise refuse(f"its output projections are not all {n_heads} heads wide")
    declared = getattr(config, "head_dim", None)
    if declared and declared != width // n_heads:
        raise refuse(f"head_dim is {declared} in its config, {width // n_heads} in its output projection")
    layer_names = tuple(f"{stack_name}.{index}" for index in range(n_layers))
    return AttentionGeometry(n_heads, width // n_heads, layer_names, tuple(names), transposed)


def _output_projection(layer: nn.Module) -> tuple[str, nn.Module] | None:
    """The output projection of a layer's only attention block, as (name within the layer, module)."""
    pattern = rf"\w*att\w*\.({'|'.join(OUTPUT_PROJECTION_NAMES)})"
    found = [
        (name, module)
        for name, module in layer.named_modules()
        if re.fullmatch(pattern, name) and isinstance(module, nn.Linear | Conv1D)
    ]
    return found[0] if len(found) == 1 else None
