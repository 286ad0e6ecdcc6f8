"""Figures of the functional heads: their effects, the layers they lie in, and how much languages share them.

Effects are tensors (n_layers, n_heads) per language, changes of probability; lists of heads are (layer, head) pairs.
"""

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.collections import LineCollection
from matplotlib.colors import SymLogNorm
from matplotlib.ticker import MaxNLocator
from scipy.cluster.hierarchy import dendrogram, linkage
from scipy.spatial.distance import squareform
from torch import Tensor

from soteria.reporting import fonts
from soteria.reporting.figures import TIER_STYLES, WIDTH, draw_matrix, mark_tiers, printed, tier_marks, tier_of
from soteria.scoring.heads import Head, check_heads

EFFECT = "mean indirect effect\n(change of probability)"


@printed
def plot_effects(effects: dict[str, Tensor], selected: dict[str, list[Head]] | None = None) -> plt.Figure:
    """A heat map of the effect (n_layers, n_heads) per language, all on one scale; `selected` heads are outlined.

    Raises UserError where a selected head is outside its map.
    """
    maps = {language: np.asarray(effect) for language, effect in effects.items()}
    n_columns = min(3 if max(effect.shape[1] for effect in maps.values()) > 16 else 4, len(maps))
    n_rows = -(-len(maps) // n_columns)
    side = min(2.0, (WIDTH - 1.2) / n_columns)  # inches, of a panel
    size = (side * n_columns + 1.2, side * n_rows + 0.6)
    layout = {"squeeze": False, "sharex": True, "sharey": True, "layout": "constrained"}
    figure, panels = plt.subplots(n_rows, n_columns, figsize=size, **layout)
    for axes in panels.flat[len(maps) :]:
        axes.set_visible(False)
    for axes in panels.flat[max(0, len(maps) - n_columns) : len(maps)]:
        axes.tick_params(labelbottom=True)  # the panel below may be empty
    norm, labels = effect_scale(maps), fonts.language_labels(list(maps))
    for axes, (language, effect) in zip(panels.flat, maps.items(), strict=False):
        image = axes.imshow(effect, cmap="viridis", aspect="auto", origin="lower", norm=norm)
        axes.set_title(labels[language])
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(5, integer=True))
        if selected and language in selected:
            check_heads(selected[language], *effect.shape, f"the list of {language}", "its map")
            lines, thin = outline(selected[language], effect.shape), min(1.0, 10 * side / max(effect.shape))  # points
            for color, width in (("k", 2.2 * thin), ("w", thin)):  # white in black shows on every color of the map
                look = {"colors": color, "linewidths": width, "capstyle": "projecting", "clip_on": False, "zorder": 3}
                axes.add_collection(LineCollection(lines, **look))
    figure.supxlabel("head (outlined: selected)" if selected else "head", fontsize=8)
    figure.supylabel("layer", fontsize=8)
    figure.colorbar(image, ax=panels, label=EFFECT, aspect=30)
    return figure


def effect_scale(maps: dict[str, np.ndarray]) -> SymLogNorm:
    """One scale from the lowest to the highest effect of all maps.

    Linear up to the median size, logarithmic beyond: a few heads have a hundred times the effect of the others.
    """
    values = np.concatenate([effect[~np.isnan(effect)] for effect in maps.values()])
    typical = np.median(np.abs(values)) or 1.0
    return SymLogNorm(10 ** np.floor(np.log10(typical)), vmin=values.min(), vmax=values.max(), base=10)


def outline(heads: list[Head], shape: tuple[int, int]) -> list[tuple[tuple[float, float], tuple[float, float]]]:
    """Lines ((x, y), (x, y)) around heads on a map (n_layers, n_heads): where a cell differs from its neighbor."""
    inside = np.zeros(shape, bool)
    inside[tuple(np.array(heads, int).reshape(-1, 2).T)] = True
    inside = np.pad(inside, 1)
    upright = np.argwhere(inside[1:-1, 1:] != inside[1:-1, :-1]) - 0.5  # (lower end, x)
    level = np.argwhere(inside[1:, 1:-1] != inside[:-1, 1:-1]) - 0.5  # (y, left end)
    return [((x, y), (x, y + 1)) for y, x in upright.tolist()] + [((x, y), (x + 1, y)) for y, x in level.tolist()]


def layer_profiles(effects: dict[str, Tensor]) -> pd.DataFrame:
    """Per tier and layer, the mean effect over heads, averaged over the tier's languages.

    Columns: tier, layer, mean, and the low and high of the tier's languages.
    """
    means = pd.DataFrame(
        {name: pd.DataFrame(np.asarray(effect, float)).mean(axis=1) for name, effect in effects.items()}
    )
    means = means.dropna()  # layers without heads
    profiles = means.rename_axis("layer").melt(var_name="tier", value_name="effect", ignore_index=False)
    profiles["tier"] = pd.Categorical(profiles["tier"].map(tier_of), list(TIER_STYLES))  # sorted in this order
    spread = profiles.groupby(["tier", "layer"], observed=True)["effect"].agg(mean="mean", low="min", high="max")
    return spread.reset_index().astype({"tier": str})


@printed
def plot_layer_profiles(effects: dict[str, Tensor]) -> plt.Figure:
    """A line per tier, the mean effect of a layer's heads, within the range of the tier's languages."""
    figure, axes = plt.subplots(figsize=(0.75 * WIDTH, 3), layout="constrained")
    # Thick and large below thin and small: where lines agree, all are visible.
    sizes = iter(((2.2, 7), (1.6, 5), (1.1, 3.5), (1, 3)))
    for tier, rows in layer_profiles(effects).groupby("tier", sort=False):
        width, size = next(sizes)
        color, marker, line = TIER_STYLES[tier]
        count = sum(tier_of(language) == tier for language in effects)
        axes.fill_between(rows["layer"], rows["low"], rows["high"], color=color, alpha=0.15, linewidth=0)
        for edge in ("low", "high"):  # in grayscale, overlapping bands are told apart by their edges
            axes.plot(rows["layer"], rows[edge], line, color=color, linewidth=0.5)
        every = max(1, len(rows) // 16)  # marks of a deep model would touch
        look = {"linewidth": width, "marker": marker, "markersize": size, "markevery": every, "color": color}
        axes.plot(rows["layer"], rows["mean"], line, label=f"{tier} ({count} language{'s'[: count != 1]})", **look)
    axes.axhline(0, color="0.6", linewidth=0.6, zorder=0)
    axes.set(xlabel="layer", ylabel=EFFECT, xlim=(-0.4, rows["layer"].max() + 0.4))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    title = "tier: mean, and range of its languages"
    figure.legend(title=title, loc="outside lower center", ncols=4, handlelength=3, frameon=False)
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


def overlaps(lists: dict[str, list[Head]]) -> pd.DataFrame:
    """Jaccard overlap of every two languages' lists, shared heads over all heads of the two: a square table."""
    sets = {language: set(heads) for language, heads in lists.items()}
    return pd.DataFrame({b: {a: len(sets[a] & sets[b]) / len(sets[a] | sets[b]) for a in sets} for b in sets})


@printed
def plot_overlaps(lists: dict[str, list[Head]]) -> plt.Figure:
    """Jaccard overlap of languages' head lists, a matrix of numbers; each language has its tier's mark.

    Above it is the tree of average linkage on 1 - overlap, whose order puts similar languages next to each other.
    """
    table, side = overlaps(lists), max(1.2, 0.36 * len(lists))  # inches, of the matrix
    size = (side + 1.7, side + 1.6)
    figure, (tree, axes) = plt.subplots(2, 1, figsize=size, height_ratios=(0.6, side), layout="constrained")
    tree.axis("off")
    if len(table) > 1:
        linked = linkage(squareform(1 - table, checks=False), "average", optimal_ordering=True)
        drawn = dendrogram(linked, ax=tree, no_labels=True, color_threshold=0, above_threshold_color="k")
        tree.set(xlim=(0, 10 * len(table)), ylim=(0.7 * linked[0, 2], None))  # stems need no room
        tree.collections[0].set(linewidth=0.8, clip_on=False)
        table = table.iloc[drawn["leaves"], drawn["leaves"]]
    texts = table.map(lambda value: f"{value:.2f}".removeprefix("0") if value < 1 else "1").to_numpy()
    names = list(table)
    image = draw_matrix(axes, table, texts, fonts.language_labels(names), 1)
    mark_tiers(axes, [], names)
    marks = tier_marks(names)
    figure.legend(handles=marks, loc="outside lower center", title="tier", ncols=len(marks), frameon=False)
    figure.colorbar(image, ax=axes, label="Jaccard overlap", pad=0.06, aspect=30)
    return figure
