"""Where things lie, and files that appear whole or not at all."""

import fcntl
import glob
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from soteria.errors import UserError


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary sibling to write to; it takes the name `path` when the block ends well, and vanishes otherwise.

    What killed processes left of theirs is removed first: a lock tells it from the file of one that is at work.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_left(path, Path.unlink)
    sibling = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    sibling.touch()
    with _locked(sibling):
        try:
            yield sibling
            sibling.replace(path)
        finally:
            sibling.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text, whole or not at all."""
    with whole_file(path) as sibling:
        sibling.write_bytes(text.encode("utf-8"))


def write_json(path: Path, value: object) -> None:
    """Write JSON for people to read: indented, real characters, a newline at the end."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> object | None:
    """The JSON in a file, or None where the file is missing or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def read_facts(path: Path) -> dict:
    """The JSON object in a file, or an empty one where the file is missing, broken or something else."""
    found = read_json(path)
    return found if isinstance(found, dict) else {}


def check_facts_file(path: Path, key: str) -> None:
    """Raise UserError where the place of a .json of facts, which have `key`, holds something else of the user's."""
    if path.exists() and key not in read_facts(path):
        raise UserError(f"{path} is to hold the facts beside the CSV, but is another file; give another --output")


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A temporary sibling folder to fill; it takes the name `path` when the block ends well, and vanishes otherwise.

    What killed processes left of theirs is removed first: a lock tells it from the folder of one that is at work.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_left(path, partial(shutil.rmtree, ignore_errors=True))
    sibling, old = (path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp") for _ in range(2))
    sibling.mkdir()
    with _locked(sibling):
        try:
            yield sibling
            if path.exists():
                path.rename(old)  # a folder being removed would look like a whole one
            sibling.rename(path)
        finally:
            shutil.rmtree(sibling, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)


def _remove_left(path: Path, remove: Callable[[Path], object]) -> None:
    """Remove the temporary siblings of a path that nobody holds."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        with suppress(FileNotFoundError), _locked(left) as free:  # another process may remove it too
            if free:
                remove(left)


@contextmanager
def _locked(place: Path) -> Iterator[bool]:
    """Hold the lock of a file or folder, which ends with the process at the latest. False where it cannot be had."""
    handle = os.open(place, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = True
        except OSError:  # another process has it, or the file system knows no locks
            held = False
        yield held
    finally:
        os.close(handle)


def check_room(folder: Path, needed: int) -> None:
    """Raise UserError where the disk of a folder has less than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{folder.parent} has {free / 1e9:.2f} GB free, {needed / 1e9:.2f} GB are needed; "
            "make room or give another --output"
        )
