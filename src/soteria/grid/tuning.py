"""How hard to steer a language, and with how many of its heads: points that Optuna draws on the validation questions.

Two things are to be small at once: ASR on policy questions, and KL(base || steered) of the first token of benign
answers. A point is drawn from the seed and from the trials before it, nothing else: an interrupted run, or one of more
trials, draws the same points again and measures only those that are not noted yet.
"""

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import optuna
from optuna.distributions import FloatDistribution

from soteria.errors import UserError
from soteria.grid.comparison import RATES, Bench, Benign, Measurement
from soteria.judging.interface import Judge
from soteria.models.loading import LoadedModel
from soteria.models.task_vector import TaskVector
from soteria.scoring.heads import Head
from soteria.steering.formula import check_scaling_factor, open_steering, steered_in_place
from soteria.storage import files
from soteria.storage.journal import Journal

N_RANDOM_TRIALS = 10  # drawn anywhere, before TPE draws near the best of those known
BASE = -1  # the base's row in the journal; trials count from 0
ROUNDING = 1e-9  # 98.4 % - 96.4 % is above 2 % in floating point
NOTE = "found on validation questions: numbers to report have to come from other questions"

optuna.logging.set_verbosity(optuna.logging.WARNING)  # a study is made for every trial, and would say so


def count_share(share: float, n_heads_total: int) -> int:
    """How many heads a share in (0, 1] of all heads is: rounded down, one at least."""
    return max(1, int(share * n_heads_total + ROUNDING))


@dataclass(frozen=True)
class Trial:
    """One point and what was measured there; `kl_first_token` in nats, the others shares of the rows."""

    number: int
    scaling_factor: float
    share: float
    n_heads: int
    asr: float
    kl_first_token: float
    benign_refusals: float
    benign_changes: float
    icl_accuracy: float

    @property
    def objectives(self) -> tuple[float, float]:
        """What is to be small."""
        return self.asr, self.kl_first_token


@dataclass(frozen=True)
class Space:
    """Where points are drawn, both ends included, and the seed. Raises UserError for ranges that are none."""

    scaling_factors: tuple[float, float] = (0.5, 10.0)
    shares: tuple[float, float] = (0.05, 1.0)
    seed: int = 0

    def __post_init__(self):
        for factor in self.scaling_factors:
            check_scaling_factor(factor)
        low, high = self.scaling_factors
        if low > high:
            raise UserError(f"--min_scaling {low:g} is above --max_scaling {high:g}")
        low, high = self.shares
        if not 0 < low <= high <= 1:
            raise UserError(f"--shares {low:g} {high:g} are not two shares above 0, up to 1, the lower first")
        if self.seed < 0:
            raise UserError(f"--seed {self.seed} is below 0")

    def study(self, trials: list[Trial]) -> optuna.Study:
        """A study in memory that holds the trials and draws the next. Its sampler has a seed for each trial.

        It knows no limits of cost, so that others can be chosen by without measuring anything again.
        """
        # Not seed + number: the next seed would draw nearly the same points.
        seed = int(np.random.SeedSequence((self.seed, len(trials))).generate_state(1)[0])
        sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=N_RANDOM_TRIALS)
        study = optuna.create_study(directions=["minimize", "minimize"], sampler=sampler)
        for trial in trials:
            study.add_trial(
                optuna.trial.create_trial(
                    params={name: getattr(trial, name) for name in self._distributions},
                    distributions=self._distributions,
                    values=trial.objectives,
                    user_attrs={name: getattr(trial, name) for name in ("n_heads", *RATES[1:])},
                )
            )
        return study

    def next_point(self, trials: list[Trial]) -> tuple[float, float]:
        """Scaling factor and share of heads of the trial that comes after these."""
        params = self.study(trials).ask(self._distributions).params
        return params["scaling_factor"], params["share"]

    def front(self, trials: list[Trial]) -> list[Trial]:
        """The trials that no other one beats in one objective without losing in the other, lowest ASR first."""
        best = {trial.number for trial in self.study(trials).best_trials}
        return sorted((trials[number] for number in best), key=lambda trial: (*trial.objectives, trial.number))

    @property
    def _distributions(self) -> dict[str, FloatDistribution]:
        return {"scaling_factor": FloatDistribution(*self.scaling_factors), "share": FloatDistribution(*self.shares)}


@dataclass(frozen=True)
class Limits:
    """What the chosen point may cost against the base, as shares of the rows. Raises UserError outside 0 to 1."""

    max_refusals: float = 0.02
    max_accuracy_loss: float = 0.02

    def __post_init__(self):
        for name, value in asdict(self).items():
            if not 0 <= value <= 1:
                raise UserError(f"--{name} {value:g} is not between 0 and 1")

    def keeps(self, trial: Trial, base: dict) -> bool:
        """Whether a trial costs no more than that. `base` is the base's measurement as JSON."""
        refusals = trial.benign_refusals - base["benign_refusals"]["value"]
        loss = base["icl_accuracy"]["value"] - trial.icl_accuracy
        return refusals <= self.max_refusals + ROUNDING and loss <= self.max_accuracy_loss + ROUNDING

    def choose(self, trials: list[Trial], base: dict) -> Trial | None:
        """The lowest ASR among the trials that keep both limits, ties by lower KL, then by order; None without one."""
        kept = [trial for trial in trials if self.keeps(trial, base)]
        return min(kept, key=lambda trial: (*trial.objectives, trial.number), default=None)


class SteeredBench:
    """Measures heads and scaling factors on one loaded model in one language. The base is measured once, if needed."""

    def __init__(self, loaded: LoadedModel, vector: TaskVector, bench: Bench, judge: Judge):
        self.loaded, self.vector, self.bench, self.judge = loaded, vector, bench, judge

    @cached_property
    def _base(self) -> tuple[Measurement, Benign]:
        return self.bench.measure(self.loaded, self.judge)

    def measure(self, heads: list[Head], scaling_factor: float) -> Measurement:
        """The measurement with these heads steered, or of the base with none."""
        measured, base = self._base
        if heads:
            source = f"the top {len(heads)} heads of {self.bench.language.name}"
            steering = open_steering(self.vector, heads, scaling_factor, source=source)
            with steered_in_place(self.loaded, steering):
                measured, _ = self.bench.measure(self.loaded, self.judge, base)
        return measured


def bench_hash(bench: Bench) -> str:
    """A hash of everything a bench asks: both sets of questions, the in-context rows, and how prompts are drawn."""
    tasks = {task: asdict(split) for task, split in bench.tasks.items()}
    asked = [bench.policy, bench.benign, tasks, bench.seed, bench.n_prompts]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()


@dataclass(frozen=True)
class Tuning:
    """One language's trials and the file that they end in.

    `inputs` is what the numbers depend on beside the space; `ranking` all heads, best first. Trials are noted in a
    journal beside the file as they come. It stays: more trials, fewer, or other limits begin with those it holds.
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
        return self._measured_from | {"n_trials": self.n_trials} | asdict(self.limits)

    def journal(self) -> Journal:
        return Journal(self.path.with_suffix(".jsonl"), self._measured_from)

    def finished(self) -> dict | None:
        """What the file holds where it was made from the same inputs, None otherwise."""
        found = files.read_facts(self.path)
        return found if self._made_from.items() <= found.items() else None

    def run(
        self, measure: Callable[[list[Head], float], Measurement], done: Callable[[int], object] = lambda _: None
    ) -> dict:
        """Measure the trials that are not noted yet, and write the file. `done` is told how many more there are.

        Raises UserError where a steered model gives no finite numbers.
        """
        with self.journal() as journal:
            if BASE not in journal.done:
                journal.add({BASE: measure([], 0.0).as_json()})
            trials = [Trial(**journal.done[number]) for number in range(self.n_trials) if number in journal.done]
            done(len(trials))
            while len(trials) < self.n_trials:
                trials.append(self._measure_next(trials, measure))
                journal.add({trials[-1].number: asdict(trials[-1])})
                done(1)
            found = self._made_from | self._conclude(trials, journal.done[BASE])
            files.write_json(self.path, found)
        return found

    def _measure_next(self, trials: list[Trial], measure: Callable[[list[Head], float], Measurement]) -> Trial:
        factor, share = self.space.next_point(trials)
        count = count_share(share, len(self.ranking))
        rates = {name: rate["value"] for name, rate in measure(self.ranking[:count], factor).as_json().items()}
        if not math.isfinite(rates["kl_first_token"]):
            raise UserError(
                f"with scaling factor {factor:g} on {count} heads the model of {self.path.stem} gives numbers that are "
                "not finite; give a smaller --max_scaling"
            )
        return Trial(len(trials), factor, share, count, **rates)

    def _conclude(self, trials: list[Trial], base: dict) -> dict:
        chosen = self.limits.choose(trials, base)
        return {
            "note": NOTE,
            "base": base,
            "trials": [asdict(trial) for trial in trials],
            "front": [trial.number for trial in self.space.front(trials)],
            "chosen": chosen and asdict(chosen),
            "why_none": None if chosen else self._why_none(trials, base),
        }

    def _why_none(self, trials: list[Trial], base: dict) -> str:
        refusals = min(trial.benign_refusals for trial in trials) - base["benign_refusals"]["value"]
        loss = base["icl_accuracy"]["value"] - max(trial.icl_accuracy for trial in trials)
        return (
            f"none of {len(trials)} trials keeps to {self.limits.max_refusals:.1%} more benign refusals and "
            f"{self.limits.max_accuracy_loss:.1%} of accuracy lost; the least were {refusals:.1%} and {loss:.1%}"
        )
