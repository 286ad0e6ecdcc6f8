"""Tensors in weight files (safetensors, or torch's pickles): where each one lies, reading one, writing many.

No file is loaded whole.
"""

import json
import pickle
import struct
import warnings
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor

from soteria import disk
from soteria.errors import UserError
from soteria.storage import files

SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
UNQUANTIZED = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
PIECE = 2**24  # values converted and written at once
Wrote = Callable[[int], object]  # is called with a number of bytes once they are written


@dataclass(frozen=True)
class Place:
    """Where a tensor lies: bytes `[start, end)` of `file`, row-major, in `dtype` and `shape`.

    `dtype` is None if torch or safetensors does not have it, or the tensor is not a plain one. For a pickle, `mapped`
    is the tensor itself, mapped into memory.
    """

    file: Path
    key: str
    dtype: torch.dtype | None
    shape: tuple[int, ...]
    start: int = 0
    end: int = 0
    mapped: Tensor | None = None


@dataclass(frozen=True)
class Planned:
    """A tensor to write, computed when its turn comes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    compute: Callable[[], Tensor]

    @property
    def n_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def read_places(file: Path) -> dict[str, Place]:
    """The place of each tensor in a weight file, by key. Raises UserError for a broken file."""
    return _pickled_places(file) if file.suffix == ".bin" else _safetensors_places(file)


def _safetensors_places(file: Path) -> dict[str, Place]:
    try:
        with safe_open(file, framework="pt"):  # checks the header against the file's size
            pass
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = disk.parse_json(stream.read(length), str(file), strict=False)
    except (OSError, SafetensorError, ValueError, struct.error) as error:
        raise UserError(f"{file} is not a valid safetensors file ({error}); copy or download it again") from None
    header.pop("__metadata__", None)
    places = {}
    for key, entry in header.items():
        start, end = (8 + length + offset for offset in entry["data_offsets"])
        places[key] = Place(file, key, SAFETENSORS_DTYPES.get(entry["dtype"]), tuple(entry["shape"]), start, end)
    return places


def _pickled_places(file: Path) -> dict[str, Place]:
    try:
        tensors = torch.load(file, weights_only=True, mmap=True, map_location="cpu")
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError) as error:
        kind = type(error).__name__
        raise UserError(f"{file} cannot be read safely ({kind}); save the model as safetensors first") from None
    if not isinstance(tensors, Mapping) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise UserError(f"{file} does not hold tensors by name; give a model's weights")
    return {str(key): _pickled_place(file, str(key), tensor) for key, tensor in tensors.items()}


def _pickled_place(file: Path, key: str, tensor: Tensor) -> Place:
    is_plain = not (tensor.is_nested or tensor.is_meta or tensor.is_conj() or tensor.is_neg())
    if is_plain and tensor.layout == torch.strided and tensor.dtype in SAFETENSORS_DTYPES.values():
        return Place(file, key, tensor.dtype, tuple(tensor.shape), mapped=tensor.detach())
    return Place(file, key, None, () if tensor.is_nested else tuple(tensor.shape))


def read_tensor(place: Place) -> Tensor:
    """One tensor, in its own dtype, mapped from its file: only what is used of it takes memory."""
    if place.mapped is not None:
        return place.mapped
    with safe_open(place.file, framework="pt") as reader:
        return reader.get_tensor(place.key)


def file_hash(path: Path) -> str:
    """A hash of all bytes of a file, XXH3 of 128 bits: not against forgers, but as fast as reading."""
    digest, piece = xxhash.xxh3_128(), bytearray(2**20)
    with path.open("rb", buffering=0) as file:
        while n_bytes := file.readinto(piece):
            digest.update(memoryview(piece)[:n_bytes])
    return digest.hexdigest()


def tensor_bytes(tensor: Tensor) -> memoryview:
    """A tensor's bytes as safetensors stores them, without a copy if the tensor is contiguous."""
    return tensor.contiguous().view(torch.uint8).numpy().data


def replace_tensor(place: Place, tensor: Tensor) -> None:
    """Replace a tensor in its safetensors file by another of the same dtype and shape."""
    with place.file.open("r+b") as file:
        file.seek(place.start)
        file.write(tensor_bytes(tensor))


def all_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity. The sum, tried first, is several times faster to check."""
    return bool(tensor.sum(dtype=torch.float32).isfinite()) or bool(tensor.isfinite().all())


def write_tensors(tensors: Mapping[str, Planned], file: Path, wrote: Wrote = lambda n_bytes: None) -> None:
    """Write a safetensors file, one tensor in memory at a time, converted to its new dtype piece by piece.

    Calls `wrote` with the size of each piece. Raises UserError for values that overflow the new dtype.
    """
    names = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
    # In safetensors' own order, which keeps every tensor aligned: widest dtype first.
    planned = dict(sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])))
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for key, tensor in planned.items():
        start, end = end, end + tensor.n_bytes
        header[key] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for key, tensor in planned.items():
            for piece in tensor.compute().reshape(-1).split(PIECE):
                written = piece.to(tensor.dtype)
                if tensor.dtype != piece.dtype and bool((written.isinf() & piece.isfinite()).any()):
                    dtype = str(tensor.dtype).removeprefix("torch.")
                    raise UserError(f"{key} is too large for {dtype}; give another --dtype")
                stream.write(tensor_bytes(written))
                wrote(written.nbytes)


def load_tensor(path: Path, *, mapped: bool = False) -> Tensor:
    """Load what `save_tensor` saved, without running code from the file; `mapped`: only what is used of it is read.

    Raises UserError where that is impossible.
    """
    disk.regular_file(path, f"no file {path}; run step 1 (compute_indirect_effect.py) first")
    try:
        with warnings.catch_warnings(action="ignore"):  # of what is refused below
            tensor = torch.load(path, weights_only=True, map_location="cpu", mmap=mapped)
        is_whole = mapped or _is_whole(path)
    except Exception as error:  # torch raises many kinds for a broken file
        raise UserError(f"{path} is not a tensor file that can be loaded safely ({type(error).__name__})") from None
    if not is_whole:
        raise UserError(f"{path} has other bytes than were written, so it is damaged; run again what made it")
    if not isinstance(tensor, Tensor):
        raise UserError(f"{path} does not hold one tensor")
    is_dense = tensor.layout == torch.strided and not tensor.is_nested and not tensor.is_quantized
    # A tensor on no device, or one that repeats a few numbers, may claim any size.
    if not is_dense or tensor.device.type != "cpu" or tensor.nbytes > path.stat().st_size:
        raise UserError(f"{path} does not hold all numbers of one dense tensor; delete it and run step 1 again")
    return tensor.detach()


def _is_whole(path: Path) -> bool:
    """Whether all parts of what torch saved have the sums that were saved with them, which torch does not compare."""
    if not zipfile.is_zipfile(path):  # as torch saved before 1.6
        return True
    with zipfile.ZipFile(path) as parts:
        return parts.testzip() is None


def save_tensor(tensor: Tensor, path: Path) -> None:
    """Save a tensor, whole or not at all; the same tensor gives the same bytes.

    It goes through an open file because torch writes the name of a path, here a random one, into what it saves.
    """
    with files.whole_file(path) as sibling, sibling.open("wb") as file:
        torch.save(tensor, file)
