"""Pictures of effects and of results, readable in print and without colour vision. Knows matplotlib and tables."""

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.ticker import MaxNLocator, PercentFormatter
from torch import Tensor

from soteria import files
from soteria.comparison import METHOD
from soteria.heads import Head
from soteria.tables import RATES, percent

# Okabe and Ito's colours, with a marker each.
STYLES = {
    "base": ("#000000", "|"),
    METHOD: ("#0072B2", "o"),
    "random heads": ("#E69F00", "s"),
    "bottom heads": ("#CC79A7", "v"),
    "all heads": ("#009E73", "D"),
}


def save(figure: plt.Figure, path: Path) -> None:
    """Write a PNG, whole or not at all."""
    with files.whole_file(path) as sibling:
        figure.savefig(sibling, format="png", dpi=150, bbox_inches="tight")


def plot_effects(effects: dict[str, Tensor]) -> plt.Figure:
    """A heat map of the effect (n_layers, n_heads) per language, all on one scale around zero."""
    columns = min(4, len(effects))
    rows = -(-len(effects) // columns)
    figure, panels = plt.subplots(
        rows, columns, figsize=(3.4 * columns, 2.6 * rows), squeeze=False, layout="constrained"
    )
    bound = max(float(effect.abs().max()) for effect in effects.values()) or 1.0
    for axes in panels.flat[len(effects) :]:
        axes.set_visible(False)
    for axes, (language, effect) in zip(panels.flat, effects.items(), strict=False):
        image = axes.imshow(effect.numpy(), cmap="PuOr_r", vmin=-bound, vmax=bound, aspect="auto", origin="lower")
        axes.set(xlabel="head", ylabel="layer", title=language)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(integer=True))
    figure.colorbar(image, ax=panels, label="mean indirect effect")
    plt.close(figure)  # a notebook shows the returned figure; open ones it would show twice
    return figure


def ranked_table(effects: dict[str, Tensor], rankings: dict[str, list[Head]]) -> pd.DataFrame:
    """A row per rank, a column per language: `layer.head (effect)`."""
    return pd.DataFrame(
        {
            language: [f"{layer}.{head} ({effects[language][layer, head]:+.4f})" for layer, head in ranking]
            for language, ranking in rankings.items()
        },
        index=pd.RangeIndex(1, len(next(iter(rankings.values()))) + 1, name="rank"),
    )


def jaccard(a: list[Head], b: list[Head]) -> float:
    """Shared heads over all heads of two lists."""
    return len(set(a) & set(b)) / len(set(a) | set(b))


def plot_overlaps(lists: dict[str, list[Head]]) -> plt.Figure:
    """Jaccard overlap of languages' head lists, as a matrix of numbers."""
    names = list(lists)
    values = np.array([[jaccard(lists[a], lists[b]) for b in names] for a in names])
    size = 2.5 + 0.55 * len(names)
    figure, axes = plt.subplots(figsize=(size + 1, size), layout="constrained")
    image = axes.imshow(values, cmap="viridis", vmin=0, vmax=1)
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axes.set_yticks(range(len(names)), names)
    for (i, j), value in np.ndenumerate(values):
        axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=8, color="w" if value < 0.6 else "k")
    figure.colorbar(image, ax=axes, label="Jaccard overlap")
    plt.close(figure)
    return figure


def plot_comparison(table: pd.DataFrame, title: str) -> plt.Figure:
    """The table as a picture: a panel per rate, a row per language, a mark per condition, bars for 95 % intervals."""
    languages = list(dict.fromkeys(table["language"]))
    conditions = list(dict.fromkeys(table["heads"]))
    figure, panels = plt.subplots(
        1, len(RATES), figsize=(13, 1.6 + 0.62 * len(languages)), sharey=True, layout="constrained"
    )
    offsets = np.linspace(-0.3, 0.3, len(conditions) + 1)
    for axes, (rate, name) in zip(panels, RATES.items(), strict=True):
        part = table[table["rate"] == rate]
        for offset, condition in zip(offsets, ["base", *conditions], strict=True):
            is_base = condition == "base"
            rows = part[part["heads"] == (METHOD if is_base else condition)].set_index("language").loc[languages]
            which = "base" if is_base else "safe"
            middle = rows[which].to_numpy()
            spread = np.abs([middle - rows[f"{which}_low"], rows[f"{which}_high"] - middle])
            colour, marker = STYLES[condition]
            axes.errorbar(
                middle,
                np.arange(len(languages)) + offset,
                xerr=spread,
                fmt=marker,
                color=colour,
                markersize=9 if is_base else 5,
                elinewidth=1,
                label="no steering (base)" if is_base else condition,
            )
        axes.set(xlim=(-0.04, 1.04), title=f"{name} (mean {_change(part)})")
        axes.xaxis.set_major_formatter(PercentFormatter(1))
        axes.grid(axis="x", alpha=0.3)
    panels[0].set_yticks(range(len(languages)), languages)
    panels[0].invert_yaxis()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(conditions) + 1)
    figure.suptitle(title)
    plt.close(figure)
    return figure


def _change(part: pd.DataFrame) -> str:
    method = part[part["heads"] == METHOD]
    return f"{percent(method['base'].mean())} → {percent(method['safe'].mean())}"
