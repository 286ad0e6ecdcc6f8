"""Loading a causal language model, and its attention geometry, read from its modules and never from its name.

Knows transformers; knows nothing of prompts, languages or effects.
"""

import contextlib
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

from soteria.errors import UserError

# What attention blocks call the matrix that maps the concatenated heads back to the residual stream.
OUTPUT_PROJECTION_NAMES = ("o_proj", "out_proj", "dense", "c_proj", "wo")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# Put before a prompt where the tokenizer adds no beginning-of-text token, as the original does for every such model.
BOS_TEXT = "<|endoftext|>"


@dataclass(frozen=True)
class AttentionGeometry:
    """Where a model's attention heads meet its residual stream.

    `projection_names[l]` names layer l's output projection; it has `n_heads * head_dim` inputs, head h's being the
    slice `[h * head_dim, (h + 1) * head_dim)`. They are columns of its weight, or rows where `transposed` (GPT-2).
    `layer_names[l]` names the whole layer.
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
    """The attention geometry of a model. Raises UserError, naming the architecture, where it cannot be told."""
    config = model.config.get_text_config()
    what = type(model).__name__

    def refuse(reason: str) -> UserError:
        return UserError(f"{what} cannot be handled: {reason}; see the README for the architectures that can")

    n_layers, n_heads = getattr(config, "num_hidden_layers", None), getattr(config, "num_attention_heads", None)
    if not all(isinstance(count, int) and count > 0 for count in (n_layers, n_heads)):
        raise refuse("its config gives no single number of layers and heads")
    stacks = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == n_layers and _own_projection(module[0])
    ]
    if len(stacks) != 1:
        raise refuse(f"{len(stacks)} stacks of {n_layers} attention layers found, not one")
    stack_name, layers = stacks[0]
    names, widths, transposed, blocks = [], set(), set(), set()
    for index, layer in enumerate(layers):
        found = _own_projection(layer)
        if not found:
            raise refuse(f"layer {index} has no attention output projection ({', '.join(OUTPUT_PROJECTION_NAMES)})")
        name, projection = found
        names.append(f"{stack_name}.{index}.{name}")
        blocks.add(type(layer.get_submodule(name.rpartition(".")[0])).__name__)
        transposed.add(isinstance(projection, Conv1D))
        widths.add(projection.weight.shape[0 if isinstance(projection, Conv1D) else 1])
    if len(blocks) > 1:  # linear attention between full attention, as in Qwen3-Next: their heads are not alike
        raise refuse(f"its layers attend in different ways ({', '.join(sorted(blocks))})")
    width = widths.pop()
    if widths or len(transposed) > 1 or width % n_heads:
        raise refuse(f"its output projections are not all {n_heads} heads wide")
    declared = getattr(config, "head_dim", None)
    if declared and declared != width // n_heads:
        raise refuse(f"head_dim is {declared} in its config, {width // n_heads} in its output projection")
    layer_names = tuple(f"{stack_name}.{index}" for index in range(n_layers))
    return AttentionGeometry(n_heads, width // n_heads, layer_names, tuple(names), transposed.pop())


def _own_projection(layer: nn.Module) -> tuple[str, nn.Module] | None:
    """The output projection of a layer's only attention block, as (name in the layer, module)."""
    found = [
        (name, module)
        for name, module in layer.named_modules()
        if re.fullmatch(rf"\w*att\w*\.({'|'.join(OUTPUT_PROJECTION_NAMES)})", name)
        and isinstance(module, nn.Linear | Conv1D)
    ]
    return found[0] if len(found) == 1 else None


@dataclass(frozen=True)
class LoadedModel:
    """A model in eval mode with its tokenizer and geometry."""

    name: str
    model: PreTrainedModel
    tokenizer: object
    geometry: AttentionGeometry

    @property
    def projections(self) -> list[nn.Module]:
        return [self.model.get_submodule(name) for name in self.geometry.projection_names]

    @property
    def adds_bos(self) -> bool:
        return len(self.tokenizer("").input_ids) > 0

    @property
    def context_length(self) -> int | None:
        """The most tokens a prompt may have, None where the config does not say."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def resolve_dtype(dtype: str, device: str) -> torch.dtype | str:
    """`stored` is the checkpoint's own dtype, `auto` too but for a CPU, where half precision is slow: float32."""
    if dtype == "auto" and torch.device(device).type == "cpu":
        return torch.float32
    return "auto" if dtype in ("auto", "stored") else DTYPES[dtype]


@contextlib.contextmanager
def _explain_loading(name: str):
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # transformers raises whatever a broken config leads it to
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        local = "" if Path(name).is_dir() else "; it is no local folder, so give a folder or a reachable hub id"
        raise UserError(f"cannot load the model {name!r}{local} ({reason})") from error


def load_config(name: str) -> PreTrainedConfig:
    """The configuration of a model by hub id or local folder. Raises UserError where there is none."""
    with _explain_loading(name):
        return AutoConfig.from_pretrained(name, trust_remote_code=False)


def load_tokenizer(name: str):
    """The tokenizer of a model. Raises UserError where there is none."""
    with _explain_loading(name):
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)


def load_geometry(name: str) -> AttentionGeometry:
    """The attention geometry of a checkpoint, from its configuration alone: no weights are read."""
    config = load_config(name)
    with _explain_loading(name), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return read_geometry(model)


def load_weights(name: str, device: str | None = None, dtype: str = "auto") -> PreTrainedModel:
    """Load a causal LM by hub id or local folder, in eval mode. No remote code is run.

    A model that one GPU does not hold is spread over all of them, and the rest of it over memory and disk, by
    accelerate (`device_map="auto"`). `dtype`: see `resolve_dtype`.

    Raises UserError for a path that is no model, missing or misshapen weights, or an unusable device.
    """
    device = device or default_device()
    with _explain_device(device):
        torch.zeros(1, device=device)
    config = load_config(name)
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    resolved = resolve_dtype(dtype, device)
    with _explain_loading(name):
        spread = {} if fits(config, resolved, device) else {"device_map": "auto"}
        model, report = AutoModelForCausalLM.from_pretrained(
            name, config=config, dtype=resolved, output_loading_info=True, trust_remote_code=False, **spread
        )
    # transformers fills what it cannot find or fit with random numbers and only warns.
    broken = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
    if broken:
        raise UserError(f"the weights of {name!r} do not fit its config: {len(broken)} tensors, first {broken[0]}")
    return (model if spread else model.to(device)).eval()


def load_model(name: str, device: str | None = None, dtype: str = "auto") -> LoadedModel:
    """Load a causal LM with its tokenizer and geometry, as `load_weights` does.

    Raises UserError too for a missing tokenizer, or an architecture whose heads cannot be told apart.
    """
    tokenizer = load_tokenizer(name)
    model = load_weights(name, device, dtype)
    return LoadedModel(name, model, tokenizer, read_geometry(model))


def fits(config: PreTrainedConfig, dtype: torch.dtype | str, device: str) -> bool:
    """Whether a GPU's free memory holds the model's weights and a tenth more. A CPU is not asked: it can swap."""
    if torch.device(device).type != "cuda":
        return True
    with torch.device("meta"):
        n_parameters = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
    stored = (config.dtype or torch.float32) if dtype == "auto" else dtype
    return n_parameters * stored.itemsize * 1.1 < torch.cuda.mem_get_info(device)[0]


@contextlib.contextmanager
def _explain_device(device: str):
    try:
        yield
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {device!r} cannot be used ({str(error).splitlines()[0]}); try --device cpu") from None
