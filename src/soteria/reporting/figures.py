"""Pictures of effects and of results, readable in print and without colour vision. Knows matplotlib and tables."""

from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.collections import LineCollection
from matplotlib.colors import SymLogNorm
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter
from scipy.cluster.hierarchy import dendrogram, linkage
from scipy.spatial.distance import squareform
from torch import Tensor

from soteria.grid.comparison import METHOD
from soteria.languages import find_language
from soteria.reporting import fonts
from soteria.reporting.tables import RATES, percent
from soteria.scoring.heads import Head, check_heads
from soteria.storage import files

# Okabe and Ito's colours, with a marker each.
STYLES = {
    "base": ("#000000", "|"),
    METHOD: ("#0072B2", "o"),
    "random heads": ("#E69F00", "s"),
    "bottom heads": ("#CC79A7", "v"),
    "all heads": ("#009E73", "D"),
}
NO_TIER = "no tier"
# Colour, marker and line of a tier: the colours are Okabe and Ito's, and of different lightness in greyscale.
TIER_STYLES = {
    "High": ("#0072B2", "o", "-"),
    "Mid": ("#E69F00", "s", "--"),
    "Low": ("#000000", "^", ":"),
    NO_TIER: ("#CC79A7", "X", "-."),
}
WIDTH = 6.3  # inches, of the text of a two-column A4 page: printed at this size, type is as large as set here
PRINT = {"font.size": 8, "axes.titlesize": 8, "axes.labelsize": 8, "legend.fontsize": 8, "figure.titlesize": 9}
EFFECT = "mean indirect effect\n(change of probability)"


def naming_languages(style: dict) -> Callable:
    """Decorator of a plot with an option `own_names`: it is drawn in the style, with fonts for what languages call
    themselves. With own_names=False, languages are named in English, and the picture depends on no installed font.
    """

    def decorate(plot: Callable[..., plt.Figure]) -> Callable[..., plt.Figure]:
        @wraps(plot)
        def drawn(*arguments, own_names: bool = True, **options) -> plt.Figure:
            families = fonts.families() if own_names else [fonts.FIRST]
            with plt.rc_context(style | {"font.family": families}):
                return plot(*arguments, own_names=own_names, **options)

        return drawn

    return decorate


def save(figure: plt.Figure, path: Path) -> list[Path]:
    """Write `path`, a PNG of 200 dpi, and a PDF beside it, both or neither; gives their paths.

    The same figure gives the same bytes: nothing in the files is of their day.
    """
    name = path.name.removesuffix(".png")
    pictures = {path.with_name(f"{name}.png"): {}, path.with_name(f"{name}.pdf"): {"CreationDate": None}}
    # Publishers refuse fonts of type 3, matplotlib's default.
    with ExitStack() as written, plt.rc_context({"pdf.fonttype": 42}):
        for picture, metadata in pictures.items():
            sibling = written.enter_context(files.whole_file(picture))
            kind = picture.suffix[1:]
            figure.savefig(sibling, format=kind, dpi=200, bbox_inches="tight", metadata=metadata)
    return list(pictures)


def tier_of(language: str) -> str:
    """A language's tier, for a legend. Raises UserError for an unknown language."""
    return find_language(language).tier or NO_TIER


@naming_languages(PRINT)
def plot_effects(
    effects: dict[str, Tensor], selected: dict[str, list[Head]] | None = None, *, own_names: bool = True
) -> plt.Figure:
    """A heat map of the effect (n_layers, n_heads) per language, all on one scale; `selected` heads are outlined.

    Raises UserError where a selected head is outside its map.
    """
    maps = {language: np.asarray(effect) for language, effect in effects.items()}
    wide = max(effect.shape[1] for effect in maps.values()) > 16
    columns = min(3 if wide else 4, len(maps))
    rows = -(-len(maps) // columns)
    side = min(2.0, (WIDTH - 1.2) / columns)  # inches, of a panel
    figure, panels = plt.subplots(
        rows,
        columns,
        figsize=(side * columns + 1.2, side * rows + 0.6),
        squeeze=False,
        sharex=True,
        sharey=True,
        layout="constrained",
    )
    for axes in panels.flat[len(maps) :]:
        axes.set_visible(False)
    for axes in panels.flat[max(0, len(maps) - columns) : len(maps)]:
        axes.tick_params(labelbottom=True)  # the panel below may be empty
    norm = effect_scale(maps)
    labels = fonts.language_labels(list(maps), own_names)
    for axes, (language, effect) in zip(panels.flat, maps.items(), strict=False):
        image = axes.imshow(effect, cmap="viridis", aspect="auto", origin="lower", norm=norm)
        axes.set_title(labels[language])
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(5, integer=True))
        if selected and language in selected:
            check_heads(selected[language], *effect.shape, f"the list of {language}", "its map")
            lines = outline(selected[language], effect.shape)
            thin = min(1.0, 10 * side / max(effect.shape))  # printer's points
            for colour, width in (("k", 2.2 * thin), ("w", thin)):  # white in black is seen on every colour of the map
                axes.add_collection(
                    LineCollection(
                        lines, colors=colour, linewidths=width, capstyle="projecting", clip_on=False, zorder=3
                    )
                )
    figure.supxlabel("head (outlined: selected)" if selected else "head", fontsize=8)
    figure.supylabel("layer", fontsize=8)
    figure.colorbar(image, ax=panels, label=EFFECT, aspect=30)
    plt.close(figure)  # a notebook shows the returned figure; open ones it would show twice
    return figure


def effect_scale(maps: dict[str, np.ndarray]) -> SymLogNorm:
    """One scale from the lowest to the highest effect of all maps.

    Linear up to the median size, logarithmic beyond: a head or two have a hundred times the effect of the others.
    """
    values = np.concatenate([effect.ravel() for effect in maps.values()])
    typical = np.median(np.abs(values)) or 1.0
    return SymLogNorm(10 ** np.floor(np.log10(typical)), vmin=values.min(), vmax=values.max(), base=10)


def outline(heads: list[Head], shape: tuple[int, int]) -> list[tuple[tuple[float, float], tuple[float, float]]]:
    """Lines ((x, y), (x, y)) around heads on a map (n_layers, n_heads), where a cell and its neighbour differ."""
    inside = np.zeros(shape, bool)
    inside[tuple(np.array(heads, int).reshape(-1, 2).T)] = True
    inside = np.pad(inside, 1)
    upright = np.argwhere(inside[1:-1, 1:] != inside[1:-1, :-1]) - 0.5  # (lower end, x)
    level = np.argwhere(inside[1:, 1:-1] != inside[:-1, 1:-1]) - 0.5  # (y, left end)
    return [((x, y), (x, y + 1)) for y, x in upright.tolist()] + [((x, y), (x + 1, y)) for y, x in level.tolist()]


def layer_profiles(effects: dict[str, Tensor]) -> pd.DataFrame:
    """Per tier and layer, the mean over heads of the effects (n_layers, n_heads), and how far languages spread.

    Columns: tier, layer, mean over the tier's languages, low and high of its languages, changes of probability.
    """
    rows = [
        (tier_of(language), layer, value)
        for language, effect in effects.items()
        for layer, value in enumerate(np.asarray(effect, float).mean(1))
    ]
    profiles = pd.DataFrame(rows, columns=["tier", "layer", "effect"])
    profiles["tier"] = pd.Categorical(profiles["tier"], list(TIER_STYLES))  # sorted in this order
    spread = profiles.groupby(["tier", "layer"], observed=True)["effect"].agg(mean="mean", low="min", high="max")
    return spread.reset_index().astype({"tier": str})


@plt.rc_context(PRINT)
def plot_layer_profiles(effects: dict[str, Tensor]) -> plt.Figure:
    """A line per tier within its languages' range: mean over a layer's heads of the effects (n_layers, n_heads)."""
    figure, axes = plt.subplots(figsize=(0.75 * WIDTH, 3), layout="constrained")
    # Thick and large below thin and small: where lines agree, all are seen.
    sizes = iter(((2.2, 7), (1.6, 5), (1.1, 3.5), (1, 3)))
    for tier, rows in layer_profiles(effects).groupby("tier", sort=False):
        width, size = next(sizes)
        colour, marker, line = TIER_STYLES[tier]
        count = sum(tier_of(language) == tier for language in effects)
        axes.fill_between(rows["layer"], rows["low"], rows["high"], color=colour, alpha=0.15, linewidth=0)
        for edge in ("low", "high"):  # in greyscale, overlapping bands are told apart by their edges
            axes.plot(rows["layer"], rows[edge], line, color=colour, linewidth=0.5)
        title = f"{tier} ({count} language{'s'[: count != 1]})"
        every = max(1, len(rows) // 16)  # marks of a deep model would touch
        look = {"linewidth": width, "marker": marker, "markersize": size, "markevery": every, "color": colour}
        axes.plot(rows["layer"], rows["mean"], line, label=title, **look)
    axes.axhline(0, color="0.6", linewidth=0.6, zorder=0)
    axes.set(xlabel="layer", ylabel=EFFECT, xlim=(-0.4, rows["layer"].max() + 0.4))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    title = "tier: mean, and range of its languages"
    figure.legend(title=title, loc="outside lower center", ncols=4, handlelength=3, frameon=False)
    plt.close(figure)
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


def overlaps(lists: dict[str, list[Head]]) -> pd.DataFrame:
    """Jaccard overlap of every two languages' lists, a square table."""
    return pd.DataFrame({b: {a: jaccard(lists[a], lists[b]) for a in lists} for b in lists})


def cluster(table: pd.DataFrame) -> dict:
    """The tree of a square table of overlaps, as scipy's `dendrogram` gives it: average linkage on 1 - overlap.

    Its `leaves` are the rows in an order in which similar languages stand beside one another.
    """
    if len(table) < 2:
        return {"leaves": list(range(len(table))), "icoord": [], "dcoord": []}
    distances = squareform(1 - table.to_numpy(), checks=False)
    return dendrogram(linkage(distances, "average", optimal_ordering=True), no_plot=True)


@naming_languages(PRINT)
def plot_overlaps(lists: dict[str, list[Head]], *, own_names: bool = True) -> plt.Figure:
    """Jaccard overlap of languages' head lists, as a clustered matrix of numbers; each language has its tier's mark."""
    table = overlaps(lists)
    clustered = cluster(table)
    names = [list(lists)[leaf] for leaf in clustered["leaves"]]
    table = table.loc[names, names]
    side = max(1.2, 0.36 * len(names))  # inches, of the matrix
    figure, (tree, axes) = plt.subplots(
        2,
        1,
        figsize=(side + 1.7, side + 1.6),
        height_ratios=(0.6, side),
        layout="constrained",
    )
    tree.axis("off")
    for x, y in zip(clustered["icoord"], clustered["dcoord"], strict=True):
        tree.plot((np.array(x) - 5) / 10, y, color="k", linewidth=0.8)  # scipy's leaves lie at 5, 15, 25 ...
    lowest = min((max(y) for y in clustered["dcoord"]), default=0)
    tree.set(xlim=(-0.5, len(names) - 0.5), ylim=(0.7 * lowest, None))  # stems need no room
    image = axes.imshow(table, cmap="viridis", vmin=0, vmax=1, aspect="auto")
    labels = fonts.language_labels(names, own_names).values()
    axes.set_xticks(range(len(names)), labels, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(names)), labels)
    for (row, column), value in np.ndenumerate(table):
        text = f"{value:.2f}".removeprefix("0") if value < 1 else "1"
        axes.text(column, row, text, ha="center", va="center", fontsize=7, color="w" if value < 0.6 else "k")
    for row, language in enumerate(names):
        colour, marker, _ = TIER_STYLES[tier_of(language)]
        # Beside the last column, in line with the row.
        axes.plot(len(names), row, marker, color=colour, markersize=5, clip_on=False, scalex=False, scaley=False)
    used = [tier for tier in TIER_STYLES if tier in map(tier_of, names)]
    marks = [
        Line2D([], [], color=colour, marker=marker, linestyle="") for colour, marker, _ in map(TIER_STYLES.get, used)
    ]
    figure.legend(marks, used, loc="outside lower center", title="tier", ncols=len(used), frameon=False)
    figure.colorbar(image, ax=axes, label="Jaccard overlap", pad=0.06, aspect=30)
    plt.close(figure)
    return figure


@naming_languages({})
def plot_comparison(table: pd.DataFrame, title: str, *, own_names: bool = True) -> plt.Figure:
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
    panels[0].set_yticks(range(len(languages)), fonts.language_labels(languages, own_names).values())
    panels[0].invert_yaxis()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(conditions) + 1)
    figure.suptitle(title)
    plt.close(figure)
    return figure


def _change(part: pd.DataFrame) -> str:
    method = part[part["heads"] == METHOD]
    return f"{percent(method['base'].mean())} → {percent(method['safe'].mean())}"
