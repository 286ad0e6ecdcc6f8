"""One cell of a grid: what of it is done, and how the rest is measured."""

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from pathlib import Path

from torch import Tensor

from soteria.answering.columns import AnswerColumn
from soteria.answering.generation import fill
from soteria.errors import UserError
from soteria.grid.cells import Cell
from soteria.grid.subject import NotScored, Subject, remembered
from soteria.judging.damage import kl_divergence
from soteria.judging.interface import Judge
from soteria.judging.judges import make_judge
from soteria.judging.statistics import summarise
from soteria.judging.verdicts import Answers, describe, inputs_of, judge_answers
from soteria.languages import find_language
from soteria.scoring.heads import Head
from soteria.steering.checkpoint import fingerprint
from soteria.steering.formula import head_list_hash, open_steering, steered_in_place
from soteria.storage import files
from soteria.storage.paths import ANSWER_COLUMNS, BASE_ANSWER, BENIGN, SAFE_ANSWER

BENIGN_JUDGE = "refusal"  # whatever judges the attacks: a harmless question is answered or it is refused


class CellWork:
    """One cell: what of it is done, and how the rest is measured."""

    def __init__(self, subject: Subject, cell: Cell):
        self.subject, self.cell, self.results = subject, cell, subject.results
        self.language = find_language(cell.language)
        self.refused: dict[str, UserError] = {}  # what cannot be asked or measured, and why

    @cached_property
    def heads(self) -> list[Head]:
        return self.subject.heads(self.cell.steering, self.cell.language) if self.cell.steering else []

    @cached_property
    def settings(self) -> dict:
        """What the cell's answers depend on beside the questions."""
        settings = self.subject.base_settings | {"language": self.cell.language}
        if self.cell.steering:
            steered = [
                settings["model_sha256"],
                fingerprint(self.subject.vector.tuned),
                head_list_hash(self.heads),
                self.cell.steering.scaling_factor,
            ]
            settings["model_sha256"] = hashlib.sha256(json.dumps(steered).encode()).hexdigest()
        return settings

    @property
    def sets(self) -> list[str]:
        with_benign = self.cell.with_cost and self.subject.grid.benign
        return [*self.cell.sets, *([BENIGN] if with_benign else [])]

    def path(self, name: str) -> Path:
        return self.cell.files(self.results).answers(name)

    def column(self, name: str) -> AnswerColumn:
        steering = self.cell.steering
        steered = steering and {
            "base_model": self.subject.pair.base,
            "finetune_model": self.subject.pair.tuned,
            "scaling_factor": steering.scaling_factor,
            "heads": steering.heads_name,
        }
        return AnswerColumn(
            self.path(name),
            SAFE_ANSWER if steering else BASE_ANSWER,
            self.subject.questions(name, self.cell.language),
            self.subject.pair.base,
            self.settings,
            steered=steered,
        )

    @cached_property
    def made_from(self) -> dict:
        """What `cell.json` depends on."""
        steering = self.cell.steering
        facts = {
            "base_model": self.subject.pair.base,
            "language": self.cell.language,
            "heads": steering.heads_name if steering else None,
            "scaling_factor": steering.scaling_factor if steering else None,
            "answers_from": self.settings,
        }
        if self.cell.with_cost:
            bench = self.subject.bench(self.cell.language)
            rows = {task: [[each.input, each.output] for each in split.test] for task, split in bench.tasks.items()}
            measured_on = json.dumps([bench.benign, rows, bench.seed, bench.n_prompts])
            facts["cost_measured_on_sha256"] = hashlib.sha256(measured_on.encode()).hexdigest()
        return facts

    def pending(self) -> list[str]:
        """The sets that lack answers, and `facts` where cell.json does. What cannot be asked is noted as refused."""
        lacking = []
        for name in (*self.sets, "facts"):
            try:
                if not self._is_done(name):
                    lacking.append(name)
            except NotScored:
                raise
            except UserError as error:  # the others may well be asked
                self.refused[name] = error
        return lacking

    def _is_done(self, name: str) -> bool:
        if name == "facts":
            return self.made_from.items() <= files.read_facts(self.cell.files(self.results).facts).items()
        column = self.column(name)
        complete = column.is_complete()
        if complete and self.subject.processes.is_first:
            column.forget_journal()
        return complete

    def measure(self) -> bool:
        """Steer, answer what is not answered, and write down what the cell was made from and what it costs.

        Gives whether there was anything to do.
        """
        pending = self.subject.processes.agree(self.pending())
        if pending:
            self._measure(pending)
        if self.refused:
            raise UserError("; ".join(dict.fromkeys(map(str, self.refused.values()))))
        return bool(pending)

    def _measure(self, pending: list[str]) -> None:
        subject, cell = self.subject, self.cell
        log_probs = None
        if "facts" in pending and cell.with_cost and subject.grid.benign:
            log_probs = subject.base_log_probs(cell.language)  # while the model is the base
        with self.steered():
            for name in pending:
                if name == "facts":
                    continue
                column, started = self.column(name), time.monotonic()
                fill(column, self.language, lambda: subject.loaded, subject.processes, subject.grid.answers.batch_size)
                subject.note_cost("answers", len(column.questions.questions), time.monotonic() - started)
            if "facts" in pending:
                started = time.monotonic()
                facts = self.made_from | self._steered_facts() | self._cost(log_probs)
                if subject.processes.is_first:
                    files.write_json(cell.files(self.results).facts, facts)
                if cell.with_cost:
                    subject.note_cost("cost", 1, time.monotonic() - started)

    def steered(self) -> AbstractContextManager:
        """The loaded model is this cell's for the length of a block."""
        if not self.cell.steering:
            return nullcontext()
        subject, factor = self.subject, self.cell.steering.scaling_factor
        opened = open_steering(subject.vector, self.heads, factor, source=self.cell.name)
        return steered_in_place(subject.loaded, opened)

    def _steered_facts(self) -> dict:
        if not self.cell.steering:
            return {"n_heads": 0, "share_of_parameters": 0.0}
        vector, geometry = self.subject.vector, self.subject.vector.geometry
        width = vector.base_place(0).shape[1 if geometry.transposed else 0]
        changed = len(self.heads) * geometry.head_dim * width
        return {
            "finetune_model": self.subject.pair.tuned,
            "n_heads": len(self.heads),
            "n_heads_total": geometry.n_layers * geometry.n_heads,
            "parameters_changed": changed,
            "share_of_parameters": changed / self.subject.n_parameters,
            "head_list": [list(head) for head in self.heads],
        }

    def _cost(self, base_log_probs: Tensor | None) -> dict:
        """Accuracy in context, and KL(base || cell) of each harmless answer's first token, in nats."""
        if not self.cell.with_cost:
            return {}
        language = self.cell.language
        accuracy = self.subject.bench(language).icl_accuracy(self.subject.loaded)
        found = {"icl_accuracy": {"count": accuracy.count, "n": accuracy.n}}
        if base_log_probs is not None:
            own = self.subject.first_tokens(language) if self.cell.steering else base_log_probs
            divergences = kl_divergence(base_log_probs.numpy(), own.numpy()).tolist()
            # The last digits depend on how many threads computed them.
            found["kl_first_token"] = [round(value, 6) for value in divergences]
        return found

    def measure_utility(self) -> None:
        """Measure the grid's tasks of lm-eval, where it has not been done."""
        from soteria.grid.utility import measure_utility, read_or_measure, utility_inputs

        grid, subject, wanted = self.subject.grid, self.subject, self.subject.grid.utility
        steering = {"answers_from": self.settings["model_sha256"]} if self.cell.steering else {}
        asked = (wanted.tasks, wanted.limit, [self.cell.language])
        inputs = utility_inputs(subject.pair.base, *asked, grid.dtype, **steering)

        def measure() -> dict:
            started = time.monotonic()
            with self.steered():
                found = measure_utility(
                    subject.loaded,
                    wanted.tasks,
                    limit=wanted.limit,
                    languages=[self.cell.language],
                    batch_size=grid.answers.batch_size,
                )
            subject.note_cost("utility", 1, time.monotonic() - started)
            return found

        if subject.processes.is_first:
            read_or_measure(self.cell.files(self.results).utility, inputs, measure)

    def judge(self, judges: "Judges") -> bool:
        """Judge what is answered and not judged, attacks by each of the grid's judges; gives whether there was any.

        A judge that fails does not keep the others from their turn. Raises UserError at the end.
        """
        new, refused = False, []
        for name, judge in self.judgements():
            if self.path(name).exists():
                try:
                    new = self._judge(name, judge, judges) or new
                except UserError as error:
                    refused.append(str(error))
        if refused:
            raise UserError("; ".join(dict.fromkeys(refused)))
        return new

    def _judge(self, name: str, judge: str, judges: "Judges") -> bool:
        """One set by one judge; gives whether it was new."""
        answers, started = Answers(self.path(name)), time.monotonic()
        inputs = inputs_of(answers, judge)
        with judges.using(judge) as get_judge:
            judged = judge_answers(answers, self.cell.files(self.results).verdicts(name, judge), inputs, get_judge)
        summary = describe(answers.path) | inputs | {"judge_description": judged.description}
        summary |= {ANSWER_COLUMNS[column][1]: summarise(given) for column, given in judged.verdicts.items()}
        judged.write(summary)
        is_new = judged.journals is not None
        if is_new:
            self.subject.note_cost(f"judge {judge}", answers.n_rows, time.monotonic() - started)
        return is_new

    def judgements(self) -> Iterator[tuple[str, str]]:
        """(set, judge) for everything that is to be judged."""
        for name in self.sets:
            for judge in (BENIGN_JUDGE,) if name == BENIGN else self.subject.grid.judges:
                yield name, judge


class Judges:
    """The judges by name, each made once, when it is first needed.

    One that failed is not asked again: an endpoint that does not answer would try the patience of every cell.
    """

    def __init__(self):
        self._made = remembered(make_judge)
        self._lost: dict[str, UserError] = {}

    def get(self, name: str) -> Judge:
        if name in self._lost:
            raise self._lost[name]
        return self._made(name)

    @contextmanager
    def using(self, name: str) -> Iterator[Callable[[], Judge]]:
        """What gives the judge, for the length of a block. A UserError in the block is taken for the judge's end."""
        try:
            yield lambda: self.get(name)
        except UserError as error:
            self._lost.setdefault(name, error)
            raise
