"""Where a model lies that is named by a folder, a GGUF file or a hub id, and what it means when it cannot be loaded."""

import contextlib
import importlib.util
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import transformers
from huggingface_hub import constants, get_session, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import validate_repo_id
from transformers import CONFIG_MAPPING, PreTrainedConfig

from soteria import disk
from soteria.errors import UserError, said
from soteria.storage import files

# Endings of the files beside the weights that define how text is tokenized and when an answer ends.
SMALL_FILES = (".json", ".jinja", ".model", ".txt")
ADAPTER_CONFIG = "adapter_config.json"
PROBE_SECONDS = 5  # how long to wait for the hub to answer at all
SENTENCEPIECE = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
# Where quantizers list the modules that they leave as they were.
LEFT_ALONE = ("modules_to_not_convert", "llm_int8_skip_modules", "ignore")


@cache
def hub_answers() -> bool:
    """Whether the hub can be reached. If not, only its cache is used from here on: each file would be tried for
    minutes."""
    if not constants.HF_HUB_OFFLINE:
        try:
            get_session().head(constants.ENDPOINT, timeout=PROBE_SECONDS)
        except Exception:  # no name, no route, a proxy's refusal, a timeout
            constants.HF_HUB_OFFLINE = True
    return not constants.HF_HUB_OFFLINE


def located(name: str) -> tuple[str, str | None]:
    """What transformers takes for a model's name: (folder, None), or (hub id, revision).

    A GGUF file is unpacked into a folder first. Raises UserError for a name that cannot be any of these, and, while the
    hub cannot be reached, for a hub id that is not in its cache.
    """
    from soteria.models.gguf import gguf_file, unpacked

    if gguf := gguf_file(Path(name)):
        return str(unpacked(gguf)), None
    if Path(name).is_dir():
        return name, None
    model, _, revision = name.partition("@")
    try:
        validate_repo_id(model)
    except HFValidationError:
        raise UserError(f"{name!r} is not a local folder, nor can it be a hub id; check the path") from None
    cached = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=model, repo_type="model")
    if not hub_answers() and not cached.is_dir():
        raise UserError(
            f"{name!r} is not a local folder, nor in the hub's cache, and {constants.ENDPOINT} cannot be reached; "
            "check the path or the network"
        )
    return model, revision or None


@contextlib.contextmanager
def explained(name: str, part: str = "model") -> Iterator[None]:
    """Turn whatever transformers raises while it loads a model into a UserError, naming the model's architecture.

    `part` is what is loaded of it: the model or the tokenizer.
    """
    own = [path for path in Path(name).iterdir() if path.suffix in SMALL_FILES] if Path(name).is_dir() else []
    for path in own:
        disk.regular_file(path)
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # transformers raises many kinds for a broken config
        for path in own:
            if path.suffix == ".json":
                disk.load_json(path, strict=False)  # this says which of them is broken
        raise UserError(_why_not_loaded(name, part, error)) from error


def _why_not_loaded(name: str, part: str, error: Exception) -> str:
    place, revision = located(name)
    reason, config = said(error), raw_config(place, revision)
    if is_adapter(place) and not config:
        return no_model(name)
    if not config.get("model_type"):
        if Path(place).is_dir():
            return f"{name!r} has no readable config.json with a model_type; give a whole model folder"
        return f"the model {name!r} could not be loaded from the hub ({reason}); check its name and revision"
    kind = str(config["model_type"])
    what = f"the model {name!r} ({', '.join(map(str, config.get('architectures') or [])) or kind})"
    if "custom code" in reason or (kind not in CONFIG_MAPPING and "auto_map" in config):
        return f"{what} needs code that comes with it, which is never run here; give a model that transformers has"
    if kind not in CONFIG_MAPPING:
        newer = "install a version that has it, or give another model"
        return f"{what} is of type {kind!r}, which transformers {transformers.__version__} does not have; {newer}"
    if part == "tokenizer":
        if package := _missing_package(place, revision):
            return f"{what} has a tokenizer that needs the package {package}; pip install {package}"
        if "instantiate the backend" in reason:
            reason = "it has no tokenizer.json, nor another vocabulary that transformers knows"
        return f"{what} has a tokenizer that could not be loaded ({reason}); copy or download the model again"
    if isinstance(error, MemoryError) or "out of memory" in reason:
        return f"{what} does not fit in the memory ({reason}); use a smaller --dtype or model"
    if method := quantization(config):
        fix = "install what it needs, or give the unquantized model"
        return f"{what} is quantized by {method} and could not be loaded here ({reason}); {fix}"
    return f"{what} could not be loaded ({reason}); check its config.json, or copy or download it again"


def raw_config(place: str, revision: str | None = None) -> dict:
    """A model's config.json, empty where there is none."""
    if Path(place).is_dir():
        return files.read_facts(Path(place) / "config.json")
    try:
        return PreTrainedConfig.get_config_dict(place, revision=revision)[0]
    except Exception:  # the reason is known by the error that is being explained
        return {}


def is_adapter(folder: str | Path) -> bool:
    """Whether a folder holds a LoRA adapter."""
    return (Path(folder) / ADAPTER_CONFIG).exists()


def no_model(name: str) -> str:
    """The sentence for an adapter in the place of a model."""
    return f"{name!r} is a LoRA adapter, not a model; give its base, or merge it into that and give the result"


def _missing_package(place: str, revision: str | None) -> str | None:
    """The package that the tokenizer needs and that is not installed: transformers names another one."""
    for file in SENTENCEPIECE:
        path = Path(place) / file if Path(place).is_dir() else try_to_load_from_cache(place, file, revision=revision)
        if isinstance(path, str | Path) and Path(path).is_file():
            with Path(path).open("rb") as stream:
                is_sentencepiece = stream.read(1) == b"\n"  # tiktoken's files of this name are text
            packages = {"sentencepiece": "sentencepiece", "google.protobuf": "protobuf"}
            return next((name for module, name in packages.items() if is_sentencepiece and not _has(module)), None)
    return None


def _has(module: str) -> bool:
    with contextlib.suppress(ModuleNotFoundError):
        return importlib.util.find_spec(module) is not None
    return False


def quantization(config: dict) -> str | None:
    """How a checkpoint is quantized, by its config; None for one that is not."""
    found = _quantizer(config)
    bits = " 8-bit" if found.get("load_in_8bit") else " 4-bit" if found.get("load_in_4bit") else ""
    method = found.get("quant_method") or ("bitsandbytes" if bits else "an unknown method")
    return f"{method}{bits}" if found else None


def left_unquantized(config: dict, modules: tuple[str, ...]) -> bool:
    """Whether a quantized checkpoint's config says that these modules are not quantized (as gpt-oss's attention)."""
    from transformers.quantizers.quantizers_utils import should_convert_module

    found = _quantizer(config)
    skipped = [str(each).removeprefix("re:") for key in LEFT_ALONE for each in found.get(key) or []]
    with contextlib.suppress(re.error):
        return bool(skipped) and not any(should_convert_module(name, skipped) for name in modules)
    return False


def _quantizer(config: dict) -> dict:
    parts = [part for part in (config, config.get("text_config")) if isinstance(part, dict)]
    found = [part.get(key) for part in parts for key in ("quantization_config", "compression_config")]
    return next((each for each in found if isinstance(each, dict)), {})
