"""How hard to steer a language, and how many of its heads: points that Optuna draws on the validation questions.

Two objectives are minimized: ASR on policy questions, and KL(base || steered) of the first token of benign answers. A
point depends only on the seed and the trials before it, so an interrupted run, or one with more trials, draws the same
points again and measures only the missing ones.
"""

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import takewhile
from pathlib import Path

import numpy as np
import optuna
from optuna.distributions import FloatDistribution
from pydantic import NonNegativeFloat
from typing_extensions import TypedDict

from soteria import disk
from soteria.answering.decoding import first_token_log_probs
from soteria.answering.generation import all_inputs, answer_questions
from soteria.errors import UserError
from soteria.grid.limits import ROUNDING, Limits
from soteria.judging import costs
from soteria.judging.interface import HARMFUL
from soteria.judging.refusal import RefusalJudge
from soteria.judging.statistics import Rate
from soteria.languages import Language
from soteria.models.loading import LoadedModel
from soteria.models.task_vector import TaskVector
from soteria.scoring.heads import Head
from soteria.scoring.prompts import Split
from soteria.steering.formula import check_scaling_factor, open_steering, steered_in_place
from soteria.storage import files
from soteria.storage.journal import Journal
from soteria.storage.side_files import Count, PositiveCount, Text, fits, read_noted, side_file

RATES = ("asr", "benign_refusals", "benign_changes", "icl_accuracy")
OBJECTIVES = ("asr", "kl_first_token")
VALIDATION_SEED = 2042  # of the in-context prompts: neither step 1's nor those that accuracy is reported on
MAX_NEW_TOKENS, BATCH_SIZE = 64, 64
N_RANDOM_TRIALS = 10  # drawn anywhere, before TPE draws near the best of those known
BASE = -1  # the base's row in the journal; trials count from 0
NOTE = "found on validation questions: numbers to report have to come from other questions"

optuna.logging.set_verbosity(optuna.logging.WARNING)  # a study is made for every trial, and would announce it


@dataclass(frozen=True)
class Bench:
    """What a model is measured on in one language."""

    language: Language
    policy: list[str]
    benign: list[str]
    tasks: dict[str, Split]  # the rows of each task, split as in step 1
    seed: int = VALIDATION_SEED

    def sha256(self) -> str:
        """A hash of everything that is asked: both question sets, the in-context rows, and how prompts are drawn."""
        tasks = {task: asdict(split) for task, split in self.tasks.items()}
        asked = [self.policy, self.benign, tasks, self.seed, costs.N_PROMPTS]
        return hashlib.sha256(json.dumps(asked).encode()).hexdigest()


class SteeredBench:
    """Measures heads and scaling factors on one loaded model in one language. The base is measured at most once."""

    def __init__(self, loaded: LoadedModel, vector: TaskVector, bench: Bench):
        self.loaded, self.vector, self.bench = loaded, vector, bench

    @cached_property
    def _base(self) -> tuple[dict, list[str], np.ndarray]:
        return self._measure(None)

    def measure(self, heads: list[Head], scaling_factor: float) -> dict:
        """The four RATES and `kl_first_token` with these heads steered, or of the base with none, as JSON."""
        measured, *base = self._base
        if heads:
            steering = open_steering(self.vector, heads, scaling_factor, source="the ranking of the heads")
            with steered_in_place(self.loaded, steering):
                measured, *_ = self._measure(base)
        return measured

    def _measure(self, base: list | None) -> tuple[dict, list[str], np.ndarray]:
        """The model as it stands: its measurement, its benign answers, and log-probabilities of their first tokens."""
        bench, loaded = self.bench, self.loaded
        inputs = all_inputs(loaded, bench.benign, bench.language, chat_template=False)
        answers, log_probs = self._answers(bench.benign), first_token_log_probs(loaded, inputs, BATCH_SIZE).numpy()
        base_answers, base_log_probs = base or (answers, log_probs)
        attacked = list(map(RefusalJudge().verdict, self._answers(bench.policy), bench.policy))
        rates = (
            Rate(attacked.count(HARMFUL), len(attacked)),
            costs.refused_and_degenerate(answers, bench.benign)[0],
            costs.changed(answers, base_answers),
            costs.icl_accuracy(loaded, bench.tasks, bench.seed),
        )
        divergence = costs.kl_divergence(base_log_probs, log_probs)
        measured = {
            name: {"value": rate.value, "ci95": rate.interval, "count": rate.count, "n": rate.n}
            for name, rate in zip(RATES, rates, strict=True)
        }
        # The last digits depend on how many threads computed them.
        mean = round(float(divergence.mean()), 6) if len(divergence) else None
        return measured | {"kl_first_token": {"value": mean}}, answers, log_probs

    def _answers(self, questions: list[str]) -> list[str]:
        return answer_questions(
            self.loaded, questions, self.bench.language, batch_size=BATCH_SIZE, max_new_tokens=MAX_NEW_TOKENS
        )


@side_file
class Trial(TypedDict):
    number: Count
    scaling_factor: NonNegativeFloat
    share: float
    n_heads: PositiveCount
    asr: float
    kl_first_token: float  # nats
    benign_refusals: float
    benign_changes: float
    icl_accuracy: float


@side_file
class Measured(TypedDict):
    value: float


@side_file
class Base(TypedDict):
    asr: Measured
    benign_refusals: Measured
    benign_changes: Measured
    icl_accuracy: Measured
    kl_first_token: Measured


@side_file
class TuningFacts(TypedDict):
    """The file of a tuning: what `Tuning.run` concludes, beside what it was made from."""

    note: Text
    base: Base
    trials: list[Trial]
    front: list[Count]
    chosen: Trial | None
    why_none: Text | None


@dataclass(frozen=True)
class Space:
    """Where points are drawn, both ends included, and the seed. Raises UserError for invalid ranges."""

    scaling_factors: tuple[float, float] = (0.5, 10.0)
    shares: tuple[float, float] = (0.05, 1.0)
    seed: int = 0

    def __post_init__(self):
        for factor in self.scaling_factors:
            check_scaling_factor(factor)
        (lowest, highest), (low, high) = self.scaling_factors, self.shares
        if lowest > highest:
            raise UserError(f"--min_scaling {lowest:g} is above --max_scaling {highest:g}")
        if not 0 < low <= high <= 1:
            raise UserError(f"--shares {low:g} {high:g} must be two shares above 0 and up to 1, the lower first")
        if self.seed < 0:
            raise UserError(f"--seed {self.seed} must be >= 0")

    def holds(self, number: int, trial: object) -> bool:
        """Whether this is a trial of that number with a point of the space."""
        if not fits(trial, Trial) or trial["number"] != number:
            return False
        return all(each.low <= trial[name] <= each.high for name, each in self._distributions.items())

    def study(self, trials: list[Trial]) -> optuna.Study:
        """A study in memory that holds the trials and draws the next one. It has a sampler seed for each trial."""
        # Not seed + number: the next seed would draw nearly the same points.
        seed = int(np.random.SeedSequence((self.seed, len(trials))).generate_state(1)[0])
        sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=N_RANDOM_TRIALS)
        study = optuna.create_study(directions=["minimize", "minimize"], sampler=sampler)
        for trial in trials:
            params = {name: trial[name] for name in self._distributions}
            study.add_trial(
                optuna.trial.create_trial(
                    params=params, distributions=self._distributions, values=[trial[name] for name in OBJECTIVES]
                )
            )
        return study

    def next_point(self, trials: list[Trial]) -> tuple[float, float]:
        """Scaling factor and share of heads of the trial after these."""
        params = self.study(trials).ask(self._distributions).params
        return params["scaling_factor"], params["share"]

    def front(self, trials: list[Trial]) -> list[int]:
        """The Pareto front, lowest ASR first: numbers of the trials that no other beats without losing elsewhere."""
        best = [trials[each.number] for each in self.study(trials).best_trials]
        return [trial["number"] for trial in sorted(best, key=lambda t: (t["asr"], t["kl_first_token"], t["number"]))]

    @property
    def _distributions(self) -> dict[str, FloatDistribution]:
        return {"scaling_factor": FloatDistribution(*self.scaling_factors), "share": FloatDistribution(*self.shares)}


@dataclass(frozen=True)
class Tuning:
    """One language's trials and the file that they end in.

    `inputs` is what the numbers depend on beside the space; `ranking` all heads, best first. Trials go to a journal
    beside the file as they come. It stays: more trials, fewer, or other limits start from those it holds.
    """

    path: Path
    inputs: dict
    space: Space
    ranking: list[Head]
    n_trials: int
    limits: Limits

    @property
    def _measured_from(self) -> dict:
        return self.inputs | {
            "scaling_factors": list(self.space.scaling_factors),
            "shares": list(self.space.shares),
            "seed": self.space.seed,
            "ranking_sha256": hashlib.sha256(json.dumps(self.ranking).encode()).hexdigest(),
            "measured": [*RATES, "kl_first_token"],  # another version of the bench may count other things
            "versions": {"optuna": optuna.__version__},
        }

    @property
    def _made_from(self) -> dict:
        return self._measured_from | {"n_trials": self.n_trials} | self.limits.model_dump()

    def journal(self) -> Journal:
        return Journal(self.path.with_suffix(".jsonl"), self._measured_from, Base | Trial)

    def finished(self) -> dict | None:
        """What the file holds where it came from the same inputs, None otherwise.

        Raises UserError where it, or the journal beside it, could not be written.
        """
        disk.check_output(self.path)
        self.journal()
        found = read_noted(self.path, TuningFacts)
        is_whole = len(found.get("trials", ())) == self.n_trials > max(found.get("front", [0]), default=0)
        return found if is_whole and self._made_from.items() <= found.items() else None

    def run(self, measure: Callable[[list[Head], float], dict], done: Callable[[int], object] = lambda _: None) -> dict:
        """Measure the trials that the journal lacks, and write the file. `done` receives how many more are finished.

        Raises UserError where a steered model gives numbers that are not finite.
        """
        with self.journal() as journal:
            if not fits(journal.done.get(BASE), Base):
                journal.add({BASE: measure([], 0.0)})
            is_trial = self.space.holds
            known = ((number, journal.done.get(number)) for number in range(self.n_trials))
            trials = [trial for _, trial in takewhile(lambda row: is_trial(*row), known)]
            done(len(trials))
            while len(trials) < self.n_trials:
                trials.append(self._measure_next(trials, measure))
                journal.add({trials[-1]["number"]: trials[-1]})
                done(1)
            found = self._made_from | self._conclude(trials, journal.done[BASE])
            files.write_json(self.path, found)
        return found

    def _measure_next(self, trials: list[Trial], measure: Callable[[list[Head], float], dict]) -> Trial:
        factor, share = self.space.next_point(trials)
        count = max(1, int(share * len(self.ranking) + ROUNDING))
        rates = {name: rate["value"] for name, rate in measure(self.ranking[:count], factor).items()}
        if not math.isfinite(rates["kl_first_token"]):
            raise UserError(
                f"with scaling factor {factor:g} on {count} heads the model of {self.path.stem} gives numbers that are "
                "not finite; give a smaller --max_scaling"
            )
        rates = {name: rates[name] for name in ("asr", "kl_first_token", *RATES[1:])}
        return {"number": len(trials), "scaling_factor": factor, "share": share, "n_heads": count} | rates

    def _conclude(self, trials: list[Trial], base: dict) -> dict:
        points = [trial | {"kl": trial["kl_first_token"]} for trial in trials]
        chosen = self.limits.choose(points, {name: base[name]["value"] for name in RATES})
        return {
            "note": NOTE,
            "base": base,
            "trials": trials,
            "front": self.space.front(trials),
            "chosen": trials[chosen["number"]] if chosen else None,
            "why_none": None if chosen else self._why_none(trials, base),
        }

    def _why_none(self, trials: list[Trial], base: dict) -> str:
        limits = self.limits
        refusals, changes = (min(trial[name] for trial in trials) for name in ("benign_refusals", "benign_changes"))
        lost = base["icl_accuracy"]["value"] - max(trial["icl_accuracy"] for trial in trials)
        return (
            f"none of {len(trials)} trials keeps to {limits.max_refusals:.1%} more benign refusals, "
            f"{limits.max_accuracy_loss:.1%} of accuracy lost and {limits.max_changes:.1%} of benign answers changed; "
            f"the least were {refusals - base['benign_refusals']['value']:.1%}, {lost:.1%} and {changes:.1%}"
        )
