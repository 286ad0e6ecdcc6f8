"""Checkpoints on disk: which file holds a tensor, and where in it. Nothing is loaded whole.

Knows safetensors files and folders; knows nothing of attention heads.
"""

import json
import shutil
import struct
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from soteria import files
from soteria.errors import UserError

SAFETENSORS_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ADAPTER = "adapter_model.safetensors"
# What a copy of a model folder leaves out: weights in other formats and the hub's own bookkeeping.
NOT_COPIED = ("*.bin", "*.bin.index.json", "*.pth", "*.pt", "*.gguf", "*.h5", "*.msgpack", "*.onnx", ".*", "original")


def local_folder(name: str) -> Path:
    """The folder of a model, downloaded from the hub where `name` is an id. Raises UserError where there is none."""
    folder = Path(name)
    if folder.is_dir():
        return folder
    try:
        return Path(snapshot_download(name, ignore_patterns=list(NOT_COPIED)))
    except (OSError, HFValidationError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{name!r} is no local folder and cannot be had from the hub ({reason})") from None


@dataclass(frozen=True)
class Place:
    """Where a tensor's bytes lie: `[start, end)` of `file`, row-major, in `dtype` and `shape`."""

    file: Path
    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Checkpoint:
    """A folder with `config.json` and safetensors weights, in one file or in shards, or a LoRA adapter's folder."""

    name: str
    folder: Path

    @classmethod
    def open(cls, name: str) -> "Checkpoint":
        """Raises UserError for a folder that holds no readable safetensors weights."""
        checkpoint = cls(name, local_folder(name))
        _ = checkpoint.places
        return checkpoint

    @property
    def is_adapter(self) -> bool:
        return (self.folder / "adapter_config.json").exists()

    @cached_property
    def config(self) -> dict:
        config = files.read_json(self.folder / "config.json")
        if not isinstance(config, dict):
            raise UserError(f"{self.folder} has no readable config.json; is it a model folder?")
        return config

    @cached_property
    def weight_files(self) -> list[Path]:
        index = self.folder / INDEX
        if self.is_adapter:
            names = [ADAPTER]
        elif index.exists() and not (self.folder / SINGLE).exists():  # of the two, transformers loads the single file
            found = files.read_json(index)
            shards = found.get("weight_map") if isinstance(found, dict) else None
            if not isinstance(shards, dict) or not shards:
                raise UserError(f"{index} is no readable index of shards")
            names = sorted(set(map(str, shards.values())))
        else:
            names = [SINGLE]
        for name in names:
            if Path(name).name != name:
                raise UserError(f"{index} names {name!r}, which is no file beside it")
            if not (self.folder / name).is_file():
                raise UserError(f"{self.folder} has no {name}; save the model as safetensors first")
        return [self.folder / name for name in names]

    @cached_property
    def places(self) -> dict[str, Place]:
        """Every tensor of the checkpoint by its key."""
        return {key: place for file in self.weight_files for key, place in read_places(file).items()}

    def copy_to(self, folder: Path) -> None:
        """Copy the model into an existing folder: the weights that transformers would load, and no others."""
        weights = {file.name for file in self.weight_files}
        kept = weights if weights == {SINGLE} else weights | {INDEX}

        def ignore(at: str, names: list[str]) -> set[str]:
            others = {name for name in names if name.endswith((".safetensors", ".safetensors.index.json"))} - kept
            return shutil.ignore_patterns(*NOT_COPIED)(at, names) | (others if Path(at) == self.folder else set())

        mode = folder.stat().st_mode
        # Contents only: a model store is often read-only, and the copy is to be written to.
        shutil.copytree(self.folder, folder, dirs_exist_ok=True, ignore=ignore, copy_function=shutil.copyfile)
        folder.chmod(mode)

    def find(self, name: str) -> Place:
        """The tensor of a parameter, whatever prefix the checkpoint's keys have or lack.

        Raises UserError where no key, or more than one, fits.
        """
        fits = [
            place
            for key, place in self.places.items()
            if key == name or key.endswith("." + name) or name.endswith("." + key)
        ]
        if len(fits) != 1:
            raise UserError(f"{self.name!r} has {len(fits)} tensors for {name}, needed is one")
        return fits[0]


def read_places(file: Path) -> dict[str, Place]:
    """Where each tensor of a safetensors file lies, from its header. Raises UserError for a broken file."""
    try:
        with safe_open(file, framework="pt"):  # checks the header against the file's size
            pass
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length))
    except (OSError, SafetensorError, ValueError, struct.error) as error:
        raise UserError(f"{file} is no sound safetensors file ({error})") from None
    header.pop("__metadata__", None)
    return {
        key: Place(
            file,
            key,
            SAFETENSORS_DTYPES.get(entry["dtype"], torch.uint8),
            tuple(entry["shape"]),
            8 + length + entry["data_offsets"][0],
            8 + length + entry["data_offsets"][1],
        )
        for key, entry in header.items()
    }


def read_tensor(place: Place) -> Tensor:
    """One tensor, in its own dtype."""
    with safe_open(place.file, framework="pt") as reader:
        return reader.get_tensor(place.key)


def tensor_bytes(tensor: Tensor) -> bytes:
    """A tensor's bytes as safetensors stores them."""
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()
