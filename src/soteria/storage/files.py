"""Files and folders that appear whole or not at all, locks on them, and JSON files."""

import errno
import glob
import json
import os
import secrets
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from filelock import lock_descriptor

from soteria import disk
from soteria.errors import UserError

RANDOM_BYTES = 4  # in a temporary name
LONGEST = 240  # bytes in a file's name, to which a temporary name adds 14


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary sibling to write to. It is renamed to `path` if the block succeeds, and removed otherwise."""
    disk.check_output(path, longest=LONGEST)
    with _sibling(path, partial(Path.touch, exist_ok=False)) as sibling:
        yield sibling
        _take_mode(sibling, path)
        sibling.replace(path)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A temporary sibling folder to fill. It replaces `path` if the block succeeds, and is removed otherwise."""
    disk.check_output(path, is_folder=True, longest=LONGEST)
    with _sibling(path, Path.mkdir) as sibling:
        yield sibling
        _take_mode(sibling, path)
        while not _replaced(path, sibling):
            pass


def _replaced(path: Path, sibling: Path) -> bool:
    """Put a folder in the place of another, if there is one; False if another process has put one there meanwhile."""
    old = _temporary_name(path)
    with suppress(FileNotFoundError):
        path.rename(old)  # a folder that is being removed would look like a whole one
    try:
        sibling.rename(path)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        return False
    finally:
        _remove(old)
    return True


@contextmanager
def _sibling(path: Path, create: Callable[[Path], object]) -> Iterator[Path]:
    """A temporary file or folder beside `path`, locked while the block runs. Those left behind are removed first."""
    with made(path.parent):
        remove_left(path.parent, path.name)
        descriptor = None
        while descriptor is None:  # another process may take it for left behind, and remove it before it is locked
            sibling = _temporary_name(path)
            create(sibling)
            descriptor = _locked_in_place(sibling, silent=True)
        try:
            _take_mode(sibling, path, stat.S_IRWXU)  # before there is anything in it to read
            yield sibling
        finally:
            _remove(sibling)
            os.close(descriptor)


@contextmanager
def made(folder: Path) -> Iterator[None]:
    """Make a folder and those above it. Those of them that are empty when the block ends are removed again."""
    new = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        for each in new:
            with suppress(OSError):  # not empty, or never made
                each.rmdir()


def remove_left(folder: Path, name: str = "*") -> None:
    """Remove the temporary files and folders that killed processes left: nobody holds their locks.

    `name`: only of what was to get that name.
    """
    name = name if name == "*" else glob.escape(name)
    for left in folder.glob(f".{name}.{'[0-9a-f]' * 2 * RANDOM_BYTES}.tmp"):
        with suppress(OSError), locked(left) as is_ours:  # another process may be removing it too
            if is_ours:
                _remove(left)


def _locked_in_place(place: Path, *, silent: bool = False) -> int | None:
    """The descriptor of a file or folder that is locked until it is closed, after waiting for others who hold the lock.

    None if it was removed or replaced until then.
    """
    with suppress(FileNotFoundError):
        descriptor = os.open(place, os.O_RDONLY)
        wait_for_lock(descriptor, place, silent=silent)
        if is_at(descriptor, place):
            return descriptor
        os.close(descriptor)
    return None


def is_at(descriptor: int, place: Path) -> bool:
    """Whether an open file or folder is still the one at a path."""
    with suppress(FileNotFoundError):
        return os.path.samestat(place.stat(), os.fstat(descriptor))
    return False


def _take_mode(sibling: Path, path: Path, more: int = 0) -> None:
    """Let the same people read a temporary sibling as what it replaces; `more` of the mode's bits for the meantime."""
    with suppress(FileNotFoundError):  # there is none to replace, or another process is just replacing it
        if path.is_dir() == sibling.is_dir():
            own, wanted = (stat.S_IMODE(place.stat().st_mode) for place in (sibling, path))
            if own != (wanted := wanted | own & more):
                sibling.chmod(wanted)


def _temporary_name(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(RANDOM_BYTES)}.tmp")


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
    descriptor = os.open(place, os.O_RDONLY | os.O_NONBLOCK)  # a pipe of that name would make us wait
    try:
        is_ours = False
        with suppress(OSError):
            is_ours = lock_descriptor(descriptor, blocking=False)
        yield is_ours
    finally:
        os.close(descriptor)


def wait_for_lock(descriptor: int, place: Path, *, silent: bool = False) -> None:
    """Lock an open file or folder until it is closed, waiting for others, and unless `silent` saying so on stderr."""
    with suppress(OSError):  # a file system without locks
        if not lock_descriptor(descriptor, blocking=False):
            if not silent:
                print(f"waiting for another process that is writing {place}", file=sys.stderr)
            lock_descriptor(descriptor)


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Make a folder and lock it while the block runs, waiting for another process that holds it."""
    with made(folder):
        descriptor = None
        while descriptor is None:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = _locked_in_place(folder)
        try:
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


def read_facts(path: Path) -> dict:
    """The JSON object in a file, or an empty one if the file is missing, broken or holds something else."""
    found = read_json(path)
    return found if isinstance(found, dict) else {}


def check_room(folder: Path, needed: int) -> None:
    """Raise UserError if the disk of a folder has less than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{folder.parent} has {free / 1e6:,.1f} MB free but {needed / 1e6:,.1f} MB are needed; "
            "free some space or give another --output"
        )
