"""Tensors in files: where each one lies, reading one, writing many. Nothing is loaded whole.

Knows safetensors files and torch's pickles; knows nothing of models.
"""

import json
import pickle
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from soteria.errors import UserError

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
UNQUANTISED = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
PIECE = 2**24  # values converted and written at once


@dataclass(frozen=True)
class Place:
    """Where a tensor's bytes lie: `[start, end)` of `file`, row-major, in `dtype` and `shape`.

    `dtype` is None for one that torch does not have. Of a pickle, `mapped` is the tensor itself, mapped into memory.
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
    """A tensor that is to be written, computed when its turn comes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    compute: Callable[[], Tensor]

    @property
    def n_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def read_places(file: Path) -> dict[str, Place]:
    """Where each tensor of a weight file lies. Raises UserError for a broken file."""
    return _pickled_places(file) if file.suffix == ".bin" else _safetensors_places(file)


def _safetensors_places(file: Path) -> dict[str, Place]:
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
            SAFETENSORS_DTYPES.get(entry["dtype"]),
            tuple(entry["shape"]),
            8 + length + entry["data_offsets"][0],
            8 + length + entry["data_offsets"][1],
        )
        for key, entry in header.items()
    }


def _pickled_places(file: Path) -> dict[str, Place]:
    try:
        tensors = torch.load(file, weights_only=True, mmap=True, map_location="cpu")
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError) as error:
        raise UserError(
            f"{file} is no weight file that can be read safely ({type(error).__name__}); "
            "save the model as safetensors first"
        ) from None
    if not isinstance(tensors, Mapping) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise UserError(f"{file} holds something else than tensors by name")
    return {str(key): Place(file, str(key), t.dtype, tuple(t.shape), mapped=t) for key, t in tensors.items()}


def read_tensor(place: Place) -> Tensor:
    """One tensor, in its own dtype, mapped from its file: only what is used of it takes memory."""
    if place.mapped is not None:
        return place.mapped
    with safe_open(place.file, framework="pt") as reader:
        return reader.get_tensor(place.key)


def tensor_bytes(tensor: Tensor) -> memoryview:
    """A tensor's bytes as safetensors stores them, not copied where it is contiguous."""
    return tensor.contiguous().view(torch.uint8).numpy().data


def all_finite(tensor: Tensor) -> bool:
    """Whether there is neither NaN nor infinity. A sum is several times faster than a look at every value."""
    return bool(tensor.sum(dtype=torch.float32).isfinite()) or bool(tensor.isfinite().all())


def write_tensors(
    tensors: Mapping[str, Planned], file: Path, wrote: Callable[[int], object] = lambda n_bytes: None
) -> None:
    """Write a safetensors file, one tensor in memory at a time and of that a piece at a time in its new dtype.

    `wrote` is told of the bytes as they go. Raises UserError for values that are finite only in their old dtype.
    """
    names = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
    # As safetensors itself orders them: widest dtype first keeps every tensor aligned.
    order = sorted(tensors, key=lambda key: (-tensors[key].dtype.itemsize, key))
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for key in order:
        start, end = end, end + tensors[key].n_bytes
        header[key] = {
            "dtype": names[tensors[key].dtype],
            "shape": list(tensors[key].shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for key in order:
            for piece in tensors[key].compute().reshape(-1).split(PIECE):
                written = piece.to(tensors[key].dtype)
                if written.is_floating_point() and written.dtype != piece.dtype and _overflows(piece, written):
                    dtype = str(written.dtype).removeprefix("torch.")
                    raise UserError(f"{key} is too large for {dtype}; give another --dtype")
                stream.write(tensor_bytes(written))
                wrote(written.nbytes)


def _overflows(before: Tensor, after: Tensor) -> bool:
    return bool((after.isinf() & before.isfinite()).any())
