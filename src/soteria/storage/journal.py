"""Journals: the finished rows of a long job, written as they come, so that a killed run resumes where it stopped."""

import errno
import json
import os
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, BinaryIO

from soteria import disk
from soteria.errors import UserError
from soteria.storage import files
from soteria.storage.side_files import fits


def open_to_append(path: Path) -> BinaryIO:
    """Open a file of this project's own to add to it. Raises UserError for a link: it could lead to any file."""
    try:
        return os.fdopen(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o666), "ab")
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise UserError(f"{path} is a link, but is written to as a file of this project; remove it") from None


class Journal:
    """A file of finished rows, each any JSON value under its number. Its first line is the job's settings.

    A journal of other settings is ignored, as is everything from a broken line on: one that is not JSON, whose number
    was there before or is not one of `rows`, or whose value does not fit the schema `values`. Rows are added inside a
    `with` block, which one process enters at a time; the others wait.
    """

    def __init__(self, path: Path, settings: dict, values: object = Any, rows: range | None = None):
        self.path, self._line, self._rows = disk.check_output(path, longest=files.LONGEST), tuple[int, values], rows
        self._header = (json.dumps(settings, sort_keys=True, ensure_ascii=False) + "\n").encode("utf-8")
        self._read()

    def _read(self) -> None:
        """Set `done` to the finished rows, and `_sound` to the number of bytes that hold them."""
        self.done: dict[int, object] = {}
        self._sound = 0
        with suppress(FileNotFoundError, UserError), self.path.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n") or (self._sound == 0 and line != self._header):
                    return
                if self._sound > 0:
                    found = disk.parse_json(line, str(self.path), strict=False)
                    if not isinstance(found, list) or not fits(tuple(found), self._line):
                        return
                    if found[0] in self.done or (self._rows is not None and found[0] not in self._rows):
                        return
                    self.done[found[0]] = found[1]
                self._sound += len(line)

    def __enter__(self) -> "Journal":
        self._folder = ExitStack()
        self._folder.enter_context(files.made(self.path.parent))
        while True:
            self._file = open_to_append(self.path)
            files.wait_for_lock(self._file.fileno(), self.path)
            if files.is_at(self._file.fileno(), self.path):
                break
            self._file.close()  # the process we waited for has removed it
        self._read()
        if self._sound == 0 and self._starts_otherwise():
            self._file.close()
            raise UserError(f"{self.path} is needed for finished rows but is another file; move it elsewhere")
        self._file.truncate(self._sound)
        return self

    def _starts_otherwise(self) -> bool:
        """Whether the file's first line cannot be any journal's."""
        with self.path.open("rb") as file:
            return file.read(1) not in (b"", b"{")

    def __exit__(self, *_) -> None:
        if self._sound == 0:
            self.remove()
        with self._folder:
            self._file.close()

    def add(self, rows: dict[int, object]) -> None:
        """Write finished rows. They are on disk when this returns."""
        lines = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in rows.items()).encode("utf-8")
        n_bytes = self._file.write(lines if self._sound else self._header + lines)
        self._file.flush()
        self._sound += n_bytes
        self.done |= rows

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
