"""The cells of a grid, measured: score, select, steer, answer, judge, each model loaded once.

Knows cells and the steps' own functions; makes no tables. What is done is found by what it was made from, so a run that
goes on after an interruption, or on another machine, measures only what is missing. A cell that fails is noted and
passed by.
"""

import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from soteria.errors import UserError
from soteria.grid.cell_work import CellWork, Judges
from soteria.grid.cells import Cell, Shard, language_cells, method_of
from soteria.grid.grid_file import Grid
from soteria.grid.subject import NotScored, Subject
from soteria.languages import TIERS, group_languages
from soteria.models.processes import Processes
from soteria.scoring.heads import write_heads
from soteria.storage import files
from soteria.storage.paths import (
    group_file,
    heads_root,
    language_file,
    model_failure,
)


class Reproduction:
    """A grid's run, or a shard's: the steps in turn, with a note of every cell that failed or has to wait."""

    def __init__(self, grid: Grid, results: Path, processes: Processes, shard: Shard = Shard()):  # noqa: B008
        self.grid, self.results, self.processes, self.shard = grid, results, processes, shard
        self.units = shard.units(grid)
        self.failed: dict[str, str] = {}
        self.waiting: dict[str, str] = {}
        self.judges = Judges()

    def run(self, steps: list[str], score_step: Callable) -> None:
        """The steps, model by model: each is loaded at most once, and let go before the next.

        `score_step(language, subject)` is step 1, as its own script has it.
        """
        for pair in self.grid.models:
            languages = [language for other, language in self.units if other is pair]
            if not languages:
                continue
            subject = Subject(self.grid, pair, self.results, self.processes)
            cells = [cell for language in languages for cell in language_cells(self.grid, pair, language)]
            if {"score", "answer", "utility"} & set(steps):
                self._score_and_answer(subject, languages, cells, steps, score_step)
            subject.unload()
            if "judge" in steps and self.processes.is_first:
                self._each(subject, cells, "judging", lambda work: work.judge(self.judges))
            self.processes.wait()

    def _score_and_answer(
        self, subject: Subject, languages: list[str], cells: list[Cell], steps: list[str], score_step: Callable
    ) -> None:
        """The steps that need the model. A model that is not there is found out once, and not by each of its cells."""
        slug = subject.pair.slug
        if not self._opens(slug, lambda: subject.base_settings):
            return
        if "score" in steps:
            for language in languages:
                with self._noting(f"{slug}/{language}/scores"):
                    score_step(language, subject)
            self._select(subject)
            self.processes.wait()  # the first one writes what all read
        if {"answer", "utility"} & set(steps) and self._opens(slug, lambda: subject.vector):
            if "answer" in steps:
                self._each(subject, cells, "answering", CellWork.measure)
            if "utility" in steps and self.grid.utility:
                self._utility(subject, languages)

    def _opens(self, slug: str, ask: Callable) -> bool:
        """Whether a model's files can be had, where asking does not raise."""
        with self._noting(slug, model_failure(self.results, slug)):
            ask()
        return slug not in self.failed

    def _each(self, subject: Subject, cells: list[Cell], what: str, do: Callable[[CellWork], bool]) -> None:
        """Do something to each cell, and say how many it was new to: where no bar is seen, this is."""
        silent, new, started = None if self.processes.is_first else True, 0, time.monotonic()
        for cell in tqdm(cells, desc=f"{what}, {subject.pair.slug}", unit="cell", disable=silent):
            with self._noting(cell.name, cell.files(self.results).failure(what)):
                new += do(CellWork(subject, cell))
        if self.processes.is_first:
            print(
                f"{what}, {subject.pair.slug}: {new} of {len(cells)} cells now, {time.monotonic() - started:.0f} s",
                flush=True,
            )

    @contextmanager
    def _noting(self, name: str, file: Path | None = None) -> Iterator[None]:
        """Note a failure under a name, and in a file that vanishes when the same goes well. Ctrl-C is no failure."""
        try:
            yield
        except NotScored as error:
            self.waiting[name] = str(error)
        except Exception as error:
            if self.processes.count > 1 and not isinstance(error, UserError):
                raise  # the other processes are not where this one is
            sentence = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            if not isinstance(error, UserError):
                traceback.print_exc(file=sys.stderr)
            self.failed[name] = sentence
            if file and self.processes.is_first:
                files.write_text(file, sentence + "\n")
        else:
            if file and name not in self.failed:
                file.unlink(missing_ok=True)

    def _select(self, subject: Subject) -> None:
        """Step 2: the head lists as files, of each language scored and each group that the grid has whole."""
        if not self.processes.is_first:
            return
        folder = heads_root(self.results) / subject.pair.slug
        scored = [name for name in self.grid.languages if not subject.unscored(name)]
        for language in scored:
            with self._noting(f"{subject.pair.slug}/{language}/heads"):
                write_heads(folder / language_file(language), subject.method_heads(language))
        for group in (*TIERS, "Universal"):
            if set(group_languages(group)) <= set(scored):
                with self._noting(f"{subject.pair.slug}/{group}/heads"):
                    write_heads(folder / group_file(group), subject.shared_heads(group))

    def _utility(self, subject: Subject, languages: list[str]) -> None:
        """What the base and the method can still do, in the languages that the grid asks it of."""
        wanted = self.grid.utility
        asked = [language for language in languages if language in (wanted.languages or self.grid.languages)]
        for language in asked:
            for cell in language_cells(self.grid, subject.pair, language):
                if cell.steering in (None, method_of(self.grid)):
                    with self._noting(f"{cell.name}/utility"):
                        CellWork(subject, cell).measure_utility()
