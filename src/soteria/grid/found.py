"""What lies in a grid's cells and is what the grid would make, for tables and plans. Loads no model, writes nothing."""

from collections.abc import Callable
from functools import cached_property
from pathlib import Path

from soteria.answering.facts import AnswerFacts, check_answers, column_digest
from soteria.answering.question_files import find_local
from soteria.answering.questions import dataset_slug
from soteria.errors import UserError
from soteria.grid.cell_work import CellWork
from soteria.grid.cells import MATCHED, Cell, CellFacts, is_signed
from soteria.grid.grid_file import TASK_VECTOR, Grid, Pair
from soteria.grid.subject import NotScored, Subject, remembered
from soteria.grid.utility import Measurement
from soteria.judging.verdicts import AnswerFile, given_verdicts, inputs_of
from soteria.models.loading import DTYPES
from soteria.storage import paths
from soteria.storage.csv_files import read_table
from soteria.storage.paths import BASE_ANSWER, SAFE_ANSWER, facts_file, names_another
from soteria.storage.side_files import MODEL_NAMES, read_noted


class SubjectOnDisk(Subject):
    """A model of a grid as far as its files tell."""

    def __init__(self, grid: Grid, pair: Pair, results: Path):
        super().__init__(grid, pair, results, processes=None)
        self.ranking = remembered(self._ranking)

    @property
    def is_here(self) -> bool:
        """Whether both models are folders on this machine: a hub may be out of reach."""
        return Path(self.pair.base).is_dir() and Path(self.pair.tuned).is_dir()

    @cached_property
    def dtype(self) -> str:
        """What the grid says, or else what its cells were begun in, if that is known: not what this machine prefers."""
        noted = paths.dtype_file(self.results, self.pair.slug)
        begun = noted.read_text(encoding="utf-8", errors="replace").strip() if noted.is_file() else ""
        return self.grid.dtype if self.grid.dtype != "auto" or begun not in DTYPES else begun


class CellOnDisk(CellWork):
    """A cell's files, held against what the grid asks for. What is not the grid's counts as missing: `others` says why.

    Of models that are not on this machine, the cell's files are held against each other.
    """

    subject: SubjectOnDisk

    def __init__(self, subject: SubjectOnDisk, cell: Cell):
        super().__init__(subject, cell)
        self.others: dict[str, str] = {}  # by a file's name
        self._noted = read_noted(self.files.facts, CellFacts)
        self._read: dict[Path, object] = {}

    @property
    def answer_column(self) -> str:
        return SAFE_ANSWER if self.cell.treatment else BASE_ANSWER

    @cached_property
    def settings(self) -> dict:
        """What the answers should depend on. Raises UserError where the grid's heads or models cannot be had."""
        kind = self.cell.treatment and self.cell.treatment.kind
        if kind == MATCHED:  # the norms that it comes from are of all output projections
            self.scaling_factor = self._noted.get("matched_scaling_factor", 0.0)
        if kind == TASK_VECTOR:
            self.heads = self._noted_heads
        if self.subject.is_here:
            try:
                settings = super().settings
            except NotScored:  # the scores may be on another machine
                self.heads = self._noted_heads
                settings = super().settings
            is_known = settings["dtype"] != "auto"
            return settings if is_known else settings | {"dtype": self._noted.get("answers_from", {}).get("dtype")}
        asked = {"preset": self.grid.preset, "engine": self.grid.answers.engine}
        known = {name: value for name, value in asked.items() if value}
        known |= {"language": self.cell.language, "chat_template": self.subject.pair.chat_template}
        known |= {"max_new_tokens": self.grid.longest(self.answer_column)}
        known |= {"dtype": self.grid.dtype} if self.grid.dtype != "auto" else {}
        noted = self._noted.get("answers_from", {})
        return {name: value for name, value in noted.items() if name not in asked} | known

    @property
    def _noted_heads(self) -> list[tuple[int, int]]:
        return [(layer, head) for layer, head in self._noted.get("head_list", [])]

    def _cost_basis(self) -> str | None:
        is_far = self.grid.benign and not find_local(self.grid.benign.dataset_in(self.cell.language))
        return self._noted.get("cost_measured_on_sha256") if is_far else super()._cost_basis()

    def _checked(self, path: Path, read: Callable[[], object]) -> object:
        """What `read` returns; None if the file does not exist or `read` raises UserError, which is noted."""
        if path not in self._read:
            self._read[path] = None
            try:
                self._read[path] = read() if path.exists() else None
            except UserError as error:
                self.others[path.name] = str(error)
        return self._read[path]

    @property
    def facts(self) -> dict:
        return self._checked(self.files.facts, self._check_facts) or {}

    def _check_facts(self) -> dict:
        for name, wanted in (self.made_from if self._noted else {}).items():
            if name not in MODEL_NAMES:
                self._compare(name, self._noted.get(name), wanted)
        self._check_names(self._noted)
        if self._noted and not is_signed(self._noted):
            raise UserError("changed since it was written; remove it to measure again")
        return self._noted

    def _check_names(self, noted: dict) -> None:
        """Raise UserError for the names of other models, where only names can tell."""
        pair = self.subject.pair
        for name, own in zip(MODEL_NAMES, (pair.base, pair.tuned), strict=True):
            if noted.get(name) and names_another(noted[name], own) and not self.subject.is_here:
                raise UserError(f"made with {noted[name]}, not {paths.model_name(own)}")

    def _compare(self, name: str, was: object, wanted: object) -> None:
        if was == wanted:
            return
        if isinstance(wanted, dict) and isinstance(was, dict):
            for key in (*wanted, *was):
                self._compare(key, was.get(key), wanted.get(key))
        what = "made with other heads or weights" if name == "model_sha256" else f"made with {name} {was}, not {wanted}"
        raise UserError("costs of other questions or prompts" if name.endswith("_on_sha256") else what)

    @property
    def all_others(self) -> dict[str, list[str]]:
        """The names of files that are not the grid's, by the reason, once each was read."""
        _ = self.facts, self.grid.utility and self.utility
        for name in self.sets:
            for judge in self.judges_of(name):
                self.verdicts(name, judge)
        found: dict[str, list[str]] = {}
        for name, reason in self.others.items():
            found.setdefault(reason, []).append(name)
        return found

    def answers(self, name: str) -> dict[str, list[str]] | None:
        """The columns of a set's answers."""
        path = self.files.answers(name)
        return self._checked(path, lambda: self._read_answers(name, path))

    def _read_answers(self, name: str, path: Path) -> dict[str, list[str]]:
        table, noted = read_table(path, ["Question"]), read_noted(facts_file(path), AnswerFacts)
        made = noted.get("columns", {}).get(self.answer_column)
        if not made or not {"Question", self.answer_column} <= set(table.columns):
            raise UserError(f"without answers that {facts_file(path).name} is about")
        self._check_names(made.get("steered") or {"base_model": made.get("model")})
        settings = self.settings
        made = {"dtype": settings.get("dtype")} | made  # earlier versions did not note it
        for key in dict.fromkeys([*settings, "preset", "engine"]):
            self._compare(key, made.get(key), settings.get(key))
        check_answers(path, noted, {self.answer_column: column_digest(table, self.answer_column)}, len(table))
        found = {column: list(table[column]) for column in ("Question", self.answer_column)}
        self._check_questions(name, found["Question"], noted.get("dataset"))
        return found

    def _check_questions(self, name: str, asked: list[str], dataset: str | None) -> None:
        wanted = self.grid.questions(name).dataset_in(self.cell.language)
        if find_local(wanted):
            if asked != self.subject.questions(name, self.cell.language, self.cell.n_questions).questions:
                raise UserError("answers to other questions; remove the file, or give another --results")
        elif dataset and dataset not in (dataset_slug(wanted), Path(wanted).stem):
            raise UserError(f"asked on {dataset}, which is not the grid's")
        elif len(asked) > (n := self.cell.n_questions or self.grid.answers.questions or len(asked)):
            raise UserError(f"{len(asked)} questions, not {n}")

    def verdicts(self, name: str, judge: str) -> list[str] | None:
        """A judge's labels, or EMPTY, on a set's answers."""
        path = self.files.verdicts(name, judge)
        return self._checked(path, lambda: self._read_verdicts(name, judge, path))

    def _read_verdicts(self, name: str, judge: str, path: Path) -> list[str] | None:
        if self.answers(name) is None:
            return None
        answers, options = AnswerFile(self.files.answers(name)), self.grid.judge_option(judge)
        inputs = inputs_of(answers, judge, options.settings, options.harmful_labels)
        given = given_verdicts(path, inputs, answers)
        if not given:
            raise UserError("verdicts on other answers, or of a judge that was asked otherwise")
        return given[self.answer_column]

    @property
    def utility(self) -> dict:
        return self._checked(self.files.utility, self._read_utility) or {}

    def _read_utility(self) -> dict:
        found, wanted = read_noted(self.files.utility, Measurement), self.grid.utility
        asked = {"tasks": wanted.tasks, "limit": wanted.limit, "languages": [self.cell.language]}
        if self.cell.treatment and "model_sha256" in self.settings:
            asked["answers_from"] = self.settings["model_sha256"]
        for name, value in asked.items() if found else ():
            self._compare("model_sha256" if name == "answers_from" else name, found["inputs"].get(name), value)
        return found
