"""The door to the disk: opens regular files, reads text and JSON, and checks where output is to go, before any work.

Whatever is wrong is one sentence that names the place. Pipes and devices, which would hang or never end, are refused.
"""

import errno
import json
import math
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, NoReturn

from soteria.errors import UserError

MAX_BYTES = 2**30  # of a file that is read whole as text
MAX_DEPTH = 100  # of JSON and YAML; Python's own limit depends on who reads
MAX_FOLDER = 255  # bytes in the name of a folder above an output, which is what file systems allow
MAX_NAME = 200  # bytes in an output's name: file systems allow 255, and names made from it are longer
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FULL_WORDS = (*map(os.strerror, _FULL), "PytorchStreamWriter failed writing", "file write failed", "unexpected pos ")
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def _kind(mode: int) -> str | None:
    """What is there instead of a regular file, or None for a regular file."""
    return next((name for is_kind, name in _KINDS if is_kind(mode)), None)


def regular_file(path: Path, missing: str = "") -> Path:
    """The path itself. Raises UserError unless it leads to a regular file; `missing` says that there is none."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        what = "is a link to nothing" if path.is_symlink() else "does not exist"
        raise UserError(missing or f"{path} {what}; give the path of a file") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({_reason(error)}); give another file") from None
    if kind := _kind(mode):
        raise UserError(f"{path} is {kind}, not a file; give the path of a regular file")
    return path


def check_tree(folder: Path, left_out: Sequence[str] = (), above: tuple[Path, ...] = ()) -> None:
    """Raise UserError for anything in a folder or below it that is neither a regular file nor a folder.

    Such are links to nothing, and links that lead back to a folder `above`. `left_out`: patterns of names to skip.
    Folders nested too deep to be walked through are refused, too.
    """
    above = (*above, folder.resolve())
    if len(above) > MAX_DEPTH:
        raise UserError(f"{above[0]} has folders {_too_deep()}; give a model's folder")
    for path in sorted(folder.iterdir()):
        if any(map(path.match, left_out)):
            continue
        if not path.is_dir():
            regular_file(path)
        elif path.resolve() in above:
            raise UserError(f"{path} is a link to a folder that it lies in; remove it")
        else:
            check_tree(path, left_out, above)


def open_file(path: Path, missing: str = "") -> BinaryIO:
    """Open a regular file to read bytes from it. Raises UserError as `regular_file` does."""
    try:
        return regular_file(path, missing).open("rb")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({_reason(error)}); give another file") from None


def read_text(path: Path, missing: str = "") -> str:
    """The text of a UTF-8 file of at most MAX_BYTES, without a byte-order mark. Raises UserError for any other."""
    with open_file(path, missing) as file:
        # `read` with a bound makes room for all of that.
        content = file.read() if os.fstat(file.fileno()).st_size <= MAX_BYTES else None
    if content is None:
        raise UserError(f"{path} has more than {MAX_BYTES >> 30} GB, too much to be read as text; give a smaller file")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason}); save it as UTF-8") from None


def load_json(path: Path, missing: str = "", *, strict: bool = True) -> object:
    """The value in a JSON file. Raises UserError as `read_text` and `parse_json` do."""
    return parse_json(read_text(path, missing), str(path), strict=strict)


def parse_json(text: str | bytes, where: str, *, strict: bool = True, plain: bool = True) -> object:
    """The value of a JSON text. `where` names it in the UserError that is raised for anything that is not JSON.

    What people write is read `strict`: a key given twice is refused too, and unless `plain` is False NaN, infinity and
    text that UTF-8 cannot hold. Programs do write those.
    """

    def refuse(what: str) -> NoReturn:
        raise UserError(f"{where} is not valid JSON ({what}); fix it or give another")

    def mapping(pairs: list[tuple[str, object]]) -> dict:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            refuse(f"the key {next(name for name in names if names.count(name) > 1)!r} is given twice")
        return found

    def number(text: str) -> float:
        return found if math.isfinite(found := float(text)) else refuse(f"{text} is not a finite number")

    hooks = {"object_pairs_hook": mapping} if strict else {}
    hooks |= {"parse_float": number, "parse_constant": number} if strict and plain else {}
    try:
        value = json.loads(text, **hooks)
        if strict and plain and "\\u" in (text if isinstance(text, str) else text.decode()):
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        refuse(_too_deep())
    except UnicodeEncodeError:
        refuse("it has half a character, a lone surrogate")
    except ValueError as error:
        refuse(str(error))
    if is_deep(value):
        refuse(_too_deep())
    return value


def is_deep(value: object) -> bool:
    """Whether lists and objects are nested more than MAX_DEPTH deep, or hold themselves."""
    layer = {0: value}
    for _ in range(MAX_DEPTH + 1):
        inner: dict[int, object] = {}
        for each in layer.values():
            children = each.values() if isinstance(each, dict) else each if isinstance(each, list) else ()
            inner |= {id(child): child for child in children if isinstance(child, dict | list)}
        if not inner:
            return False
        layer = inner
    return True


def _too_deep() -> str:
    return f"nested more than {MAX_DEPTH} deep"


def check_output(path: Path, *, is_folder: bool = False, longest: int = MAX_NAME) -> Path:
    """The path itself. Raises UserError where no such file, or folder, could be written; writes nothing.

    `longest`: bytes that the name may have.
    """
    wanted = "folder" if is_folder else "file"
    if path.name in ("", ".."):
        raise UserError(f"{str(path)!r} cannot be written: it names no new {wanted}; give it a name")
    if any("\ud800" <= c <= "\udfff" for c in str(path.absolute())):
        raise UserError(f"{str(path)!r} is not UTF-8, which not all libraries can write to; give another output")
    # The system says of a folder that its name is too long only once it is made.
    for name, most in ((path.name, longest), *((each, MAX_FOLDER) for each in path.parent.parts)):
        if len(as_bytes := os.fsencode(name)) > most:
            start = as_bytes[:40].decode(errors="replace")
            raise UserError(f"the name {start!r}… of {len(as_bytes)} bytes is too long; give one of at most {most}")
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        if path.is_symlink():
            raise UserError(f"{path} is a link to nothing; remove it or give another output") from None
        _check_new(path)
        return path
    except NotADirectoryError:
        _check_new(path)
        return path
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be written ({_reason(error)}); give another output") from None
    kind = _kind(mode)
    if kind != ("a folder" if is_folder else None):
        raise UserError(f"{path} is {kind or 'a file'}, not a {wanted}; remove it or give another output")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise UserError(f"{path.parent} cannot be written to; change its permissions or give another output")
    return path


def _check_new(path: Path) -> None:
    """Raise UserError where the folders above a new file or folder cannot be made."""
    above = next((parent for parent in path.absolute().parents if os.path.lexists(parent)), None)
    if above is None or not above.is_dir():
        raise UserError(f"{path} cannot be written, because {above} is not a folder; give another output")
    if not os.access(above, os.W_OK | os.X_OK):
        raise UserError(f"{path} cannot be written, because {above} is read-only; give another output")


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def explained(error: Exception) -> UserError | None:
    """The UserError that an exception is or means: a full disk, or a file that cannot be used. None for any other.

    Libraries raise kinds of their own when the disk is full; what the system said is in their words or their cause.
    """
    if isinstance(error, UserError):
        return error
    if is_full(error):
        return UserError("the disk is full; free some space and run the same command again")
    if isinstance(error, OSError) and error.filename is not None:
        return UserError(f"{error.filename} cannot be used ({error.strerror}); give another path")
    if isinstance(error, OSError) and error.errno is not None:
        return UserError(f"a file cannot be read or written ({error.strerror}); check the disk")
    return None


def is_full(error: BaseException | None) -> bool:
    """Whether an exception, or what caused it, says that the disk or a quota is full."""
    while error is not None:
        if getattr(error, "errno", None) in _FULL or any(words in str(error) for words in _FULL_WORDS):
            return True
        error = error.__cause__ or error.__context__
    return False
