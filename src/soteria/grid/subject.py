"""A base model of a grid, with everything its cells are made from, each read when it is first needed."""

import math
import time
from collections.abc import Callable
from functools import cache, cached_property, wraps
from pathlib import Path

from torch import Tensor

from soteria.answering.columns import model_settings
from soteria.answering.decoding import first_token_log_probs
from soteria.answering.generation import all_inputs
from soteria.answering.questions import QuestionSet, spread_rows
from soteria.errors import UserError
from soteria.grid import durations
from soteria.grid.cells import DRAWN, MATCHED, Treatment, method_of
from soteria.grid.grid_file import ABSOLUTE, RIVALS, SAFETY, TASK_VECTOR, Grid, Pair, Questions
from soteria.grid.serving import Serving
from soteria.judging.costs import read_tasks
from soteria.languages import Language, find_language
from soteria.models.loading import (
    DTYPES,
    LoadedModel,
    check_chat_template,
    default_device,
    load_config,
    load_model,
    resolve_dtype,
)
from soteria.models.processes import Processes
from soteria.models.task_vector import TaskVector
from soteria.scoring.heads import (
    Head,
    count_share,
    group_heads,
    mean_effect,
    random_heads,
    rank_heads,
    read_heads,
)
from soteria.scoring.prompts import ANSWERS, Split
from soteria.scoring.run import DatasetRun, ScoringSettings
from soteria.scoring.safety import SafetyRun, mean_divergence
from soteria.steering.formula import is_steered
from soteria.storage import files, paths
from soteria.storage.paths import BASE_ANSWER, BENIGN


class NotScored(UserError):
    """A head list cannot be made yet: another shard has to score a language first."""


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
    """A base model of the grid, and what its cells are made from."""

    def __init__(self, grid: Grid, pair: Pair, results: Path, processes: Processes, serving: Serving | None = None):
        self.grid, self.pair, self.results, self.processes, self.serving = grid, pair, results, processes, serving
        self.scores = grid.scores(results, pair)
        self.device = "none"  # until the model is loaded
        self._load = remembered(self._load_base)
        self.ranking = cache(self._ranking)
        self.questions = remembered(self._questions)
        self.tasks = remembered(self._tasks)
        self.base_log_probs = cache(self._base_log_probs)

    # The model

    @property
    def loaded(self) -> LoadedModel:
        """The base in memory."""
        return self._load()

    def _load_base(self) -> LoadedModel:
        started = time.monotonic()
        loaded = load_model(self.pair.base, self.processes.device, self.grid.dtype)
        self.device = str(loaded.model.device)
        self.note_duration("load", 1, time.monotonic() - started)
        return loaded

    def unload(self) -> None:
        """Release the model: a judge may need the memory."""
        self.device, self._load = "none", remembered(self._load_base)

    @cached_property
    def dtype(self) -> str:
        """The dtype that this run's model has, `auto` resolved.

        Raises UserError where the cells of this model were begun in another one: their numbers would not compare.
        """
        device = self.processes.device or default_device()
        dtype = str(resolve_dtype(self.grid.dtype, device)).removeprefix("torch.")
        if dtype == "auto":  # the checkpoint's own
            stored = load_config(self.pair.base).get_text_config().dtype or self.loaded.model.dtype
            dtype = str(stored).removeprefix("torch.")
        noted = paths.dtype_file(self.results, self.pair.slug)
        if not noted.exists() and self.processes.is_first:
            files.write_text(noted, f"{dtype}\n")
        self.processes.wait()
        begun = noted.read_text(encoding="utf-8", errors="replace").strip()
        if begun not in DTYPES:
            raise UserError(f"{noted} does not name the dtype of its cells; write {' or '.join(DTYPES)} into it")
        if begun != dtype:
            raise UserError(
                f"{self.pair.slug}'s cells in {self.results} were begun in {begun}, and this run would use {dtype}; "
                f"give `dtype: {begun}` in the grid file, or another --results"
            )
        return dtype

    @cached_property
    def vector(self) -> TaskVector:
        return TaskVector.open(self.pair.base, self.pair.tuned)

    @cached_property
    def base_settings(self) -> dict:
        """What the base's answers depend on, beside the language. Raises UserError if it lacks the chat template."""
        language = find_language(self.grid.languages[0])
        if self.pair.chat_template:
            check_chat_template(self.pair.base, "chat_template in the grid file")
        longest, asked = self.grid.longest(BASE_ANSWER), (self.pair.chat_template, self.grid.preset)
        settings = model_settings(self.pair.base, language, longest, *asked, self.grid.answers.engine)
        return settings | {"dtype": self.dtype}

    @cached_property
    def n_parameters(self) -> int:
        return sum(math.prod(place.shape) for place in self.vector.base.places.values())

    # Heads

    def scoring(self, answer: str) -> ScoringSettings:
        """Step 1's settings, by an answer's first token or the whole of it."""
        return ScoringSettings(
            model_name=self.pair.base,
            root_data_dir=self.grid.icl,
            save_path_root=self.grid.scores(self.results, self.pair, answer),
            dtype=self.grid.dtype,
            **self.grid.scoring.model_dump() | {"answer": answer},
        )

    def dataset_runs(self, language: str, answer: str) -> list[DatasetRun]:
        """Step 1 of a language, as this grid and this model have it."""
        settings, digest = self.scoring(answer), self.base_settings["model_sha256"]
        datasets = [f"{task}_{language}" for task in self.grid.tasks]
        return [DatasetRun(dataset, settings.save_path_root, settings, digest) for dataset in datasets]

    def safety_run(self, language: str) -> SafetyRun:
        """The scoring of a language's heads by safety, on the grid's questions for that."""
        spoken, asked = find_language(language), self.grid.safety_questions
        sets = [self._read(each, language) for each in (asked.harmless, asked.harmful)]

        def inputs(loaded: LoadedModel) -> list[list[list[int]]]:
            return [self._inputs(loaded, each.questions, spoken) for each in sets]

        asked = [self.base_settings[name] for name in ("chat_template", "model_sha256")]
        asked += [[each.questions for each in sets], spoken.instruction]
        return SafetyRun(language, self.scores, self.scoring(self.grid.scoring.answer), asked, inputs)

    def _ranking(self, language: str, by: str = "top") -> list[Head]:
        """The language's heads, best first: by the method's ranking, its list in `head_folder`, or a rival ranking.

        Raises NotScored where step 1 has not run yet, UserError for a missing or broken list.
        """
        if by == TASK_VECTOR:
            return rank_heads(self.vector.head_norms)
        if by == SAFETY:
            if not self.safety_run(language).is_finished():
                raise NotScored(f"waits for the safety scores of {language}")
            return rank_heads(mean_divergence(self.scores, language))
        if self.grid.head_folder:
            return read_heads(paths.head_folder(self.grid.head_folder) / paths.language_file(language))
        answer = by if by in ANSWERS else self.grid.scoring.answer
        if not all(run.is_finished() for run in self.dataset_runs(language, answer)):
            raise NotScored(f"waits for the scores of {language}")
        effect = mean_effect(self.grid.scores(self.results, self.pair, answer), language, self.grid.tasks)
        return rank_heads(effect.abs() if by == ABSOLUTE else effect)

    def unscored(self, languages: list[str], answer: str | None = None) -> list[str]:
        """Those of the languages that lack the scores of a task."""
        if self.grid.head_folder:
            return []
        scores = self.grid.scores(self.results, self.pair, answer)
        return [
            language
            for language in languages
            if not all(paths.effect_path(scores, f"{task}_{language}").exists() for task in self.grid.tasks)
        ]

    def need_scores(self, languages: list[str], answer: str | None = None) -> None:
        """Raise NotScored where one of the languages lacks scores."""
        if missing := self.unscored(languages, answer):
            raise NotScored(f"waits for the scores of {', '.join(missing)}")

    def heads(self, treatment: Treatment, language: str) -> list[Head]:
        """The heads of a treatment. Raises NotScored, or UserError for a group without a shared head."""
        every = self.vector.geometry.all_heads
        if treatment.kind == "shared":
            self.need_scores(treatment.needs(self.grid, language))
            return self.shared_heads(treatment.of)
        if treatment.kind == "all":
            return every
        of, share = treatment.of if treatment.kind == "from" else language, treatment.share
        count = len(self.ranking(of)) if share is None else count_share(share, len(every))
        if treatment.kind in DRAWN:
            return random_heads(every, count, int(treatment.of))
        if treatment.kind in RIVALS:
            return self.ranking(of, treatment.kind)[:count]
        return self.ranking(of)[-count:] if treatment.kind == "bottom" else self.ranking(of)[:count]

    def scaling_factor(self, treatment: Treatment, language: str) -> float:
        """A treatment's λ. That of matched heads changes their slices by the norm that the method changes its own by.

        It is kept to nine digits: the last ones depend on the machine.
        """
        if treatment.kind != MATCHED:
            return treatment.scaling_factor
        norms = self.vector.head_norms
        own, method = (
            math.hypot(*(norms[head].item() for head in heads))
            for heads in (self.heads(treatment, language), self.method_heads(language))
        )
        return float(f"{treatment.scaling_factor * method / own:.9g}") if own else treatment.scaling_factor

    def method_heads(self, language: str) -> list[Head]:
        return self.heads(method_of(self.grid), language)

    def shared_heads(self, group: str) -> list[Head]:
        """Heads that more than half of a group's languages in this grid have among their best."""
        heads = group_heads([self.method_heads(language) for language in self.grid.group(group)])
        if not heads:
            raise UserError(f"no head is shared by more than half of the languages of group {group}")
        return heads

    # Questions and prompts

    def _questions(self, name: str, language: str, n: int | None = None) -> QuestionSet:
        """A set's questions in a language; `n`: only so many, spread over the set."""
        if n is not None:
            every = self.questions(name, language)
            return every.at(spread_rows(len(every.questions), n))
        return self._read(self.grid.questions(name), language)

    def _read(self, asked: Questions, language: str) -> QuestionSet:
        """A set's questions, or so many of them, spread over it, as the grid wants."""
        found = asked.read(language)
        n_rows = len(found.questions)
        return found.at(spread_rows(n_rows, self.grid.answers.questions or n_rows))

    def _inputs(self, loaded: LoadedModel, questions: list[str], language: Language) -> list[list[int]]:
        return all_inputs(loaded, questions, language, self.pair.chat_template, self.grid.preset)

    def _tasks(self, language: str) -> dict[str, Split]:
        """The in-context rows, split as step 1 splits them."""
        scoring = self.grid.scoring
        return read_tasks(self.grid.icl, self.grid.tasks, find_language(language), scoring.test_split, scoring.seed)

    def first_tokens(self, language: str) -> Tensor:
        """Log-probabilities (questions, vocabulary) of the first answer token to the harmless questions, as the model
        stands."""
        questions = self.questions(BENIGN, language).questions
        inputs = self._inputs(self.loaded, questions, find_language(language))
        return first_token_log_probs(self.loaded, inputs, self.grid.answers.batch_size)

    def _base_log_probs(self, language: str) -> Tensor:
        """`first_tokens` of the base. Raises RuntimeError while the model is steered."""
        if is_steered(self.loaded):
            raise RuntimeError("the model is steered; compute the base's log-probabilities before steering it")
        return self.first_tokens(language)

    def note_duration(self, step: str, units: int, seconds: float) -> None:
        """Write down how long a step took, for `--plan`."""
        if self.processes.is_first and units > 0:
            device = (step == "answers" and self.grid.answers.engine) or self.device
            taken = {"step": step, "units": units, "seconds": round(seconds, 3), "device": device}
            durations.note(self.results, self.pair.slug, taken)
