"""Step 4 for a grid: which figures a model gets, and which of the grid's tables each of them shows.

Takes the tidy tables of `numbers` and what step 1 wrote; `DRAWINGS` lists the figures by the name of their files.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure
from torch import Tensor

from soteria.errors import UserError
from soteria.grid.grid_file import Grid
from soteria.reporting import head_figures, steering_figures
from soteria.reporting.labels import ALL_HEADS, BASE, TOP
from soteria.scoring.heads import Head, count_heads, count_share, mean_effect, rank_heads


@dataclass(frozen=True)
class ModelNumbers:
    """One model's rows of the grid's tidy tables: those of the ablations' first prompt set and the first judge."""

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
        share = self.grid.heads
        return {
            name: rank_heads(effect)[: count_share(share, count_heads(effect))] for name, effect in self.effects.items()
        }


def asr(numbers: ModelNumbers) -> Figure:
    rows = numbers.rows("main")
    return steering_figures.plot_asr(rows[rows["of"] == "language"].rename(columns={"name": "language"}))


def trade_off(numbers: ModelNumbers) -> Figure:
    heads, scaling = numbers.rows("heads"), numbers.rows("scaling")
    rows = pd.concat([heads[heads["heads"].isin([BASE, TOP, ALL_HEADS])], scaling[scaling["heads"] != BASE]])
    keys = ["share", "scaling_factor"]
    rows = rows.fillna(dict.fromkeys(keys, 0.0)).dropna(subset=["asr", "kl"])
    rows.loc[rows["heads"] == BASE, keys] = 0.0
    rows = rows.drop_duplicates(keys)
    if len(rows) < 3:
        raise UserError("too few of its numbers were measured")
    return steering_figures.plot_trade_off(rows)


def head_shares(numbers: ModelNumbers) -> Figure:
    rows = numbers.rows("heads")
    rows = rows[rows["share"].notna() | (rows["heads"] == BASE)].fillna({"share": 0.0})
    if rows["share"].nunique() < 3:
        raise UserError("the grid asks for only one share of heads")
    return steering_figures.plot_head_shares(rows)


def scaling(numbers: ModelNumbers) -> Figure:
    rows = numbers.rows("scaling")
    if len(rows) < 3:
        raise UserError("the grid asks for only one scaling factor")
    return steering_figures.plot_scaling(rows, chosen=numbers.grid.scaling_factor)


def rankings(numbers: ModelNumbers) -> Figure:
    rows = numbers.rows("rankings").dropna(subset=["asr", "kl", "benign_refusals"])
    if len(rows) < 3:
        raise UserError("too few of its numbers were measured")
    return steering_figures.plot_rankings(rows)


def overlaps(numbers: ModelNumbers) -> Figure:
    if len(numbers.selected) < 2:
        raise UserError("one language overlaps with no other")
    return head_figures.plot_overlaps(numbers.selected)


@dataclass(frozen=True)
class Drawing:
    """A figure's title, what it shows, how it is drawn, and the tables that it shows (none: the scores themselves)."""

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
    "rankings": Drawing(
        "Rankings along λ",
        "ASR against benign questions refused and against KL, a line for each ranking; random heads are a band of 95 % "
        "intervals.",
        rankings,
        ("rankings",),
    ),
    "transfer": Drawing(
        "Transfer between languages",
        "ASR with the heads of one language on prompts in another.",
        lambda numbers: steering_figures.plot_transfer(numbers.rows("transfer")),
        ("transfer",),
    ),
    "effects": Drawing(
        "Indirect effect of every head",
        "A map per language; the functional heads are outlined.",
        lambda numbers: head_figures.plot_effects(numbers.effects, numbers.selected),
    ),
    "layers": Drawing(
        "Where the functional heads lie",
        "Mean indirect effect per layer and tier.",
        lambda numbers: head_figures.plot_layer_profiles(numbers.effects),
    ),
    "overlaps": Drawing("Overlap of functional heads between languages", "Jaccard overlap, clustered.", overlaps),
}
