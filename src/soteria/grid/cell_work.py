"""One cell of a grid: what of it is done, and how the rest is answered, measured and judged."""

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from pathlib import Path

from torch import Tensor

from soteria.answering.columns import AnswerColumn
from soteria.answering.engines import Engine
from soteria.answering.generation import fill
from soteria.errors import UserError
from soteria.grid.cells import MATCHED, Cell, CellFacts, is_signed, signed
from soteria.grid.grid_file import ALL_PARAMETERS, Grid
from soteria.grid.judge_options import JudgeOptions
from soteria.grid.serving import write_model
from soteria.grid.subject import NotScored, Subject, remembered
from soteria.judging import costs
from soteria.judging.interface import Judge
from soteria.judging.judges import check_judge, make_judge
from soteria.judging.statistics import summarise
from soteria.judging.verdicts import AnswerFile, describe, inputs_of, judge_answers
from soteria.languages import find_language
from soteria.scoring.heads import Head
from soteria.steering.formula import Steering, head_list_hash, open_steering, steered_in_place
from soteria.steering.task_arithmetic import all_parameters_steered
from soteria.storage import files, paths
from soteria.storage.paths import ANSWER_COLUMNS, BASE_ANSWER, BENIGN, HARMLESS, SAFE_ANSWER
from soteria.storage.side_files import is_of, read_noted

HARMLESS_JUDGE = "refusal"  # whoever judges the attacks: a harmless question is either answered or refused


class CellWork:
    """A cell and the work on it, on its subject's model."""

    def __init__(self, subject: Subject, cell: Cell):
        self.subject, self.cell, self.grid = subject, cell, subject.grid
        self.language, self.files = find_language(cell.language), cell.files(subject.results)
        self.refused: dict[str, UserError] = {}  # what cannot be asked or measured, and why
        self.steers_all = bool(cell.treatment) and cell.treatment.kind == ALL_PARAMETERS

    @cached_property
    def heads(self) -> list[Head]:
        """The heads that are steered by themselves; none in the base and where all parameters are."""
        by_heads = self.cell.treatment and not self.steers_all
        return self.subject.heads(self.cell.treatment, self.cell.language) if by_heads else []

    @cached_property
    def scaling_factor(self) -> float:
        return self.subject.scaling_factor(self.cell.treatment, self.cell.language)

    @cached_property
    def steering(self) -> Steering:
        """The cell's steering, checked. Raises UserError for heads that would steer nothing."""
        source = f"the head list {self.cell.treatment.heads_name}"
        return open_steering(self.subject.vector, self.heads, self.scaling_factor, source=source)

    @cached_property
    def settings(self) -> dict:
        """What the cell's answers depend on beside the questions."""
        settings = self.subject.base_settings | {"language": self.cell.language}
        if self.cell.treatment:
            vector, base = self.subject.vector, settings["model_sha256"]
            if self.steers_all:
                steered = [vector.whole_tuned.fingerprint, ALL_PARAMETERS]
            else:
                steered = [vector.tuned.fingerprint, head_list_hash(self.heads)]
            settings["model_sha256"] = _sha256([base, *steered, self.scaling_factor])
            settings["max_new_tokens"] = self.grid.longest(SAFE_ANSWER)
        return settings

    @property
    def sets(self) -> list[str]:
        harmless = self.grid.harmless if self.cell.with_cost else {BENIGN} & self.grid.harmless.keys()
        return [*self.cell.sets, *(harmless if self.cell.with_cost or self.cell.n_questions else ())]

    def column(self, name: str) -> AnswerColumn:
        treatment, pair = self.cell.treatment, self.subject.pair
        steered = treatment and {
            "base_model": paths.model_name(pair.base),
            "finetune_model": paths.model_name(pair.tuned),
            "scaling_factor": self.scaling_factor,
            "heads": treatment.heads_name,
        }
        return AnswerColumn(
            self.files.answers(name),
            SAFE_ANSWER if treatment else BASE_ANSWER,
            self.subject.questions(name, self.cell.language, self.cell.n_questions),
            pair.base,
            self.settings,
            steered=steered,
        )

    @cached_property
    def made_from(self) -> dict:
        """What `cell.json` depends on."""
        treatment = self.cell.treatment
        facts = {
            "base_model": paths.model_name(self.subject.pair.base),
            "language": self.cell.language,
            "heads": treatment.heads_name if treatment else None,
            "scaling_factor": treatment.scaling_factor if treatment else None,
            "answers_from": self.settings,
        }
        if treatment and treatment.kind == MATCHED:
            facts["matched_scaling_factor"] = self.scaling_factor
        if self.cell.with_cost:
            facts["cost_measured_on_sha256"] = self._cost_basis()
        return facts

    def _cost_basis(self) -> str:
        """A hash of what costs are measured on."""
        language = self.cell.language
        benign = self.subject.questions(BENIGN, language).questions if self.grid.benign else []
        tasks = self.subject.tasks(language)
        rows = {task: [[each.input, each.output] for each in split.test] for task, split in tasks.items()}
        return _sha256([benign, rows, self.grid.accuracy_seed, self.grid.accuracy_prompts or costs.N_PROMPTS])

    # Answering and measuring

    def pending(self) -> list[str]:
        """The sets that lack answers, and `facts` if cell.json is missing. What cannot be asked goes to `refused`."""
        lacking = []
        for name in (*self.sets, "facts"):
            try:
                if not self._is_done(name):
                    lacking.append(name)
            except NotScored:
                raise
            except UserError as error:  # the others can still be asked
                self.refused[name] = error
        return lacking

    def _is_done(self, name: str) -> bool:
        if name == "facts":
            found = read_noted(self.files.facts, CellFacts)
            return is_of(found, self.made_from) and self._measured <= found.keys() and is_signed(found)
        column = self.column(name)
        complete = column.is_complete()
        if complete and self.subject.processes.is_first:
            column.forget_journal()
        return complete

    @property
    def _measured(self) -> set[str]:
        """What `cell.json` says beside that."""
        costs_too = {"icl_accuracy"} | ({"kl_first_token"} if self.grid.benign else set())
        return {"n_heads", "share_of_parameters"} | (costs_too if self.cell.with_cost else set())

    def measure(self) -> bool:
        """Steer, answer what is not answered, and note what the cell was made from and what it costs.

        Returns whether there was anything to do.
        """
        pending = self.subject.processes.agree(self.pending())
        if pending:
            self._measure(pending)
        if self.refused:
            raise UserError("; ".join(dict.fromkeys(map(str, self.refused.values()))))
        return bool(pending)

    def _measure(self, pending: list[str]) -> None:
        subject, cell = self.subject, self.cell
        sets, log_probs = [name for name in pending if name != "facts"], None
        needs_cost = "facts" in pending and cell.with_cost
        if subject.serving and sets:
            with self.served() as engine:
                self._answer(sets, engine)
        if needs_cost and self.grid.benign:
            log_probs = subject.base_log_probs(cell.language)  # while the model is the base
        with nullcontext() if subject.serving and not needs_cost else self.steered():
            if not subject.serving:
                self._answer(sets)
            if "facts" in pending:
                started = time.monotonic()
                facts = self.made_from | self._steered_facts() | self._cost(log_probs)
                if subject.processes.is_first:
                    files.write_json(self.files.facts, signed(facts))
                if cell.with_cost:
                    subject.note_duration("cost", 1, time.monotonic() - started)

    def _answer(self, sets: list[str], engine: Engine | None = None) -> None:
        """Answer the sets with the loaded model, or with an engine that has this cell's."""
        subject, batch_size = self.subject, self.grid.answers.batch_size
        for name in sets:
            column, started = self.column(name), time.monotonic()
            fill(column, self.language, lambda: subject.loaded, subject.processes, batch_size, engine)
            subject.note_duration("answers", len(column.questions.questions), time.monotonic() - started)

    @property
    def _served_as(self) -> tuple[Steering | None, Path]:
        """What an engine serves: the steering, None for the base, and the folder for it."""
        is_base = not self.cell.treatment or not self.scaling_factor
        return None if is_base else self.steering, paths.served_model(self.subject.results, self.cell.name)

    def served(self) -> AbstractContextManager[Engine]:
        """The engine with this cell's model, for the length of a block."""
        subject = self.subject
        return subject.serving.of(subject.pair.base, self.cell.name, *self._served_as, self.cell.language)

    def write_model(self) -> bool:
        """Write what an engine serves for this cell, but for all parameters; returns whether it was not there."""
        steering, folder = (None, None) if self.steers_all else self._served_as
        is_new = bool(steering) and not folder.exists()
        if steering and self.subject.processes.is_first:
            write_model(steering, folder, self.cell.language)
        return is_new

    def steered(self) -> AbstractContextManager:
        """The loaded model is this cell's for the length of a block."""
        if not self.cell.treatment:
            return nullcontext()
        if self.steers_all:
            return all_parameters_steered(self.subject.loaded, self.subject.vector, self.scaling_factor)
        return steered_in_place(self.subject.loaded, self.steering)

    def _steered_facts(self) -> dict:
        if not self.cell.treatment:
            return {"n_heads": 0, "share_of_parameters": 0.0}
        total = len(self.subject.vector.geometry.all_heads)
        changed = self.subject.n_parameters if self.steers_all else self.steering.n_parameters
        return {
            "finetune_model": paths.model_name(self.subject.pair.tuned),
            "n_heads": total if self.steers_all else len(self.heads),
            "n_heads_total": total,
            "parameters_changed": changed,
            "share_of_parameters": changed / self.subject.n_parameters,
            **({} if self.steers_all else {"head_list": [list(head) for head in self.heads]}),
        }

    def _cost(self, base_log_probs: Tensor | None) -> dict:
        """In-context accuracy, and KL(base || cell) of each harmless answer's first token, in nats."""
        if not self.cell.with_cost:
            return {}
        subject, language = self.subject, self.cell.language
        accuracy = costs.icl_accuracy(
            subject.loaded, subject.tasks(language), self.grid.accuracy_seed, self.grid.accuracy_prompts
        )
        found = {"icl_accuracy": {"count": accuracy.count, "n": accuracy.n}}
        if base_log_probs is not None:
            own = subject.first_tokens(language) if self.cell.treatment else base_log_probs
            # The last digits depend on how many threads computed them.
            divergences = costs.kl_divergence(base_log_probs.numpy(), own.numpy()).tolist()
            found["kl_first_token"] = [round(value, 6) for value in divergences]
        return found

    def measure_utility(self) -> None:
        """Measure the grid's tasks of lm-eval, unless that is done."""
        from soteria.grid.utility import measure_utility, read_or_measure, utility_inputs

        subject, wanted, scoring = self.subject, self.grid.utility, self.grid.scoring
        steering = {"answers_from": self.settings["model_sha256"]} if self.cell.treatment else {}
        split = {"test_split": scoring.test_split, "seed": scoring.seed}
        asked = (wanted.tasks, wanted.limit, [self.cell.language])
        inputs = utility_inputs(subject.pair.base, *asked, subject.dtype, **split, **steering)

        def measure() -> dict:
            started = time.monotonic()
            with self.steered():
                found = measure_utility(
                    subject.loaded,
                    wanted.tasks,
                    limit=wanted.limit,
                    languages=[self.cell.language],
                    batch_size=self.grid.answers.batch_size,
                    **split,
                )
            subject.note_duration("utility", 1, time.monotonic() - started)
            return found

        if subject.processes.is_first:
            read_or_measure(self.files.utility, inputs, measure)

    # Judging

    def judges_of(self, name: str) -> list[str]:
        """The judges of a set's answers."""
        return [HARMLESS_JUDGE] if name in HARMLESS else self.grid.judges

    def judge(self, judges: "Judges") -> bool:
        """Judge what is answered and not judged, attacks by each of the grid's judges; returns whether any was new.

        A judge that fails does not stop the others. Raises UserError at the end.
        """
        new, refused = False, []
        for name in self.sets:
            for judge in self.judges_of(name):
                if self.files.answers(name).exists():
                    try:
                        new = self._judge(name, judge, judges) or new
                    except UserError as error:
                        refused.append(str(error))
        if refused:
            raise UserError("; ".join(dict.fromkeys(refused)))
        return new

    def _judge(self, name: str, judge: str, judges: "Judges") -> bool:
        """Judge one set by one judge; returns whether it was new. Raises UserError where calls got no reply."""
        answers, started = AnswerFile(self.files.answers(name)), time.monotonic()
        options = self.grid.judge_option(judge)
        inputs = inputs_of(answers, judge, options.settings, options.harmful_labels)
        with judges.using(judge, options) as get_judge:
            output = self.files.verdicts(name, judge)
            judged = judge_answers(answers, output, inputs, get_judge, retry_empty=judges.retry_empty)
        summary = describe(answers.path) | inputs | {"judge_description": judged.description}
        for column, given in judged.verdicts.items():
            summary[ANSWER_COLUMNS[column][1]] = summarise(given, judged.reasons[column]) | judged.refusals(column)
        judged.write(summary)
        if judged.is_new:
            self.subject.note_duration(f"judge {judge}", answers.n_rows, time.monotonic() - started)
        if judged.n_failed:
            raise UserError(f"{judged.description}: {judged.n_failed} of {answers.n_rows} calls got no reply")
        return judged.is_new


def _sha256(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _make(name: str, options: JudgeOptions) -> Judge:
    if options == JudgeOptions():
        return make_judge(name)
    return make_judge(name, options.settings, harmful_labels=options.harmful_labels)


class Judges:
    """The judges by name, each made when first needed. One that failed is not asked again: it would make all wait.

    With `retry_empty`, rows that a finished run left without a verdict are judged again.
    """

    retry_empty = False

    def __init__(self):
        self._made = remembered(_make)
        self._lost: dict[str, UserError] = {}

    def check(self, grid: Grid, cells: Iterable[Cell], results: Path) -> None:
        """Raise UserError for a judge that cannot be made and has something to judge: answers take hours."""
        for name in grid.judges:
            if any(not cell.files(results).verdicts(each, name).exists() for cell in cells for each in cell.sets):
                options = grid.judge_option(name)
                if name.startswith("hf:"):
                    check_judge(name, options.settings, options.harmful_labels)
                else:
                    self._made(name, options)

    @contextmanager
    def using(self, name: str, options: JudgeOptions) -> Iterator[Callable[[], Judge]]:
        """A function that returns the judge, for the length of a block. A UserError in the block ends its use."""

        def get() -> Judge:
            if name in self._lost:
                raise self._lost[name]
            return self._made(name, options)

        try:
            yield get
        except UserError as error:
            self._lost.setdefault(name, error)
            raise
