"""Loading a causal language model by hub id or local folder: its config, tokenizer, attention geometry and weights.

No remote code is run. Every loader raises UserError if what it loads is missing or broken.
"""

import contextlib
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, rename_source_key
from transformers.utils import logging as transformers_logging

from soteria.errors import UserError
from soteria.models.geometry import AttentionGeometry, read_geometry

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# Put before a prompt if the tokenizer adds no beginning-of-text token, as the original does for every such model.
BOS_TEXT = "<|endoftext|>"


@dataclass(frozen=True)
class LoadedModel:
    """A model in eval mode with its tokenizer and geometry, which a judge does without."""

    name: str
    model: PreTrainedModel
    tokenizer: object
    geometry: AttentionGeometry | None

    @property
    def projections(self) -> list[nn.Module]:
        return [self.model.get_submodule(name) for name in self.geometry.projection_names]

    @property
    def adds_bos(self) -> bool:
        return len(self.encode("")) > 0

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """A prompt's token ids, without the end-of-text token that some tokenizers put behind everything."""
        ids = self.tokenizer(text, add_special_tokens=add_special_tokens).input_ids
        ends_texts = add_special_tokens and self.tokenizer("a").input_ids[-1] == self.tokenizer.eos_token_id
        return ids[:-1] if ends_texts else ids

    @property
    def context_length(self) -> int | None:
        """The most tokens that the model reads, or None if its config does not say."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def resolve_dtype(dtype: str, device: str) -> torch.dtype | str:
    """`stored` is the checkpoint's own dtype. So is `auto`, except on a CPU, where half precision is slow: float32."""
    if dtype == "auto" and torch.device(device).type == "cpu":
        return torch.float32
    return "auto" if dtype in ("auto", "stored") else DTYPES[dtype]


@contextlib.contextmanager
def _explain_loading(name: str):
    try:
        yield
    except Exception as error:  # transformers raises many kinds for a broken config
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        local = "" if Path(name).is_dir() else "; it is not a local folder: give one, or a hub id that can be reached"
        raise UserError(f"the model {name!r} could not be loaded{local} ({reason})") from error


def load_config(name: str) -> PreTrainedConfig:
    with _explain_loading(name):
        return AutoConfig.from_pretrained(name, trust_remote_code=False)


def load_tokenizer(name: str):
    with _explain_loading(name):
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)


def _without_weights(name: str) -> PreTrainedModel:
    """The model that a checkpoint's config describes, on no device."""
    config = load_config(name)
    with _explain_loading(name), torch.device("meta"):
        return auto_class_of(config).from_config(config)


def auto_class_of(config: PreTrainedConfig) -> type:
    """What loads a model with its language head: models that see images too have a class of their own."""
    causal = type(config) in AutoModelForCausalLM._model_mapping
    return AutoModelForCausalLM if causal else AutoModelForImageTextToText


def load_geometry(name: str) -> AttentionGeometry:
    """The attention geometry of a checkpoint, from its config alone: no weights are read."""
    return read_geometry(_without_weights(name))


def load_module_names(name: str) -> list[str]:
    """The names of a checkpoint's modules, from its config alone."""
    return [module for module, _ in _without_weights(name).named_modules()]


def parameter_names(name: str, keys: Iterable[str]) -> dict[str, str]:
    """The parameter that transformers loads each key of a checkpoint into, left out where it computes it of several."""
    model = _without_weights(name)
    conversions = get_model_conversion_mapping(model)
    renamings = [each for each in conversions if not isinstance(each, WeightConverter)]
    converters = [each for each in conversions if isinstance(each, WeightConverter)]
    known, found = model.state_dict(), {}
    for key in sorted(keys):  # in the order in which transformers renames them
        parameter, computed = rename_source_key(key, renamings, converters, model.base_model_prefix, known)
        if not computed:
            found[key] = parameter
    return found


def is_classifier(config: PreTrainedConfig) -> bool:
    """Whether a checkpoint's own architecture classifies whole texts."""
    return any(name.endswith("ForSequenceClassification") for name in config.architectures or ())


def load_weights(
    name: str, device: str | None = None, dtype: str = "auto", auto_class: type | None = None
) -> PreTrainedModel:
    """Load a language model (or what `auto_class` makes) in eval mode, in a dtype as `resolve_dtype` has it.

    accelerate spreads a model that one GPU cannot hold over all GPUs, then memory and disk (`device_map="auto"`).
    Raises UserError if weights are missing or misshapen, or the device is unusable, too.
    """
    device = device or default_device()
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {device!r} cannot be used ({str(error).splitlines()[0]}); try --device cpu") from None
    config = load_config(name)
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    resolved, auto_class = resolve_dtype(dtype, device), auto_class or auto_class_of(config)
    with _explain_loading(name):
        spread = {} if fits(config, resolved, device, auto_class) else {"device_map": "auto"}
        model, report = auto_class.from_pretrained(
            name, config=config, dtype=resolved, output_loading_info=True, trust_remote_code=False, **spread
        )
    # transformers only warns of tensors that it could not find or fit, and fills them with random numbers.
    broken = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
    if broken:
        raise UserError(
            f"the weights of {name!r} do not fit its config ({len(broken)} tensors, the first {broken[0]}); "
            "copy or download the model again"
        )
    return (model if spread else model.to(device)).eval()


def load_model(name: str, device: str | None = None, dtype: str = "auto") -> LoadedModel:
    """Load a causal LM as `load_weights` does, with its tokenizer and geometry."""
    tokenizer = load_tokenizer(name)
    model = load_weights(name, device, dtype)
    return LoadedModel(name, model, tokenizer, read_geometry(model))


def load_judge(name: str) -> LoadedModel:
    """Load a causal LM or a sequence classifier with its tokenizer, whatever its attention."""
    tokenizer = load_tokenizer(name)
    auto_class = AutoModelForSequenceClassification if is_classifier(load_config(name)) else None
    return LoadedModel(name, load_weights(name, auto_class=auto_class), tokenizer, geometry=None)


def fits(
    config: PreTrainedConfig, dtype: torch.dtype | str, device: str, auto_class: type = AutoModelForCausalLM
) -> bool:
    """Whether a GPU's free memory holds the model's weights and a tenth more. Always True for a CPU, which can swap."""
    if torch.device(device).type != "cuda":
        return True
    with torch.device("meta"):
        n_parameters = sum(parameter.numel() for parameter in auto_class.from_config(config).parameters())
    stored = (config.dtype or torch.float32) if dtype == "auto" else dtype
    return n_parameters * stored.itemsize * 1.1 < torch.cuda.mem_get_info(device)[0]
