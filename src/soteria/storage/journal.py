"""Finished rows of a long job, written down as they come, so that a killed run resumes where it was."""

import fcntl
import json
import os
import sys
from pathlib import Path


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
