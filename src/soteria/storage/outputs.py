"""What a script may write over: a file or folder that carries this project's facts, and neither an input nor a link.

Scripts ask before any work. The facts of a CSV are the JSON beside it, those of a folder the `soteria.json` in it.
"""

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from soteria import disk
from soteria.errors import UserError
from soteria.storage import files
from soteria.storage.paths import FACTS, facts_file

GIVE_ANOTHER = "give another --output"


def check_file(path: Path, is_ours: bool, inputs: Iterable[Path | None] = (), mend: str = GIVE_ANOTHER) -> None:
    """Raise UserError if no file could be written at `path`, or there is one that is not `is_ours` or is an input.

    An input is recognized under any spelling and by hard links. `mend` is what the sentence says to do.
    """
    if path.is_symlink():
        raise UserError(f"{path} is a link, which would be replaced by a file; {mend}")
    disk.check_output(path)
    if not path.exists():
        return
    for given in filter(None, inputs):
        with suppress(OSError):  # an input that is missing is refused where it is read
            if given.samefile(path):
                raise UserError(f"{path} is a file that this command reads ({given}); {mend}")
    if not is_ours:
        raise UserError(f"{path} exists and was not written by this command; {mend}")


def check_json(path: Path, key: str, inputs: Iterable[Path | None] = (), mend: str = GIVE_ANOTHER) -> None:
    """`check_file` for a JSON object that has `key` if it is this project's."""
    check_file(path, key in files.read_facts(path), inputs, mend)


def check_csv(csv: Path, key: str, inputs: Iterable[Path | None] = ()) -> None:
    """`check_file` for a CSV and its facts, which have `key` in every CSV of its kind."""
    inputs = list(inputs)
    check_json(facts_file(csv), key, inputs)
    check_file(csv, key in files.read_facts(facts_file(csv)), inputs)


def check_folder(folder: Path, key: str, kind: str, facts: str = FACTS, left: Iterable[str] = ()) -> None:
    """Raise UserError if no folder could be made at `folder`, or there is one with anything but `key` in its facts.

    `kind` is what its sentence calls such a folder. A killed run may leave one without facts, in which there is nothing
    but temporary files and what has a name like `left`.
    """
    if folder.is_symlink():
        raise UserError(f"{folder} is a link, which would be replaced by a folder; {GIVE_ANOTHER}")
    disk.check_output(folder, is_folder=True)
    names = (".*.tmp", *left)
    is_empty = folder.is_dir() and all(any(map(path.match, names)) for path in folder.iterdir())
    if folder.exists() and not is_empty and key not in files.read_facts(folder / facts):
        raise UserError(f"{folder} exists and is not {kind}; remove it or {GIVE_ANOTHER}")
