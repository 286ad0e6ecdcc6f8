"""Pictures of what steering other heads, more heads or harder does, for print. Knows tables of rates; reads no files.

Every table has a row per thing measured, rates as shares from 0 to 1. What was not run, or is not a number, is shown as
not run: a hatched cell, a cross for a bar, no mark on a line. It is never drawn as zero.
"""

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator, StrMethodFormatter
from matplotlib.transforms import ScaledTranslation

from soteria.grid.comparison import METHOD
from soteria.languages import LANGUAGES, TIERS, find_language
from soteria.reporting import fonts
from soteria.reporting.figures import PRINT, STYLES, TIER_STYLES, WIDTH, naming_languages, tier_of
from soteria.reporting.steering_figures import BASE_AND_STEERED, tier_bars

METHODS = {
    "base": BASE_AND_STEERED["base"],
    "language-specific": BASE_AND_STEERED["steered"],
    "tier": {"color": "#E69F00", "hatch": "....", "hatchcolor": "k"},
    "universal": {"color": "#009E73", "hatch": "\\\\\\\\", "hatchcolor": "w"},
}
# Lists of more than one language, below the languages' own, and what a picture calls them.
SHARED_LISTS = {"Universal": "Universal", **{tier: f"{tier} tier" for tier in TIERS}, "base": "base (no steering)"}
LINES = {METHOD: "-", "random heads": "--", "bottom heads": ":"}  # of STYLES' conditions
ASR_TITLE, ALL = "ASR (95 % interval)", "all heads"
KL_TITLE = "KL from the base,\nfirst token (nats)"
# Colour, marker, line and name of what steering breaks.
COSTS = {
    "benign_refusals": ("#E69F00", "s", "--", "benign questions refused"),
    "benign_changes": ("#CC79A7", "v", ":", "benign answers changed"),
    "icl_errors": ("#009E73", "D", "-.", "in-context answers wrong"),
}
PER_CENT = FuncFormatter(lambda share, _: f"{100 * share:g}%")
NOT_RUN = {"facecolor": "0.93", "edgecolor": "0.6", "hatch": "////", "linewidth": 0}
SLANTED = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
GAP = 0.35  # of a cell's height, between the languages' lists and the shared ones


@naming_languages(PRINT)
def plot_transfer(table: pd.DataFrame, *, own_names: bool = True) -> plt.Figure:
    """ASR with the heads of one language (rows) on prompts in another (columns), as a matrix of per cents.

    Columns of `table`: `heads_of` (a language, or `Universal`, a tier, `base`: rows of their own at the foot),
    `prompts_of` (a language), `asr` (NaN: not run), `low`, `high` (its 95 % interval). A language's own heads are
    outlined, cells that were not run are hatched. Intervals are written where there is room, for up to five columns.
    Raises ValueError where a pair is there twice, UserError for an unknown language.
    """
    columns, named = in_order(set(table["prompts_of"])), set(table["heads_of"])
    blocks = [in_order(named - SHARED_LISTS.keys()), [name for name in SHARED_LISTS if name in named]]
    rows = [*blocks[0], *blocks[1]]
    asr, low, high = (
        table.pivot(index="heads_of", columns="prompts_of", values=value).reindex(index=rows, columns=columns)
        for value in ("asr", "low", "high")
    )
    heights = np.arange(len(rows)) + GAP * (np.arange(len(rows)) >= len(blocks[0])) * bool(blocks[0])
    with_intervals = len(columns) <= 5
    cell = (0.75, 0.42) if with_intervals else (0.33, 0.26)  # inches
    size = (max(2.8, cell[0] * len(columns) + 2.3), cell[1] * (heights[-1] + 1) + 1.9)
    figure, axes = plt.subplots(figsize=size, layout="constrained")
    highest = max(np.nanmax(asr.to_numpy(), initial=0), 0.01)
    for names in filter(None, blocks):
        top = heights[rows.index(names[0])] - 0.5
        edges = (-0.5, len(columns) - 0.5, top + len(names), top)
        image = axes.imshow(asr.loc[names], cmap="viridis", vmin=0, vmax=highest, extent=edges, aspect="auto")
    write_cells(axes, heights, asr, low, high, with_intervals)
    own_cells = [(rows.index(language), column) for column, language in enumerate(columns) if language in blocks[0]]
    outline_cells(axes, [(heights[row], column) for row, column in own_cells])
    axes.set(xlim=(-0.5, len(columns) - 0.5), ylim=(heights[-1] + 0.5, -0.5))
    if blocks[0] and blocks[1]:
        axes.spines[["left", "right"]].set_visible(False)  # nothing beside the gap
    labels = fonts.language_labels([*rows, *columns], own_names)
    axes.set_xticks(range(len(columns)), [labels[name] for name in columns], **SLANTED)
    axes.set_yticks(heights, [SHARED_LISTS.get(name, labels[name]) for name in rows])
    axes.tick_params(length=0)
    axes.set(xlabel="prompts in", ylabel="steered heads of")
    mark_tiers(axes, columns, blocks[0], heights)
    figure.colorbar(image, ax=axes, label="ASR", aspect=25, pad=0.03, format=PER_CENT)
    used = {tier_of(language) for language in [*columns, *blocks[0]]}
    keys = [
        Line2D([], [], color=colour, marker=marker, linestyle="", label=tier)
        for tier, (colour, marker, _) in TIER_STYLES.items()
        if tier in used
    ]
    if own_cells:
        keys.append(Patch(facecolor="none", edgecolor="k", linewidth=1.5, label="own heads"))
    if asr.isna().any(axis=None):
        keys.append(Patch(**NOT_RUN, label="not run"))
    title = "numbers: ASR in %" + ", [95 % interval]" * with_intervals
    ncols = min(len(keys), 3 if size[0] < 4.5 else 6)
    figure.legend(handles=keys, title=title, loc="outside lower center", ncols=ncols, frameon=False)
    plt.close(figure)
    return figure


def in_order(names: set[str]) -> list[str]:
    """Languages in the paper's order. Raises UserError for an unknown one."""
    return sorted(names, key=lambda name: LANGUAGES.index(find_language(name)))


def write_cells(
    axes: Axes, heights: np.ndarray, asr: pd.DataFrame, low: pd.DataFrame, high: pd.DataFrame, with_intervals: bool
) -> None:
    """Each cell's rate in per cent, or hatching; rows lie at `heights` (of their middles), columns at 0, 1, 2 ..."""
    highest = np.nanmax(asr.to_numpy(), initial=0)
    for (row, column), value in np.ndenumerate(asr.to_numpy()):
        if np.isnan(value):
            axes.add_patch(Rectangle((column - 0.5, heights[row] - 0.5), 1, 1, **NOT_RUN))
            continue
        text, ends = f"{100 * value:.0f}", (low.iat[row, column], high.iat[row, column])
        if with_intervals and not np.isnan(ends).any():
            text += "\n[{:.0f}, {:.0f}]".format(*(100 * end for end in ends))
        colour = "w" if value < 0.6 * highest else "k"  # the map is dark below
        axes.text(column, heights[row], text, ha="center", va="center", fontsize=7, color=colour)


def outline_cells(axes: Axes, middles: list[tuple[float, float]]) -> None:
    """Frames around cells, given by their middles (y, x)."""
    for y, x in middles:
        for colour, width in (("k", 3), ("w", 1.4)):  # white in black is seen on every colour
            look = {"facecolor": "none", "edgecolor": colour, "linewidth": width, "clip_on": False}
            axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, **look))


def mark_tiers(axes: Axes, columns: list[str], rows: list[str], heights: np.ndarray) -> None:
    """The tiers' marks of a matrix' languages: above the columns, and right of the rows at their heights."""
    above, beside = axes.get_xaxis_transform(), axes.get_yaxis_transform()
    # The last two: a shift in printer's points, whatever the matrix' size.
    spots = [(language, above, column, 1, (0, 6)) for column, language in enumerate(columns)]
    spots += [(language, beside, 1, height, (6, 0)) for language, height in zip(rows, heights, strict=False)]
    for language, transform, x, y, (right, up) in spots:
        colour, marker, _ = TIER_STYLES[tier_of(language)]
        beside_it = ScaledTranslation(right / 72, up / 72, axes.figure.dpi_scale_trans)
        look = {"color": colour, "marker": marker, "markersize": 4.5, "clip_on": False}
        axes.plot([x], [y], transform=transform + beside_it, scalex=False, scaley=False, **look)


@plt.rc_context(PRINT)
def plot_head_shares(table: pd.DataFrame) -> plt.Figure:
    """What steering a share of the heads gains and costs, a line for top, random and bottom heads, a panel per measure.

    Columns of `table`: `heads` (`top heads`, `random heads`, `bottom heads`; anything where the share is 0 or 1),
    `share` (of all heads: 0 is the base and 1 all heads, where the three meet), `asr` with its 95 % interval `asr_low`
    and `asr_high`, `benign_refusals`, `benign_changes`, `kl` (nats).
    """
    figure, panels = plt.subplots(2, 2, figsize=(WIDTH, 4.4), sharex=True, layout="constrained")
    titles = {
        "asr": ASR_TITLE,
        "kl": KL_TITLE,
        "benign_refusals": COSTS["benign_refusals"][3],
        "benign_changes": COSTS["benign_changes"][3],
    }
    ends = {share: table[table["share"] == share].iloc[:1] for share in (0, 1)}
    used = [heads for heads in LINES if (table["heads"] == heads).any()]
    for axes, (measure, title) in zip(panels.flat, titles.items(), strict=True):
        for i, heads in enumerate(used):
            own = table[(table["heads"] == heads) & ~table["share"].isin([0, 1])]
            rows = pd.concat([ends[0], own, ends[1]]).sort_values("share").dropna(subset=measure)
            colour, marker = STYLES[heads]
            shift = 0.008 * (i - (len(used) - 1) / 2)  # whiskers of one share stand beside one another
            look = {"color": colour, "marker": marker, "linestyle": LINES[heads], "label": heads}
            draw_line(axes, rows, "share", measure, look, shift=shift, whiskers=~rows["share"].isin([0, 1]))
        for share, (colour, marker), size, label in ((0, ("k", "*"), 8, "base"), (1, STYLES[ALL], 5, ALL)):
            look = {"color": colour, "marker": marker, "markersize": size, "linestyle": "", "label": label, "zorder": 4}
            draw_line(axes, ends[share].dropna(subset=measure), "share", measure, look)
        finish_panel(axes, title, in_percent=measure != "kl")
        axes.xaxis.set_major_formatter(PER_CENT)
        axes.set_xlim(-0.05, 1.05)
    for axes in panels[1]:
        axes.set_xlabel("share of heads steered")
    add_legend(figure, panels[0, 0])
    plt.close(figure)
    return figure


@plt.rc_context(PRINT)
def plot_scaling(table: pd.DataFrame, chosen: float | None = None) -> plt.Figure:
    """ASR and what it costs over the scaling factor, whose chosen value is marked.

    Columns of `table`: `scaling_factor` (0: the base), `asr` with its 95 % interval `asr_low` and `asr_high`,
    `benign_refusals`, `benign_changes`, `icl_accuracy` (shares), `kl` (nats).
    """
    table = table.sort_values("scaling_factor").assign(icl_errors=1 - table["icl_accuracy"])
    factors = table["scaling_factor"].tolist()
    figure, panels = plt.subplots(1, 3, figsize=(WIDTH, 2.8), layout="constrained")
    measures = [{"asr": (*STYLES[METHOD], "-", "ASR")}, COSTS, {"kl": ("k", "^", "-", "KL")}]
    for axes, lines, title in zip(panels, measures, (ASR_TITLE, "share of answers", KL_TITLE), strict=True):
        for measure, (colour, marker, line, label) in lines.items():
            look = {"color": colour, "marker": marker, "linestyle": line, "label": label}
            draw_line(axes, table.dropna(subset=measure), "scaling_factor", measure, look)
        finish_panel(axes, title, in_percent="kl" not in lines)
        if chosen is not None:
            label = f"chosen: {chosen:g}" if axes is panels[-1] else None  # last in the legend
            axes.axvline(chosen, color="0.35", linewidth=1, linestyle=(0, (4, 2)), zorder=0, label=label)
        if all(float(factor).is_integer() for factor in factors) and np.ptp(factors) <= 10:
            axes.set_xticks(factors, [f"{factor:g}" for factor in factors])
        else:
            axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.margins(x=0.08)
        axes.set_xlabel("scaling factor λ" + " (0: base)" * (0 in factors))
    add_legend(figure, *panels)
    plt.close(figure)
    return figure


def draw_line(
    axes: Axes,
    rows: pd.DataFrame,
    x: str,
    measure: str,
    look: dict,
    shift: float = 0,
    whiskers: pd.Series | bool = True,
) -> None:
    """Marks of a measure over x and the line through them, with whiskers where the table has its interval."""
    look = {"markersize": 4.5, "linewidth": 1.2} | look
    if f"{measure}_low" not in rows:
        axes.plot(rows[x] + shift, rows[measure], **look)
        return
    spread = pd.concat([rows[measure] - rows[f"{measure}_low"], rows[f"{measure}_high"] - rows[measure]], axis=1)
    spread = spread.abs().where(np.broadcast_to(np.array(whiskers).reshape(-1, 1), spread.shape))
    axes.errorbar(rows[x] + shift, rows[measure], yerr=spread.to_numpy().T, elinewidth=0.9, capsize=2, **look)


def finish_panel(axes: Axes, title: str, in_percent: bool) -> None:
    """Zero at the foot: less is better in every panel."""
    axes.set(ylabel=title)
    axes.set_ylim(bottom=-0.04 * axes.get_ylim()[1])
    axes.yaxis.set_major_formatter(PER_CENT if in_percent else StrMethodFormatter("{x:g}"))
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)


def add_legend(figure: plt.Figure, *panels: Axes) -> None:
    """One legend below for all panels, in which a label that several have stands once."""
    keys: dict[str, object] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            keys.setdefault(label, handle)
    ncols = len(keys) if sum(map(len, keys)) <= 60 else 3  # letters
    figure.legend(keys.values(), keys.keys(), loc="outside lower center", ncols=ncols, frameon=False, handlelength=3)


@naming_languages(PRINT)
def plot_methods(table: pd.DataFrame, *, own_names: bool = True) -> plt.Figure:
    """Bars of ASR with 95 % intervals per language: the base, steered by its own heads, its tier's, the universal ones.

    Columns of `table`: `language`, `heads` (`base`, `language-specific`, `tier`, `universal`), `asr`, `low`, `high`;
    others are not read. `heads` that the table does not name are left out; a language without their row, or without
    an ASR in it, has a cross in place of the bar. Raises ValueError where a row is there twice.
    """
    looks = {heads: look for heads, look in METHODS.items() if (table["heads"] == heads).any()}
    return tier_bars(table[table["heads"].isin(looks)], looks, own_names)
