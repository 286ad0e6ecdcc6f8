"""A grid's run, or a shard's: score, select, steer, answer, judge, with each model loaded once.

What is done is recognized by what it was made from, so a run that resumes after an interruption, or on another machine,
measures only what is missing. A cell that fails is noted and skipped.
"""

import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from soteria import disk
from soteria.answering.question_files import find_local, may_be_on_hub
from soteria.cli import wants_tracebacks
from soteria.errors import UserError, explain
from soteria.grid.cell_work import CellWork, Judges
from soteria.grid.cells import Cell, Shard, language_cells, method_of
from soteria.grid.grid_file import SAFETY, Grid
from soteria.grid.serving import Serving
from soteria.grid.subject import NotScored, Subject
from soteria.languages import TIERS, group_languages
from soteria.models.processes import Processes
from soteria.scoring.heads import write_heads
from soteria.scoring.run import score_runs
from soteria.storage import files, paths
from soteria.terminal import one_line


class Reproduction:
    """The steps of a grid in turn. `failed` and `waiting` hold the reason for every cell that was not run."""

    def __init__(self, grid: Grid, results: Path, processes: Processes, shard: Shard = Shard()):  # noqa: B008
        self.grid, self.results, self.processes = grid, results, processes
        self.units = shard.units(grid)
        self.failed: dict[str, str] = {}
        self.waiting: dict[str, str] = {}
        self.judges = Judges()

    def check(self, steps: list[str]) -> None:
        """Raise UserError for what the steps would only find missing after hours: a question set, or a judge.

        A set that is missing in some languages fails in their cells alone.
        """
        for asked in (*self.grid.prompt_sets, *self.grid.harmless.values()) if "answer" in steps else ():
            names = [asked.dataset_in(language) for language in self.grid.languages]
            if not any(find_local(name) or may_be_on_hub(name) for name in names):
                raise UserError(f"no question file {names[0]!r}, nor one in another language; check the grid's sets")
        if "utility" in steps and self.grid.utility:
            from soteria.grid.utility import check_tasks

            check_tasks(self.grid.utility.tasks, self.grid.utility.languages or self.grid.languages)
        if "judge" in steps:
            cells = [cell for pair, language in self.units for cell in language_cells(self.grid, pair, language)]
            self.judges.check(self.grid, cells, self.results)

    def run(self, steps: list[str]) -> None:
        """Run the steps (score, models, answer, utility, judge), model by model: each is loaded at most once.

        Raises UserError for an engine that cannot be used.
        """
        serving = None
        if "answer" in steps and self.grid.answers.engine:
            self.processes.need_one("answers.engine")
            serving = Serving(self.grid)
        for pair in self.grid.models:
            languages = [language for other, language in self.units if other is pair]
            if not languages:
                continue
            subject = Subject(self.grid, pair, self.results, self.processes, serving)
            cells = [cell for language in languages for cell in language_cells(self.grid, pair, language)]
            if {"score", "models", "answer", "utility"} & set(steps):
                self._score_and_answer(subject, languages, cells, steps)
            subject.unload()
            if "judge" in steps and self.processes.is_first:
                self._each(subject, cells, "judging", lambda work: work.judge(self.judges))
            self.processes.wait()

    def _score_and_answer(self, subject: Subject, languages: list[str], cells: list[Cell], steps: list[str]) -> None:
        """The steps that need the model. A missing one, or its twin, is discovered once, before any work on them."""
        slug = subject.pair.slug
        steered = {"models", "answer", "utility"} & set(steps)
        if not self._opens(slug, lambda: (subject.base_settings, steered and subject.vector)):
            return
        if "score" in steps:
            for language in languages:
                if not self.grid.head_folder:
                    with self._noting(f"{slug}/{language}/scores"):
                        self._score(subject, language)
                if SAFETY in self.grid.rankings_in(language):
                    with self._noting(f"{slug}/{language}/safety"):
                        self._score_safety(subject, language)
            if not self.grid.head_folder:
                self._select(subject)
            self.processes.wait()  # the first one writes what all read
        if "models" in steps:
            self._each(subject, cells, "writing", CellWork.write_model)
        if "answer" in steps:
            self._each(subject, cells, "answering", CellWork.measure)
        if "utility" in steps and self.grid.utility:
            self._utility(subject, languages)

    def _opens(self, slug: str, ask: Callable) -> bool:
        """Whether a model can be opened: `ask` does not raise."""
        with self._noting(slug, paths.model_failure(self.results, slug)):
            ask()
        return slug not in self.failed

    def _score(self, subject: Subject, language: str) -> None:
        """Step 1 of a language."""
        for answer in self.grid.scored_answers(language):
            started = time.monotonic()
            scored = score_runs(subject.dataset_runs(language, answer), self.processes, lambda: subject.loaded)
            subject.note_duration("score", scored, time.monotonic() - started)

    def _score_safety(self, subject: Subject, language: str) -> None:
        """The rival ranking by safety; as much work as a dataset of step 1."""
        started = time.monotonic()
        scored = score_runs([subject.safety_run(language)], self.processes, lambda: subject.loaded)
        subject.note_duration("score", scored, time.monotonic() - started)

    def _select(self, subject: Subject) -> None:
        """Step 2: the head lists as files, of each scored language and each group that the grid has whole."""
        if not self.processes.is_first:
            return
        slug = subject.pair.slug
        folder = paths.heads_root(self.results) / self.grid.scored_slug(subject.pair)
        scored = [name for name in self.grid.languages if not subject.unscored([name])]
        for language in scored:
            with self._noting(f"{slug}/{language}/heads"):
                write_heads(folder / paths.language_file(language), subject.method_heads(language))
        for group in (*TIERS, "Universal"):
            if set(group_languages(group)) <= set(scored):
                with self._noting(f"{slug}/{group}/heads"):
                    write_heads(folder / paths.group_file(group), subject.shared_heads(group))

    def _each(self, subject: Subject, cells: list[Cell], what: str, do: Callable[[CellWork], bool]) -> None:
        """Do something to each cell, and print how many it was new to, for those who see no progress bar."""
        silent, new, started = None if self.processes.is_first else True, 0, time.monotonic()
        for cell in tqdm(cells, desc=f"{what}, {subject.pair.slug}", unit="cell", disable=silent):
            with self._noting(cell.name, cell.files(self.results).failure(what)):
                new += do(CellWork(subject, cell))
        if self.processes.is_first:
            seconds = time.monotonic() - started
            print(f"{what}, {subject.pair.slug}: {new} of {len(cells)} cells now, {seconds:.0f} s", flush=True)

    def _utility(self, subject: Subject, languages: list[str]) -> None:
        """Measure utility of the base and the method, in the languages that the grid asks for."""
        for language in languages:
            if language not in (self.grid.utility.languages or self.grid.languages):
                continue
            for cell in language_cells(self.grid, subject.pair, language):
                if cell.treatment in (None, method_of(self.grid)):
                    with self._noting(f"{cell.name}/utility"):
                        CellWork(subject, cell).measure_utility()

    @contextmanager
    def _noting(self, name: str, file: Path | None = None) -> Iterator[None]:
        """Note a failure under a name, and in a file that goes once the same work succeeds. Ctrl-C is no failure."""
        try:
            yield
        except NotScored as error:
            self.waiting[name] = str(error)
        except Exception as error:
            if disk.is_full(error):
                raise  # no other cell would fare better
            if self.processes.count > 1 and not isinstance(error, UserError):
                raise  # the other processes are elsewhere in the work
            sentence = str(error) if isinstance(error, UserError) else explain(error)
            if sentence is None or wants_tracebacks():
                traceback.print_exc(file=sys.stderr)
            sentence = one_line(sentence or f"{type(error).__name__}: {error}")
            self.failed[name] = sentence
            if file and self.processes.is_first:
                files.write_text(file, sentence + "\n")
        else:
            if file and name not in self.failed:
                file.unlink(missing_ok=True)
