"""Step 4 for a grid: which pictures a model has, and which of the grid's tables each of them shows.

The drawing itself is `figures`', `steering_figures`' and `ablation_figures`'.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure
from torch import Tensor

from soteria.errors import UserError
from soteria.grid.comparison import METHOD as TOP
from soteria.grid.grid_file import Grid
from soteria.reporting import ablation_figures, figures, steering_figures
from soteria.reporting.grid_tables import BASE, SHARED_ALL, SHARED_TIER
from soteria.scoring.heads import Head, count_share, mean_effect, rank_heads

SHORT = {SHARED_TIER: "tier", SHARED_ALL: "universal"}  # names of bars
ENDS = {"low": "asr_low", "high": "asr_high"}
TOO_FEW = "too few of its numbers were measured"


@dataclass(frozen=True)
class ModelNumbers:
    """One model's rows of the grid's tidy tables, those of the first prompt set and judge that the ablations have."""

    grid: Grid
    slug: str
    scores: Path  # what step 1 wrote
    tables: dict[str, pd.DataFrame]

    def rows(self, name: str) -> pd.DataFrame:
        """Raises UserError where the grid has no such table."""
        table = self.tables.get(name, pd.DataFrame())
        if table.empty:
            raise UserError("the grid does not ask for it")
        prompts, judge = self.grid.ablated_sets[0], self.grid.judges[0]
        return table[(table["model"] == self.slug) & (table["prompts"] == prompts) & (table["judge"] == judge)]

    @cached_property
    def effects(self) -> dict[str, Tensor]:
        """Mean effects (n_layers, n_heads) by language. Raises UserError where one was not scored."""
        return {language: mean_effect(self.scores, language, self.grid.tasks) for language in self.grid.languages}

    @cached_property
    def selected(self) -> dict[str, list[Head]]:
        """The method's heads by language."""
        return {
            language: rank_heads(effect)[: count_share(self.grid.heads, effect.numel())]
            for language, effect in self.effects.items()
        }


def asr(numbers: ModelNumbers) -> Figure:
    rows = numbers.rows("main")
    rows = rows[rows["of"] == "language"].rename(columns={"name": "language"})
    return ablation_figures.plot_methods(rows.assign(heads=rows["heads"].replace(SHORT)))


def trade_off(numbers: ModelNumbers) -> Figure:
    heads, scaling = numbers.rows("heads"), numbers.rows("scaling")
    rows = pd.concat([heads[heads["heads"].isin([BASE, TOP, "all heads"])], scaling[scaling["heads"] != BASE]])
    rows = rows.fillna({"share": 0.0, "scaling_factor": 0.0}).dropna(subset=["asr", "kl"])
    rows.loc[rows["heads"] == BASE, ["share", "scaling_factor"]] = 0.0
    rows = rows.drop_duplicates(["share", "scaling_factor"]).sort_values(["share", "scaling_factor"])
    if len(rows) < 3:
        raise UserError(TOO_FEW)
    return steering_figures.plot_trade_off(rows[["share", "scaling_factor", "asr", "kl"]])


def head_shares(numbers: ModelNumbers) -> Figure:
    rows = numbers.rows("heads")
    rows = rows[rows["share"].notna() | (rows["heads"] == BASE)].fillna({"share": 0.0}).rename(columns=ENDS)
    if rows["share"].nunique() < 3:
        raise UserError("the grid asks for one share of heads alone")
    return ablation_figures.plot_head_shares(rows)


def scaling(numbers: ModelNumbers) -> Figure:
    rows = numbers.rows("scaling").rename(columns=ENDS)
    if len(rows) < 3:
        raise UserError("the grid asks for one scaling factor alone")
    return ablation_figures.plot_scaling(rows, chosen=numbers.grid.scaling_factor)


def transfer(numbers: ModelNumbers) -> Figure:
    return ablation_figures.plot_transfer(numbers.rows("transfer"))


def effects(numbers: ModelNumbers) -> Figure:
    return figures.plot_effects(numbers.effects, numbers.selected)


def layers(numbers: ModelNumbers) -> Figure:
    return figures.plot_layer_profiles(numbers.effects)


def overlaps(numbers: ModelNumbers) -> Figure:
    if len(numbers.selected) < 2:
        raise UserError("one language overlaps with no other")
    return figures.plot_overlaps(numbers.selected)


@dataclass(frozen=True)
class Drawing:
    """A picture's title, what it shows, how it is drawn, and the tables that it shows (none: the scores themselves)."""

    title: str
    text: str
    draw: Callable[[ModelNumbers], Figure]
    tables: tuple[str, ...] = ()


DRAWINGS = {
    "asr": Drawing("ASR by language", "Bars with 95 % intervals, languages by tier.", asr, ("main",)),
    "trade_off": Drawing(
        "Gain against damage",
        "ASR against KL of benign answers, with the Pareto front.",
        trade_off,
        ("heads", "scaling"),
    ),
    "head_shares": Drawing(
        "Gain and cost over the share of heads", "The method beside its controls.", head_shares, ("heads",)
    ),
    "scaling": Drawing("Gain and cost over λ", "The grid's own is marked.", scaling, ("scaling",)),
    "transfer": Drawing(
        "Transfer between languages",
        "ASR with the heads of one language on prompts in another.",
        transfer,
        ("transfer",),
    ),
    "effects": Drawing(
        "Indirect effect of every head", "A map per language; the functional heads are outlined.", effects
    ),
    "layers": Drawing("Where the functional heads lie", "Mean indirect effect per layer and tier.", layers),
    "overlaps": Drawing("Overlap of functional heads between languages", "Jaccard overlap, clustered.", overlaps),
}
