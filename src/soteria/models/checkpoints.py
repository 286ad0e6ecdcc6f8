"""Checkpoints: finding the files of a model or adapter in a folder or on the hub, and copying a model."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
from huggingface_hub import snapshot_download

from soteria import disk
from soteria.errors import UserError, said
from soteria.models.loading import load_geometry, parameter_names
from soteria.models.sources import (
    ADAPTER_CONFIG,
    SMALL_FILES,
    is_adapter,
    left_unquantized,
    located,
    no_model,
    quantization,
    raw_config,
)
from soteria.models.tensors import Place, Planned, Wrote, file_hash, read_places, read_tensor, write_tensors
from soteria.storage import files
from soteria.storage.paths import FACTS

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# A model's weights as (single file, index of shards), in the order in which transformers looks for them.
LAYOUTS = ((SINGLE, INDEX), ("pytorch_model.bin", "pytorch_model.bin.index.json"))
ADAPTER_LAYOUTS = (("adapter_model.safetensors", None), ("adapter_model.bin", None))
# What else a model folder may hold: the weights in other formats, and the hub's own files.
NOT_COPIED = (
    *("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pth", "*.pt", "*.gguf", "*.h5"),
    *("*.msgpack", "*.onnx", ".*", "original"),
)
_not_copied = shutil.ignore_patterns(*NOT_COPIED)
COPY_PIECE = 2**30  # bytes


def _download(name: str, revision: str | None = None, **patterns: list[str]) -> Path:
    """The folder in the hub's cache, named for its revision, with the files that match the patterns."""
    try:
        return Path(snapshot_download(name, revision=revision, **patterns))
    except (OSError, ValueError) as error:
        asked = f"{name}@{revision}" if revision else name
        raise UserError(
            f"{asked!r} is not a local folder, and could not be downloaded from the hub ({said(error)}); check it"
        ) from None


def is_parameter(key: str, name: str) -> bool:
    """Whether a key of a checkpoint names a parameter, with or without a prefix."""
    return key == name or key.endswith("." + name) or name.endswith("." + key)


@dataclass(frozen=True)
class Checkpoint:
    """A folder with weights, in one file or in shards: a model's with its `config.json`, or a LoRA adapter's."""

    name: str
    folder: Path
    revision: str | None  # on the hub; None for a local folder
    weight_files: tuple[Path, ...]

    @classmethod
    def open(
        cls, name: str, parameters: Sequence[str] | None = None, *, whole: bool = False, to_steer: bool = False
    ) -> "Checkpoint":
        """Find a checkpoint by local folder, GGUF file or hub id, and download what is needed of the last.

        That is all but other formats of the weights. If `parameters` are named, only the shards with those are
        downloaded. Raises UserError if there are no readable weights, for an adapter if a `whole` model is wanted, and
        for quantized output projections if it is `to_steer`.
        """
        place, revision = located(name)
        folder = Path(place)
        is_local = folder.is_dir()
        if not is_local:
            others = [pattern for pattern in NOT_COPIED if not pattern.endswith(".index.json")]
            folder = _download(place, revision, ignore_patterns=others)
            revision = folder.name
        if whole and is_adapter(folder):
            raise UserError(no_model(name))
        if to_steer:
            _check_unquantized(name, folder)
        if is_local:
            if (folder / "config.json").exists() or is_adapter(folder):  # no model is refused below, unread
                disk.check_tree(folder, NOT_COPIED)
            found = _find_weights(folder, lambda names: None)
        else:
            found = _find_weights(folder, lambda names: _download(place, revision, allow_patterns=names), parameters)
        checkpoint = cls(name, folder, revision, found)
        _ = checkpoint.places  # raises UserError for broken files
        return checkpoint

    @property
    def is_adapter(self) -> bool:
        return is_adapter(self.folder)

    @cached_property
    def config(self) -> dict:
        path = self.folder / (ADAPTER_CONFIG if self.is_adapter else "config.json")
        config = disk.load_json(path, f"{self.folder} has no {path.name}; give a whole model folder", strict=False)
        if not isinstance(config, dict):
            raise UserError(f"{self.folder} has no readable {path.name}; give a whole model folder")
        return config

    @cached_property
    def places(self) -> dict[str, Place]:
        """Every tensor of the weight files, by its key."""
        return {key: place for file in self.weight_files for key, place in read_places(file).items()}

    def find(self, name: str) -> Place:
        """The place of a parameter, whose key may have or lack a prefix, or be another that transformers renames to it.

        Raises UserError unless exactly one fits.
        """
        found = [place for key, place in self.places.items() if is_parameter(key, name)]
        if not found and not self.is_adapter and (self.folder / "config.json").exists():
            found = [self.places[key] for key, parameter in self._parameters.items() if parameter == name]
        if len(found) != 1:
            raise UserError(f"{self.name!r} has {len(found)} tensors for {name}, not one; give a whole model")
        return found[0]

    @cached_property
    def _parameters(self) -> dict[str, str]:
        """The parameter that transformers loads each key into."""
        return parameter_names(str(self.folder), self.places)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of all bytes of the weight files, and of an adapter's settings, since those scale its weights.

        It shows when the same name stands for another model.
        """
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode() if self.is_adapter else b"")
        with ThreadPoolExecutor() as threads:
            for path, found in zip(self.weight_files, threads.map(file_hash, self.weight_files), strict=True):
                digest.update(f"{path.name} {found}".encode())
        return digest.hexdigest()

    def copied_bytes(self, dtype: torch.dtype | None = None) -> int:
        """The size of a copy of the weights, floating-point ones in `dtype` if it is given."""
        if dtype is None:
            return sum(file.stat().st_size for file in self.weight_files)
        return sum(torch.Size(p.shape).numel() * _stored_as(p, dtype).itemsize for p in self.places.values())

    def check_links(self) -> None:
        """Raise UserError for a link in the folder that a copy would follow to something else than the model's files.

        Those of the hub's cache lead to its own store of the model's files. Weights may lie anywhere: only tensors are
        read of them.
        """
        allowed = [self.folder.resolve()]
        if allowed[0].parent.name == "snapshots":
            allowed.append(allowed[0].parents[1] / "blobs")
        for folder, names, own in os.walk(self.folder):
            ignored = _not_copied(folder, [*names, *own])
            names[:] = [name for name in names if name not in ignored]
            for link in (Path(folder, name) for name in (*names, *own) if name not in ignored):
                if link.is_symlink() and not (_is_file(link) and any(map(link.resolve().is_relative_to, allowed))):
                    raise UserError(
                        f"{link} is a link that leads out of the model's folder, to a folder or nowhere, and would be "
                        "copied with the model; remove it, or put the file itself there"
                    )

    def copy_to(self, folder: Path, dtype: torch.dtype | None = None, wrote: Wrote = lambda n_bytes: None) -> None:
        """Copy the model into an existing folder, with the weights that transformers would load and no others.

        Weight files are copied unchanged, except that pickles become safetensors and, if `dtype` is given,
        floating-point tensors are converted to it. Raises UserError if the disk has too little room, and as
        `check_links` does.
        """
        self.check_links()
        files.check_room(folder, self.copied_bytes(dtype))
        mode = folder.stat().st_mode
        # Contents only: model stores are often read-only, but a copy must not be.
        names = {"ignore": _not_copied, "copy_function": shutil.copyfile}
        shutil.copytree(self.folder, folder, dirs_exist_ok=True, **names)
        folder.chmod(mode)
        for file in self.weight_files:
            if file.suffix == ".safetensors" and dtype is None:
                copy_file(file, folder / file.name, wrote)
            else:
                planned = {
                    place.key: Planned(_stored_as(place, dtype), place.shape, partial(read_tensor, place))
                    for place in self.places.values()
                    if place.file == file
                }
                write_tensors(planned, folder / _as_safetensors(file.name), wrote)
        if len(self.weight_files) > 1 or self.weight_files[0].name not in (SINGLE, LAYOUTS[1][0]):
            self._write_index(folder, dtype)
        if dtype:
            config = {key: value for key, value in self.config.items() if key != "torch_dtype"}
            files.write_json(folder / "config.json", config | {"dtype": str(dtype).removeprefix("torch.")})

    def _write_index(self, folder: Path, dtype: torch.dtype | None) -> None:
        index = next(self.folder / name for _, name in LAYOUTS if (self.folder / name).exists())
        if index.name == INDEX and dtype is None:
            shutil.copyfile(index, folder / INDEX)
            return
        found = files.read_json(index)
        shards = {key: _as_safetensors(shard) for key, shard in found["weight_map"].items()}
        written = [place for name in {*shards.values()} for place in read_places(folder / name).values()]
        noted = found.get("metadata")
        metadata = (noted if isinstance(noted, dict) else {}) | {
            "total_size": sum(place.end - place.start for place in written)
        }
        files.write_json(folder / INDEX, found | {"metadata": metadata, "weight_map": shards})


def _check_unquantized(name: str, folder: Path) -> None:
    """Raise UserError if the output projections are quantized, by the config alone."""
    config = raw_config(str(folder))
    method = quantization(config)
    if method and not left_unquantized(config, load_geometry(str(folder)).projection_names):
        raise UserError(
            f"{name!r} is quantized by {method}, and only floating-point weights can be steered; give the unquantized "
            "model it was made from"
        )


def model_digest(checkpoint: Checkpoint) -> str:
    """A hash of a model: its weights, and the files that define its config and how text is tokenized and ends."""
    digest = hashlib.sha256(checkpoint.fingerprint.encode())
    for path in small_files(checkpoint):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def small_files(checkpoint: Checkpoint) -> list[Path]:
    """The config and the tokenizer of a model, in the order of their names."""
    found = sorted(checkpoint.folder.iterdir())
    return [path for path in found if path.suffix in SMALL_FILES and path.name != FACTS]


def _find_weights(
    folder: Path, fetch: Callable[[list[str]], object], parameters: Sequence[str] | None = None
) -> tuple[Path, ...]:
    """A checkpoint's weight files, as transformers would choose them, each after `fetch` was called with its name."""
    layouts = ADAPTER_LAYOUTS if is_adapter(folder) else LAYOUTS
    for single, index in layouts:
        fetch([single])
        if (folder / single).is_file():
            return (folder / single,)
        if index and (folder / index).exists():
            names = _shards(folder / index, parameters)
            fetch(names)
            for name in names:
                if not (folder / name).is_file():
                    raise UserError(f"{folder} has no {name}, which {index} names; copy or download the model again")
            return tuple(folder / name for name in names)
    raise UserError(f"{folder} has no {layouts[0][0]} and no other weights; give a whole model folder")


def _shards(index: Path, parameters: Sequence[str] | None) -> list[str]:
    """The shards that an index names, or only those with the given parameters."""
    shards = files.read_facts(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise UserError(f"{index} is not a readable index of shards; copy or download the model again")
    for name in shards.values():
        if not isinstance(name, str) or Path(name).name != name or Path(name).suffix not in (".safetensors", ".bin"):
            raise UserError(f"{index} names {name!r}, which is not a weight file beside it; fix that entry")
    if parameters is not None:
        needed = {key: shard for key, shard in shards.items() if any(is_parameter(key, name) for name in parameters)}
        shards = needed if len(needed) == len(parameters) else shards  # under other names: they may be in any shard
    return sorted({*shards.values()})


def _is_file(link: Path) -> bool:
    try:
        return link.is_file()
    except OSError:  # links in a circle
        return False


def _as_safetensors(name: str) -> str:
    """The name that a weight file gets when it is written as safetensors."""
    return Path(name.replace("pytorch_model", "model")).with_suffix(".safetensors").name


def _stored_as(place: Place, dtype: torch.dtype | None) -> torch.dtype:
    if place.dtype is None:
        raise UserError(
            f"{place.file} stores {place.key} in a form that cannot be copied as a plain tensor; give another model"
        )
    return dtype if dtype and place.dtype.is_floating_point else place.dtype


def copy_file(source: Path, target: Path, wrote: Wrote = lambda n_bytes: None) -> None:
    """Copy a file's contents inside the kernel, which shares the blocks instead if the file system can."""
    with source.open("rb") as reader, target.open("wb") as writer:
        left = source.stat().st_size
        try:
            while left > 0 and (done := os.copy_file_range(reader.fileno(), writer.fileno(), min(left, COPY_PIECE))):
                left -= done
                wrote(done)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise
        if left > 0:  # the kernel does not copy between these file systems
            reader.seek(-left, os.SEEK_END)
            writer.seek(0, os.SEEK_END)
            while piece := reader.read(COPY_PIECE // 64):
                writer.write(piece)
                wrote(len(piece))
