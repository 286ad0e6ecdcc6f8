"""The cells of a grid, measured: score, select, steer, answer, judge, each model loaded once.

Knows cells and the steps' own functions; makes no tables. What is done is found by what it was made from, so a run that
goes on after an interruption, or on another machine, measures only what is missing. A cell that fails is noted and
passed by.
"""

import hashlib
import json
import math
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, cached_property, wraps
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from soteria import files
from soteria.answers import AnswerColumn, model_settings
from soteria.comparison import ACCURACY_SEED, Bench, read_tasks
from soteria.damage import kl_divergence
from soteria.decoding import first_token_log_probs
from soteria.errors import UserError
from soteria.evaluation import summarise
from soteria.files import ANSWER_COLUMNS, BASE_ANSWER, SAFE_ANSWER
from soteria.generation import all_inputs, fill
from soteria.grid import BENIGN, Cell, Grid, Pair, Shard, Steering
from soteria.heads import (
    Head,
    count_share,
    group_file,
    group_heads,
    language_file,
    mean_effect,
    random_heads,
    rank_heads,
    write_heads,
)
from soteria.icl import Split
from soteria.judges import Judge, make_judge
from soteria.languages import TIERS, find_language, group_languages
from soteria.models import LoadedModel, load_model
from soteria.processes import Processes
from soteria.questions import QuestionSet, read_questions
from soteria.scoring import effect_path
from soteria.steering import fingerprint, head_list_hash, steered_in_place
from soteria.task_vector import TaskVector
from soteria.verdicts import Answers, describe, inputs_of, judge_answers

BENIGN_JUDGE = "refusal"  # whatever judges the attacks: a harmless question is answered or it is refused


class NotScored(UserError):
    """A head list cannot be made yet: another shard is to score a language first."""


def remembered(function: Callable) -> Callable:
    """The function with its results remembered, and its failures too: a hub that does not answer is asked once."""
    known = {}

    @wraps(function)
    def ask(*arguments):
        if arguments not in known:
            try:
                known[arguments] = (function(*arguments), None)
            except Exception as error:
                known[arguments] = (None, error)
        result, error = known[arguments]
        if error:
            raise error
        return result

    return ask


class Subject:
    """A base model of the grid and what its cells are made with, each read when it is first needed."""

    def __init__(self, grid: Grid, pair: Pair, results: Path, processes: Processes):
        self.grid, self.pair, self.results, self.processes = grid, pair, results, processes
        self.scores = results / "indirect_effect" / pair.slug
        self.device = "none"  # until the model is loaded
        self._load = remembered(self._load_base)
        self.ranking = cache(self._ranking)
        self.questions = remembered(self._questions)
        self.tasks = remembered(self._tasks)
        self.base_log_probs = cache(self.first_tokens)  # to be asked for while the model is the base

    @property
    def loaded(self) -> LoadedModel:
        """The base in memory, loaded when it is first asked for."""
        return self._load()

    def _load_base(self) -> LoadedModel:
        started = time.monotonic()
        loaded = load_model(self.pair.base, self.processes.device, self.grid.dtype)
        self.device = str(loaded.model.device)
        self.note_cost("load", 1, time.monotonic() - started)
        return loaded

    def unload(self) -> None:
        """Let the model go: a judge may need the room."""
        self.device, self._load = "none", remembered(self._load_base)

    @cached_property
    def vector(self) -> TaskVector:
        return TaskVector.open(self.pair.base, self.pair.tuned)

    @cached_property
    def task_vectors(self) -> list[Tensor]:
        vectors = [self.vector.at(layer) for layer in range(self.vector.geometry.n_layers)]
        if not any(vector.any() for vector in vectors):
            raise self.vector.equality()
        return vectors

    @cached_property
    def base_settings(self) -> dict:
        """What the base's answers depend on, beside the language."""
        language = find_language(self.grid.languages[0])
        settings = model_settings(self.pair.base, language, self.grid.answers.max_new_tokens, self.pair.chat_template)
        return settings | {"dtype": self.grid.dtype}

    @cached_property
    def n_parameters(self) -> int:
        return sum(math.prod(place.shape) for place in self.vector.base.places.values())

    def _ranking(self, language: str) -> list[Head]:
        """All heads of the model, best for the language first. Raises NotScored where step 1 has not been."""
        missing = self.unscored(language)
        if missing:
            raise NotScored(f"waits for the scores of {', '.join(missing)}")
        return rank_heads(mean_effect(self.scores, language, self.grid.tasks))

    def unscored(self, *languages: str) -> list[str]:
        """Those of the languages of which a task has not been scored."""
        paths = {name: [effect_path(self.scores, f"{task}_{name}") for task in self.grid.tasks] for name in languages}
        return [language for language, own in paths.items() if not all(path.exists() for path in own)]

    def heads(self, steering: Steering, language: str) -> list[Head]:
        """The heads of a steering. Raises NotScored, or UserError for a group without a shared head."""
        geometry = self.vector.geometry
        total = geometry.n_layers * geometry.n_heads
        if steering.kind == "shared":
            missing = self.unscored(*steering.needs(self.grid, language))
            if missing:
                raise NotScored(f"waits for the scores of {', '.join(missing)}")
            return self.shared_heads(steering.of)
        count = count_share(steering.share, total)
        if steering.kind == "random":
            return random_heads(geometry.n_layers, geometry.n_heads, count, int(steering.of))
        if steering.kind == "all":
            return [divmod(index, geometry.n_heads) for index in range(total)]
        ranking = self.ranking(steering.of if steering.kind == "from" else language)
        return ranking[-count:] if steering.kind == "bottom" else ranking[:count]

    def method_heads(self, language: str) -> list[Head]:
        return self.heads(self.grid.method, language)

    def shared_heads(self, group: str) -> list[Head]:
        """Heads that more than half of a group's languages in this grid have among their best."""
        heads = group_heads([self.method_heads(language) for language in self.grid.group(group)])
        if not heads:
            raise UserError(f"no head is shared by more than half of the languages of group {group}")
        return heads

    def _questions(self, name: str, language: str) -> QuestionSet:
        """A prompt set's questions in a language, or the harmless ones."""
        if name == BENIGN:
            found = read_questions(self.grid.benign_in(language), find_language(language))
        else:
            asked = self.grid.prompt_set(name)
            found = read_questions(
                asked.dataset_in(language), find_language(language), split=asked.split, column=asked.column
            )
        first = self.grid.answers.questions
        return QuestionSet(found.name, found.questions[:first], found.categories[:first] if found.categories else None)

    def _tasks(self, language: str) -> dict[str, Split]:
        return read_tasks(self.grid.icl, self.grid.tasks, find_language(language))

    def bench(self, language: str) -> Bench:
        """What a cell's cost is measured on."""
        benign = self.questions(BENIGN, language).questions if self.grid.benign else []
        return Bench(find_language(language), [], benign, self.tasks(language), ACCURACY_SEED)

    def first_tokens(self, language: str) -> Tensor:
        """Log-probabilities (questions, vocabulary) of the first token of the answers to the harmless questions."""
        questions = self.questions(BENIGN, language).questions
        inputs = all_inputs(self.loaded, questions, find_language(language), self.pair.chat_template)
        return first_token_log_probs(self.loaded, inputs, self.grid.answers.batch_size)

    def note_cost(self, step: str, units: int, seconds: float) -> None:
        """Write down what a step took: `--plan` goes by it. A line is one write, so processes may share the file."""
        if not self.processes.is_first or units == 0:
            return
        cost = {"step": step, "units": units, "seconds": round(seconds, 3), "device": self.device}
        path = costs_file(self.results, self.pair)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(cost) + "\n")


def model_failure(results: Path, slug: str) -> Path:
    """Why a model could not be had, while it could not."""
    return results / "cells" / slug / "failed.txt"


def costs_file(results: Path, pair: Pair) -> Path:
    """Where what the steps took is written down."""
    return results / "cells" / pair.slug / "costs.jsonl"


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
        return self.cell.benign(self.results) if name == BENIGN else self.cell.answers(self.results, name)

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
            return self.made_from.items() <= files.read_facts(self.cell.facts(self.results)).items()
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
                    files.write_json(cell.facts(self.results), facts)
                if cell.with_cost:
                    subject.note_cost("cost", 1, time.monotonic() - started)

    def steered(self) -> AbstractContextManager:
        """The loaded model is this cell's for the length of a block."""
        if not self.cell.steering:
            return nullcontext()
        subject, factor = self.subject, self.cell.steering.scaling_factor
        return steered_in_place(subject.loaded, subject.task_vectors, self.heads, factor)

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
        from soteria.utility import measure_utility, read_or_measure, utility_inputs

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
            read_or_measure(self.cell.utility(self.results), inputs, measure)

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
            judged = judge_answers(answers, self.cell.verdicts(self.results, name, judge), inputs, get_judge)
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
            cells = [cell for language in languages for cell in self.grid.cells_of(pair, language)]
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
            with self._noting(cell.name, cell.failure(self.results, what)):
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
        folder = self.results / "heads" / subject.pair.slug
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
            for cell in self.grid.cells_of(subject.pair, language):
                if cell.steering in (None, self.grid.method):
                    with self._noting(f"{cell.name}/utility"):
                        CellWork(subject, cell).measure_utility()
