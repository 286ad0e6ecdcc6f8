"""A base model of a grid, with everything its cells are made from, each read when it is first needed."""

import json
import math
import time
from collections.abc import Callable
from functools import cache, cached_property, wraps
from pathlib import Path

from torch import Tensor

from soteria.answering.columns import model_settings
from soteria.answering.decoding import first_token_log_probs
from soteria.answering.generation import all_inputs
from soteria.answering.questions import QuestionSet, read_questions
from soteria.errors import UserError
from soteria.grid.cells import Steering, method_of
from soteria.grid.comparison import ACCURACY_SEED, Bench, read_tasks
from soteria.grid.grid_file import Grid, Pair
from soteria.languages import find_language
from soteria.models.loading import LoadedModel, load_model
from soteria.models.processes import Processes
from soteria.models.task_vector import TaskVector
from soteria.scoring.heads import Head, count_share, group_heads, mean_effect, random_heads, rank_heads
from soteria.scoring.prompts import Split
from soteria.storage import paths
from soteria.storage.paths import BENIGN, effect_path


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
        self.scores = paths.scores_folder(results, pair.slug)
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
        return self.heads(method_of(self.grid), language)

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
        path = paths.durations_file(self.results, self.pair.slug)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(cost) + "\n")
