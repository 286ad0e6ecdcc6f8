"""GGUF files as models: each is read through transformers once and written as an ordinary folder in float32.

The folder lies below the results and is used again for as long as the file is the same.
"""

import importlib.util
import sys
from pathlib import Path

import torch

from soteria.errors import UserError, said
from soteria.models.tensors import file_hash
from soteria.storage import files, paths


def gguf_file(path: Path) -> Path | None:
    """The GGUF file that a path means: itself, or the only one in a folder without other weights; None for neither."""
    if path.suffix == ".gguf" and not path.is_dir():
        if not path.is_file():
            raise UserError(f"no file {path}; give a GGUF file, a model folder or a hub id")
        return path
    found = sorted(path.glob("*.gguf")) if path.is_dir() else []
    if not found or any(path.glob("*.safetensors")) or any(path.glob("pytorch_model*.bin")):
        return None
    if len(found) > 1:
        raise UserError(f"{path} has {len(found)} GGUF files and no other weights; give one of them: {found[0]}, …")
    return found[0]


def unpacked(gguf: Path) -> Path:
    """The folder of a GGUF file's model, made if it is not there. Raises UserError for a file that cannot be read."""
    folder = paths.unpacked_folder(paths.RESULTS, gguf)
    facts = {"gguf": gguf.name, "xxh3": file_hash(gguf)}
    if _was_made(folder, facts):
        return folder
    with files.held(folder.parent):
        if not _was_made(folder, facts):  # by the process that was waited for
            unpack(gguf, folder, facts)
    return folder


def _was_made(folder: Path, facts: dict) -> bool:
    """Whether a folder is that of these facts. Raises UserError for another one, which is not replaced."""
    found = files.read_facts(folder / paths.FACTS)
    if folder.exists() and "gguf" not in found:
        raise UserError(f"{folder} is needed for the model of {facts['gguf']}, but holds something else; move it")
    return found == facts | {"weights": _weights(folder)}


def _weights(folder: Path) -> dict[str, str]:
    """The hashes of a folder's weight files."""
    return {path.name: file_hash(path) for path in sorted(folder.glob("*.safetensors"))}


def unpack(gguf: Path, output: Path, facts: dict | None = None) -> int:
    """Write the model of a GGUF file as a folder, whole or not at all; returns its number of parameters."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    if importlib.util.find_spec("gguf") is None:
        raise UserError(f"{gguf} needs the package gguf; pip install gguf")
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    print(f"unpacking {gguf} into {output}", file=sys.stderr)
    try:
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    except Exception as error:  # transformers and the reader raise many kinds for a broken file
        raise UserError(
            f"the model in {gguf} could not be read ({said(error)}); download it again, or give another"
        ) from error
    # The weights are plain numbers now: without its quantizer's marks, transformers saves and loads them as such.
    del model.config.quantization_config
    model.is_quantized = False
    model.hf_quantizer = None
    with files.whole_folder(output) as folder:
        files.check_room(folder, 4 * model.num_parameters())
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        if facts:
            files.write_json(folder / paths.FACTS, facts | {"weights": _weights(folder)})
    return model.num_parameters()
