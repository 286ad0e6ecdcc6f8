"""Kill a run at a chosen write: a forked child stops there for good, and SIGKILL ends it."""

import multiprocessing
import time
from contextlib import contextmanager

from conftest import run_in_child

from soteria.storage import files
from soteria.storage.journal import Journal


class Writes:
    """Notes the writes of a run in this process: rows of journals, and files before and after they are in place."""

    def __init__(self, monkeypatch):
        self.noted: list[str] = []
        self._stop, self._reached = None, multiprocessing.get_context("fork").Event()
        add, whole_file = Journal.add, files.whole_file

        def noted_add(journal, rows):
            self._note("rows")
            add(journal, rows)

        @contextmanager
        def noted_file(path):
            with whole_file(path) as sibling:
                yield sibling
                self._note(f"{path.suffix} written")
            self._note(f"{path.suffix} in place")

        monkeypatch.setattr(Journal, "add", noted_add)
        monkeypatch.setattr(files, "whole_file", noted_file)

    def _note(self, what: str) -> None:
        if len(self.noted) == self._stop:
            self._reached.set()
            time.sleep(600)
        self.noted.append(what)

    def kill(self, script, arguments: list[str], at: int) -> None:
        """Run a script's `main` in a child process and kill it right before its write number `at`."""
        self.noted.clear()
        self._reached.clear()
        self._stop = at
        run_in_child(script, arguments, kill_when=lambda _: self._reached.wait(60))
        assert self._reached.is_set()
        self._stop = None

    def moments(self) -> list[int]:
        """Of the run just noted, a moment in each stretch of journal rows, and every one of a file."""
        starts = [at for at, what in enumerate(self.noted) if what != "rows" or self.noted[at - 1 : at] != ["rows"]]
        ends = [*starts[1:], len(self.noted)]
        return [(start + end) // 2 for start, end in zip(starts, ends, strict=True)]
