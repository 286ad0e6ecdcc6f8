"""Files and folders that appear whole or not at all, locks on them, and JSON files."""

import glob
import json
import os
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import lock_descriptor

from soteria import disk
from soteria.errors import UserError

LONGEST = 240  # bytes in a file's name, beside which its temporary sibling has 14 more


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary sibling to write to. It is renamed to `path` if the block succeeds, and removed otherwise."""
    with _sibling(path, Path.touch) as sibling:
        yield sibling
        sibling.replace(path)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A temporary sibling folder to fill. It replaces `path` if the block succeeds, and is removed otherwise."""
    with _sibling(path, Path.mkdir) as sibling:
        yield sibling
        old = _temporary_name(path)
        if path.exists():
            path.rename(old)  # a folder that is being removed would look like a whole one
        sibling.rename(path)
        _remove(old)


@contextmanager
def _sibling(path: Path, create: Callable[[Path], object]) -> Iterator[Path]:
    """A temporary file or folder beside `path`, locked while the block runs.

    Those that killed processes left are removed first: nobody holds their locks.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        with suppress(FileNotFoundError), locked(left) as is_ours:  # another process may be removing it too
            if is_ours:
                _remove(left)
    sibling = _temporary_name(path)
    create(sibling)
    with locked(sibling):
        try:
            yield sibling
        finally:
            _remove(sibling)


def _temporary_name(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def _remove(place: Path) -> None:
    if place.is_dir():
        shutil.rmtree(place, ignore_errors=True)
    else:
        place.unlink(missing_ok=True)


@contextmanager
def locked(place: Path) -> Iterator[bool]:
    """Lock a file or folder itself while the block runs; no lock file is written. The system unlocks it for a killed
    process. False if another process holds the lock, or the file system has no locks.
    """
    descriptor = os.open(place, os.O_RDONLY)
    try:
        is_ours = False
        with suppress(OSError):
            is_ours = lock_descriptor(descriptor, blocking=False)
        yield is_ours
    finally:
        os.close(descriptor)


def wait_for_lock(descriptor: int, place: Path) -> None:
    """Lock an open file or folder until it is closed, after saying so on stderr if another process holds the lock."""
    with suppress(OSError):  # a file system without locks
        if not lock_descriptor(descriptor, blocking=False):
            print(f"waiting for another process that is writing {place}", file=sys.stderr)
            lock_descriptor(descriptor)


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Make a folder and lock it while the block runs, waiting for another process that holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        wait_for_lock(descriptor, folder)
        yield
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text, whole or not at all."""
    with whole_file(path) as sibling:
        sibling.write_bytes(text.encode("utf-8"))


def write_json(path: Path, value: object) -> None:
    """Write JSON for people to read: indented, not escaped to ASCII, with a newline at the end."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> object | None:
    """The JSON value in a file that a program wrote, or None if the file is missing or broken."""
    try:
        return disk.load_json(path, strict=False)
    except UserError:
        return None


def read_json_lines(path: Path) -> list[dict]:
    """The JSON objects that a file has, one a line, none if it is missing. A broken line is left out."""
    found = []
    for line in disk.read_text(path).splitlines() if path.exists() else []:
        with suppress(UserError):
            found.append(disk.parse_json(line, str(path), strict=False))
    return [each for each in found if isinstance(each, dict)]


def read_facts(path: Path) -> dict:
    """The JSON object in a file, or an empty one if the file is missing, broken or holds something else."""
    found = read_json(path)
    return found if isinstance(found, dict) else {}


def check_room(folder: Path, needed: int) -> None:
    """Raise UserError if the disk of a folder has less than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{folder.parent} has {free / 1e9:.2f} GB free but {needed / 1e9:.2f} GB are needed; "
            "free some space or give another --output"
        )
