"""Where things lie, and files that appear whole or not at all."""

import fcntl
import glob
import json
import os
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from soteria.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "data"
RESULTS = Path(os.environ.get("SOTERIA_RESULTS") or ROOT / "results")
SAFE_ANSWER, BASE_ANSWER = "SAFE ANSWER", "BASE ANSWER"
# Answer column -> (verdict column, name in the JSON)
ANSWER_COLUMNS = {SAFE_ANSWER: ("Verdict_Safe", "safe"), BASE_ANSWER: ("Verdict_Base", "base")}


def model_slug(name: str) -> str:
    """A model's name for folders: a hub id with `/` replaced by `_`, or a local folder's own name."""
    path = Path(name)
    return path.resolve().name if path.is_dir() else name.strip("/").replace("/", "_")


def steered_folder(results: Path, language: str, base: str, scaling_factor: float) -> Path:
    """Where a steered model goes."""
    return results / "models" / f"{language}_{model_slug(base)}_scaling_{scaling_factor:g}"


def delta_folder(results: Path, base: str) -> Path:
    """Where a base's task vector goes, with the head lists of its languages."""
    return results / "models" / f"{model_slug(base)}_delta"


def answer_files(results: Path, language: str, base: str, dataset: str, scaling_factor: float) -> tuple[Path, Path]:
    """Where the answers to a question set go, and their verdicts."""
    name = f"{model_slug(base)}_{language}_{dataset}_scaling_{scaling_factor:g}.csv"
    return results / "generations" / name, results / "evaluated" / f"Evaluated_{name}"


def benign_file(answers: Path) -> Path:
    """Where the same models' answers to harmless questions lie."""
    return answers.parent / "benign" / answers.name


def first_token_file(answers: Path, column: str) -> Path:
    """Where the log-probabilities of the first token of a column's answers lie."""
    return answers.with_name(f"{answers.stem}.{ANSWER_COLUMNS[column][1]}.first_token.safetensors")


def head_folder(name: str) -> Path:
    """A folder of head lists: a path, or a name under `results/heads`. Raises UserError where it is neither."""
    for folder in (Path(name), RESULTS / "heads" / name):
        if folder.is_dir():
            return folder
    raise UserError(f"no head folder {name!r}, neither as a path nor in {RESULTS / 'heads'}")


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


class Journal:
    """Finished rows of a long job, on disk as they come, so that a killed run goes on where it was.

    A row is anything that JSON can hold. The first line holds the job's settings; a journal with other settings, or a
    broken last line, counts for nothing. Rows are added in a `with` block, which one process at a time enters; others
    wait.
    """

    def __init__(self, path: Path, settings: dict):
        self.path, self.settings = path, json.dumps(settings, sort_keys=True, ensure_ascii=False)
        self.done, self._sound, self._file = {}, 0, None
        self._read()

    def _read(self) -> None:
        """Find what is done, and how many bytes of the file hold it."""
        self.done: dict[int, object] = {}
        self._sound = 0
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    return
                if self._sound == 0:
                    if line.decode("utf-8", "replace").rstrip("\n") != self.settings:
                        return
                else:
                    try:
                        row, text = json.loads(line)
                    except ValueError:
                        return
                    self.done[row] = text
                self._sound += len(line)

    def __enter__(self) -> "Journal":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            self._file = self.path.open("ab")
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"waiting for another process that writes {self.path}", file=sys.stderr)
                fcntl.flock(self._file, fcntl.LOCK_EX)
            except OSError:  # a file system without locks
                pass
            if self.path.exists() and os.path.samestat(self.path.stat(), os.fstat(self._file.fileno())):
                break
            self._file.close()  # the other one has removed it
        self._read()
        self._file.truncate(self._sound)
        return self

    def __exit__(self, *_) -> None:
        if self._sound == 0 and not self.done:
            self.path.unlink(missing_ok=True)
        self._file.close()

    def add(self, rows: dict[int, object]) -> None:
        """Write rows down; they are on disk when this returns."""
        lines = [json.dumps(item, ensure_ascii=False) for item in rows.items()]
        if self._sound == 0:
            lines.insert(0, self.settings)
        self._sound += self._file.write("".join(f"{line}\n" for line in lines).encode("utf-8"))
        self._file.flush()
        self.done |= rows

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
