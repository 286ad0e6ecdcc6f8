"""Loading a causal language model by hub id or local folder: its config, tokenizer, attention geometry and weights.

No remote code is run. Every loader raises UserError if what it loads is missing or broken.
"""

import contextlib
import logging
import math
import os
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, rename_source_key
from transformers.utils import GENERATION_CONFIG_NAME
from transformers.utils import logging as transformers_logging

from soteria import disk
from soteria.errors import UserError
from soteria.models.encoding import encode
from soteria.models.geometry import AttentionGeometry, read_geometry
from soteria.models.sizes import check_sizes
from soteria.models.sources import explained, located, quantization
from soteria.terminal import say_once

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# Put before a prompt if the tokenizer adds no beginning-of-text token, as the original does for every such model.
BOS_TEXT = "<|endoftext|>"
# How attention may be computed: what else a config asks for may need a GPU, a package, or code from the hub.
ATTENTION = ("sdpa", "eager")


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
        """A prompt's token ids as `encoding.encode`. Raises UserError for one that the model has no embedding of."""
        ids = encode(self.tokenizer, text, add_special_tokens=add_special_tokens)
        if ids and max(ids) >= self.vocabulary:
            token = self.tokenizer.convert_ids_to_tokens(max(ids))
            raise UserError(
                f"the tokenizer of {self.name!r} gives {token!r} the number {max(ids)}, but the model has "
                f"{self.vocabulary} tokens; use the tokenizer that belongs to it"
            )
        return ids

    @property
    def vocabulary(self) -> int:
        """How many tokens the model has embeddings of, which may be more or fewer than its tokenizer has."""
        return self.model.get_input_embeddings().num_embeddings

    @property
    def dtype(self) -> str:
        """The dtype of the weights by its name, such as `float32`."""
        return str(self.model.dtype).removeprefix("torch.")

    def finite(self, logits: Tensor) -> Tensor:
        """Logits (..., vocabulary) as they are. Raises UserError for NaN and infinity, of which argmax says nothing."""
        if not logits.amax(-1).isfinite().all():
            raise UserError(
                f"{self.name!r} gives numbers that are not finite in {self.dtype}: it is broken or needs another "
                "dtype; give another model"
            )
        return logits

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


def running_dtype(name: str, device: str | None) -> str:
    """The dtype in which `load_model` would run a model on a device: float32 on a CPU, else the checkpoint's own."""
    if (device or default_device()).partition(":")[0] == "cpu":
        return "float32"
    return str(load_config(name).get_text_config().dtype or torch.float32).removeprefix("torch.")


def load_config(name: str) -> PreTrainedConfig:
    """A model's config. Attention that it asks for and that is not computed here is left to transformers to choose."""
    place, revision = located(name)
    with explained(name):
        written, _ = PreTrainedConfig.get_config_dict(place, revision=revision)
    if isinstance(written, dict):  # anything else is refused below
        check_sizes(written, name)
    _check_generation_config(place, revision)
    with explained(name):
        config = AutoConfig.from_pretrained(place, revision=revision, trust_remote_code=False)
        asked = {each._attn_implementation for each in _parts(config)} - {None, *ATTENTION}
        if asked:
            names = ", ".join(sorted(map(str, asked)))
            say_once(f"{name}: its config asks for attention by {names}; sdpa or eager is used instead")
            for each in _parts(config):
                each._attn_implementation_internal = None
        return config


def _check_generation_config(place: str, revision: str | None) -> None:
    """Raise UserError for a broken generation_config.json, which transformers would do without, and not say so."""
    path = Path(place, GENERATION_CONFIG_NAME)
    if not Path(place).is_dir():
        path = try_to_load_from_cache(place, GENERATION_CONFIG_NAME, revision=revision)
    if not isinstance(path, str | Path) or not os.path.lexists(path):
        return
    disk.read_text(Path(path))
    found = disk.parse_json(Path(path).read_text("utf-8"), str(path), strict=False)  # a byte-order mark breaks it, too
    ends = found.get("eos_token_id") if isinstance(found, dict) else math.nan
    if not all(type(end) is int for end in (ends if isinstance(ends, list) else [0 if ends is None else ends])):
        raise UserError(f"{path} does not say by whole numbers in eos_token_id where answers end; fix it")


def _parts(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    """A config and those in it."""
    inner = [getattr(config, name, None) for name in config.sub_configs]
    return [config, *(part for each in inner if isinstance(each, PreTrainedConfig) for part in _parts(each))]


def load_tokenizer(name: str):
    load_config(name)  # transformers reads it too, and would blame the tokenizer for it
    place, revision = located(name)
    with explained(name, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(place, revision=revision, trust_remote_code=False)
    # It would warn of a text that is longer than the model reads; every step refuses such a text or leaves it out.
    tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    if getattr(model, "dropout", None):  # for its training: the same text would be other tokens each time
        model.dropout = None
    return tokenizer


def check_chat_template(name: str, asked: str) -> None:
    """Raise UserError if a model has no chat template, before anything is loaded; `asked` is what the user gave."""
    if not load_tokenizer(name).chat_template:
        raise UserError(f"the tokenizer of {name!r} has no chat template; leave out {asked}")


def _without_weights(name: str) -> PreTrainedModel:
    """The model that a checkpoint's config describes, on no device."""
    config = load_config(name)
    with explained(name), torch.device("meta"):
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
    device = default_device() if device is None else device
    try:
        torch.zeros(1, device=device)
        if torch.device(device).type == "meta" or re.fullmatch(r"cpu:\d+", device):  # which torch takes for cpu
            raise RuntimeError("there is none")
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {device!r} cannot be used ({str(error).splitlines()[0]}); try --device cpu") from None
    config = load_config(name)
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    resolved, auto_class = resolve_dtype(dtype, device), auto_class or auto_class_of(config)
    _check_held(name, config, auto_class)
    place, revision = located(name)
    options = {"revision": revision, "trust_remote_code": False, "ignore_mismatched_sizes": True}
    with explained(name), _silent_report():
        spread = {} if fits(config, resolved, device, auto_class) else {"device_map": "auto"}
        if quantization(config.to_dict()) and not spread:
            spread = {"device_map": {"": device}}  # what a quantizer packs cannot be moved afterwards
        model, report = auto_class.from_pretrained(
            place, config=config, dtype=resolved, output_loading_info=True, **options, **spread
        )
    # transformers only warns of tensors that it could not find or fit, and fills them with random numbers.
    broken = sorted({*report["missing_keys"], *(each[0] for each in report["mismatched_keys"])})
    if broken:
        raise UserError(
            f"the weights of {name!r} do not fit its config, a {type(model).__name__} ({len(broken)} tensors, the "
            f"first {broken[0]}); copy or download the model again"
        )
    if unused := sorted(report["unexpected_keys"]):
        say_once(
            f"warning: {name} has {len(unused)} tensors that its config has no place for, the first {unused[0]}; "
            "they are left out"
        )
    return (model if spread else model.to(device)).eval()


@contextlib.contextmanager
def _silent_report() -> Iterator[None]:
    """Without transformers' table of tensors that do not fit: they are refused in one sentence."""
    log = logging.getLogger("transformers.modeling_utils")

    def is_other(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    log.addFilter(is_other)
    try:
        yield
    finally:
        log.removeFilter(is_other)


def load_model(name: str, device: str | None = None, dtype: str = "auto") -> LoadedModel:
    """Load a causal LM as `load_weights` does, with its tokenizer and geometry."""
    tokenizer = load_tokenizer(name)
    model = load_weights(name, device, dtype)
    return LoadedModel(name, model, tokenizer, read_geometry(model))


def describe_model(name: str) -> LoadedModel:
    """A model without its weights: its tokenizer and configs say what it is asked, and where its answers end."""
    model = _without_weights(name)
    place, revision = located(name)
    with contextlib.suppress(OSError):  # without the file, the config says it
        model.generation_config = GenerationConfig.from_pretrained(place, revision=revision)
    return LoadedModel(name, model, load_tokenizer(name), geometry=None)


def load_judge(name: str) -> LoadedModel:
    """Load a causal LM or a sequence classifier with its tokenizer, whatever its attention."""
    auto_class = AutoModelForSequenceClassification if is_classifier(load_config(name)) else None
    tokenizer = load_tokenizer(name)
    return LoadedModel(name, load_weights(name, auto_class=auto_class), tokenizer, geometry=None)


def count_parameters(config: PreTrainedConfig, auto_class: type) -> int:
    """The parameters of the model that a config describes, tied ones once. None is built in memory."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in auto_class.from_config(config).parameters())


def _check_held(name: str, config: PreTrainedConfig, auto_class: type) -> None:
    """Raise UserError if a local model's weight files are too small for what its config describes.

    transformers would first fill what is missing with random numbers, in however much memory that takes. Quantized
    weights may take less than a byte.
    """
    files = (
        [file for kind in ("*.safetensors", "*.bin") for file in Path(name).glob(kind)] if Path(name).is_dir() else []
    )
    held = sum(file.stat().st_size for file in files)
    if held and not hasattr(config, "quantization_config"):
        with explained(name):
            described = count_parameters(config, auto_class)
        if described > held:
            raise UserError(
                f"the weights of {name!r} do not fit its config ({described:,} parameters in {held:,} bytes); "
                "copy or download the model again"
            )


def fits(
    config: PreTrainedConfig, dtype: torch.dtype | str, device: str, auto_class: type = AutoModelForCausalLM
) -> bool:
    """Whether a GPU's free memory holds the model's weights and a tenth more. Always True for a CPU, which can swap."""
    if torch.device(device).type != "cuda":
        return True
    n_parameters = count_parameters(config, auto_class)
    stored = (config.dtype or torch.float32) if dtype == "auto" else dtype
    return n_parameters * stored.itemsize * 1.1 < torch.cuda.mem_get_info(device)[0]
