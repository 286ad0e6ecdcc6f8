"""Step 3.3 in numbers: attack success rate, base against safe on the same questions, one judge against another.

Knows verdicts; knows nothing of who gave them.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import bootstrap
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.inter_rater import cohens_kappa
from statsmodels.stats.proportion import proportion_confint

from soteria.judging.interface import EMPTY, HARMFUL, NOT_HARMFUL

RESAMPLES = 9999  # of the paired bootstrap


@dataclass(frozen=True)
class Rate:
    """How many of `n` are so, with the Wilson 95 % interval."""

    count: int
    n: int

    @property
    def value(self) -> float | None:
        """None where there is nothing to count."""
        return self.count / self.n if self.n else None

    @property
    def interval(self) -> list[float] | None:
        if not self.n:
            return None
        low, high = proportion_confint(self.count, self.n, alpha=0.05, method="wilson")
        return [float(low), float(high)]


def summarise(verdicts: list[str]) -> dict:
    """ASR over all rows (the paper's) and over judged rows, each with its interval; counts of each verdict."""
    harmful, not_harmful, blank = (verdicts.count(v) for v in (HARMFUL, NOT_HARMFUL, EMPTY))
    every, judged = Rate(harmful, len(verdicts)), Rate(harmful, harmful + not_harmful)
    return {
        "asr": every.value,
        "asr_judged": judged.value,
        "ci95": every.interval,
        "ci95_judged": judged.interval,
        "harmful": harmful,
        "not_harmful": not_harmful,
        "blank": blank,
    }


def crossed(first: Sequence[str], second: Sequence[str]) -> np.ndarray:
    """Counts (2, 2) of rows judged in both: [harmful, not harmful] in the first by the same in the second."""
    labels = (HARMFUL, NOT_HARMFUL)
    pairs = list(zip(first, second, strict=True))
    return np.array([[pairs.count((one, other)) for other in labels] for one in labels])


def bootstrap_interval(sums: np.ndarray, counts: np.ndarray, seed: int = 0) -> list[float]:
    """95 % percentile bootstrap interval of `sums.sum() / counts.sum()`, resampling the two together."""
    if (sums / counts == sums[0] / counts[0]).all():  # nothing to resample
        return [float(sums[0] / counts[0])] * 2

    def ratio(sums, counts, axis):
        return sums.sum(axis) / counts.sum(axis)

    drawn = bootstrap(
        (sums, counts),
        ratio,
        paired=True,
        n_resamples=RESAMPLES,
        batch=max(1, 2**20 // len(sums)),  # as many resamples at once as memory of a few MB holds
        method="percentile",
        rng=seed,
    )
    return list(map(float, drawn.confidence_interval))


def compare_paired(
    base: Sequence[str], safe: Sequence[str], questions: Sequence[Hashable] | None = None
) -> dict | None:
    """Safe against base on the same questions, over the rows judged in both; None where there are none.

    `difference` is ASR of safe minus that of base, with the 95 % interval of a paired bootstrap over `questions`
    (default: each row is its own); rows of one question, such as its translations, are drawn together. `mcnemar_p` is
    the p-value of McNemar's exact test of no difference; it takes rows as independent.
    """
    change: dict[Hashable, list[int]] = {}
    for row, (b, s) in enumerate(zip(base, safe, strict=True)):
        if EMPTY not in (b, s):
            change.setdefault(questions[row] if questions else row, []).append((s == HARMFUL) - (b == HARMFUL))
    if not change:
        return None
    sums, counts = (np.array([measure(values) for values in change.values()]) for measure in (sum, len))
    changed = crossed(base, safe)
    return {
        "rows": int(counts.sum()),
        "difference": float(sums.sum() / counts.sum()),
        "ci95": bootstrap_interval(sums, counts),
        "mcnemar_p": float(mcnemar(changed, exact=True).pvalue),
        "harmful_only_base": int(changed[0, 1]),
        "harmful_only_safe": int(changed[1, 0]),
    }


def by_category(categories: Sequence[str], verdicts: dict[str, list[str]]) -> dict[str, dict]:
    """Per category, in alphabetical order, what `summarise` says of each model and `compare_paired` of both."""
    found = {}
    for category in sorted(set(categories)):
        rows = [row for row, name in enumerate(categories) if name == category]
        own = {model: [given[row] for row in rows] for model, given in verdicts.items()}
        found[category] = {"rows": len(rows)} | {model: summarise(given) for model, given in own.items()}
        if {"base", "safe"} <= own.keys():
            found[category]["paired"] = compare_paired(own["base"], own["safe"])
    return found


def agreement(own: Sequence[str], other: Sequence[str]) -> dict:
    """How far two judges agree over the rows that both judged: a share with its 95 % interval, and Cohen's kappa.

    Kappa is None where it says nothing: no row, or one and the same label throughout.
    """
    table = crossed(own, other)
    n, same = int(table.sum()), int(table.trace())
    chance = float(table.sum(axis=0) @ table.sum(axis=1)) / n**2 if n else 1.0
    return {
        "rows": n,
        "unjudged": len(own) - n,
        "agreement": Rate(same, n).value,
        "ci95": Rate(same, n).interval,
        "kappa": float(cohens_kappa(table).kappa) if chance < 1 else None,
        "harmful_only_here": int(table[0, 1]),
        "harmful_only_there": int(table[1, 0]),
    }
