"""Attention geometry: where a model's heads meet its residual stream, read from its modules and never from its name."""

from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from soteria.errors import UserError

# What attention blocks call the matrix that maps the concatenated heads back to the residual stream.
OUTPUT_PROJECTION_NAMES = ("o_proj", "out_proj", "dense", "c_proj", "wo")
# Kinds of layers, as configs list them, that have no attention from token to token. State spaces and the like are
# listed as linear attention.
WITHOUT_HEADS = ("linear_attention", "conv", "moe", "mlp")


@dataclass(frozen=True)
class AttentionGeometry:
    """The heads of the layers that have attention, in rows, and the names of their modules.

    A row is an attention layer; `layers[row]` is its number among all of the model's `n_layers`, by which heads are
    named. In most models rows are layers. `heads[row]` and `head_dims[row]` are how many heads it has and how wide they
    are. `projection_names[row]` names its output projection, which has `heads * head_dim` inputs: head h's are the
    slice `[h * head_dim, (h + 1) * head_dim)`: columns of its weight, or rows if `transposed` (GPT-2).
    `layer_names[row]` names the whole layer.
    """

    n_layers: int
    layers: tuple[int, ...]
    heads: tuple[int, ...]
    head_dims: tuple[int, ...]
    layer_names: tuple[str, ...]
    projection_names: tuple[str, ...]
    transposed: bool

    @property
    def n_rows(self) -> int:
        return len(self.layers)

    @property
    def n_heads(self) -> int:
        """The most heads of a row."""
        return max(self.heads)

    @property
    def head_dim(self) -> int:
        """The width of the widest heads."""
        return max(self.head_dims)

    @property
    def places(self) -> list[tuple[int, int]]:
        """Every head as (row, head)."""
        return [(row, head) for row, count in enumerate(self.heads) for head in range(count)]

    @property
    def all_heads(self) -> list[tuple[int, int]]:
        """Every head as it is named: (layer, head)."""
        return [(self.layers[row], head) for row, head in self.places]

    def split(self, row: int, heads: Tensor) -> Tensor:
        """A row's concatenated outputs (…, heads * head_dim) by head, (…, heads, head_dim)."""
        return heads.unflatten(-1, (self.heads[row], self.head_dims[row]))

    def head_slice(self, row: int, head: int) -> slice:
        width = self.head_dims[row]
        return slice(head * width, (head + 1) * width)

    def row(self, layer: int) -> int:
        """The row of a layer by its number. Raises ValueError for one without attention."""
        return self.layers.index(layer)

    def __contains__(self, head: tuple[int, int]) -> bool:
        layer, index = head
        return layer in self.layers and 0 <= index < self.heads[self.row(layer)]

    def __str__(self) -> str:
        counts = "/".join(map(str, sorted({*self.heads})))
        if self.n_rows == self.n_layers:
            return f"{self.n_layers} layers of {counts} heads"
        return f"{counts} heads in each of the layers {', '.join(map(str, self.layers))} only"


def read_geometry(model: PreTrainedModel) -> AttentionGeometry:
    """The attention geometry of a model. Raises UserError, naming the architecture, if it cannot be determined."""
    config = model.config.get_text_config()

    def refuse(reason: str) -> UserError:
        name = type(model).__name__
        return UserError(f"{name} cannot be handled: {reason}; see docs/models.md for the architectures that can")

    n_layers = getattr(config, "num_hidden_layers", None)
    if not isinstance(n_layers, int) or n_layers < 1:
        raise refuse("its config does not give its number of layers")
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * n_layers
    numbers = [number for number, kind in enumerate(kinds) if kind not in WITHOUT_HEADS]
    if not numbers:
        raise refuse(f"none of its layers has attention heads, by its config ({', '.join(sorted({*kinds}))})")
    stacks = [
        (name, module)
        for name, module in _decoder(model)
        if isinstance(module, nn.ModuleList) and len(module) == n_layers and _output_projection(module[numbers[0]])
    ]
    if len(stacks) != 1:
        raise refuse(
            f"{len(stacks) or 'none'} of its stacks of {n_layers} layers has, in each of them, one matrix that maps "
            f"attention heads back ({', '.join(OUTPUT_PROJECTION_NAMES)}), as decoders do"
        )
    stack_name, stack = stacks[0]
    names, counts, widths, transposed, blocks = [], [], [], set(), set()
    for number in numbers:
        found, own = _output_projection(stack[number]), config.per_layer_config[number]
        if not found:
            raise refuse(f"layer {number} has no attention output projection ({', '.join(OUTPUT_PROJECTION_NAMES)})")
        name, projection = found
        is_conv = isinstance(projection, Conv1D)
        count, width = getattr(own, "num_attention_heads", None), projection.weight.shape[0 if is_conv else 1]
        if not isinstance(count, int) or count < 1:
            raise refuse(f"its config does not give the number of heads of layer {number}")
        declared = {getattr(own, key, None) for key in ("head_dim", "v_head_dim", "global_head_dim")}
        if width % count or not (declared - {None} or {width // count}) & {width // count}:
            wide = " or ".join(str(each) for each in sorted(declared - {None}))
            raise refuse(f"layer {number}'s output projection is {width} wide, not {count} heads of {wide}")
        names.append(f"{stack_name}.{number}.{name}")
        counts.append(count)
        widths.append(width // count)
        if declared == {None} and widths[-1] != widths[0]:
            raise refuse(f"its output projections are not all {widths[0]} wide a head, and its config does not say why")
        transposed.add(is_conv)
        blocks.add(type(stack[number].get_submodule(name.rpartition(".")[0])).__name__)
    if len(transposed) > 1 or len(blocks) > 1:
        raise refuse(f"its layers have different kinds of attention ({', '.join(sorted(blocks))})")
    layer_names = tuple(f"{stack_name}.{number}" for number in numbers)
    rows = (tuple(numbers), tuple(counts), tuple(widths), layer_names, tuple(names))
    return AttentionGeometry(n_layers, *rows, transposed.pop())


def _decoder(model: PreTrainedModel) -> list[tuple[str, nn.Module]]:
    """The modules of a model's text part, by their names in the whole model: towers of other inputs are left out."""
    text = model.get_decoder() if hasattr(model, "get_decoder") else model
    inside = {id(module) for module in text.modules()} if isinstance(text, nn.Module) else set()
    named = list(model.named_modules())
    return [(name, module) for name, module in named if id(module) in inside] or named


def _output_projection(layer: nn.Module) -> tuple[str, nn.Module] | None:
    """The output projection of a layer's only attention block, as (name within the layer, module).

    Blocks are known by their own name or their class's.
    """
    found = []
    for name, module in layer.named_modules():
        block, _, own = name.rpartition(".")
        if own not in OUTPUT_PROJECTION_NAMES or "." in block or not isinstance(module, nn.Linear | Conv1D):
            continue
        if "att" in block.lower() or (block and "Attention" in type(layer.get_submodule(block)).__name__):
            found.append((name, module))
    return found[0] if len(found) == 1 else None
