"""Figures of what steering gains and what it costs.

Tables come in with a row per thing measured, rates as shares from 0 to 1. What was not run, or is NaN, is shown as not
run (a hatched cell, a cross in place of a bar, no mark on a line), never drawn as zero.
"""

from itertools import chain, product

import numpy as np
import pandas as pd
from matplotlib import patheffects
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import Formatter, FuncFormatter, MaxNLocator, StrMethodFormatter
from matplotlib.transforms import Bbox

from soteria.languages import LANGUAGES, TIERS, find_language
from soteria.reporting import fonts
from soteria.reporting.figures import TIER_STYLES, WIDTH, draw_matrix, mark_tiers, printed, tier_marks, tier_of
from soteria.reporting.labels import ALL_HEADS, BASE, BOTTOM, METHOD, RANDOM, SHARED_ALL, SHARED_TIER, TOP

# Okabe and Ito's colors. Bars, by the heads that are steered.
BARS = {
    BASE: {"color": "w", "label": "base"},
    METHOD: {"color": "#0072B2", "hatch": "////", "hatchcolor": "w", "label": "language-specific"},
    SHARED_TIER: {"color": "#E69F00", "hatch": "....", "hatchcolor": "k", "label": "tier"},
    SHARED_ALL: {"color": "#009E73", "hatch": "\\\\\\\\", "hatchcolor": "w", "label": "universal"},
}
# Lines over the share of heads, by which heads these are: color, marker and line.
LINES = {TOP: ("#0072B2", "o", "-"), RANDOM: ("#E69F00", "s", "--"), BOTTOM: ("#CC79A7", "v", ":")}
# Lines of a trade-off, one per share of heads.
SHARE_LINES = (
    ("#0072B2", "o", "-"),
    ("#E69F00", "s", "--"),
    ("#000000", "^", ":"),
    ("#CC79A7", "D", "-."),
    ("#009E73", "v", (0, (5, 1))),
    ("#D55E00", "P", (0, (1, 1))),
    ("#56B4E9", "X", (0, (3, 1, 1, 1, 1, 1))),
)
# What steering breaks: color, marker, line and name.
COSTS = {
    "benign_refusals": ("#E69F00", "s", "--", "benign questions refused"),
    "benign_changes": ("#CC79A7", "v", ":", "benign answers changed"),
    "icl_errors": ("#009E73", "D", "-.", "in-context answers wrong"),
}
# Lists of several languages' heads, in the order of their rows below the languages' own, and their names there.
SHARED_LISTS = {"Universal": "Universal", **{tier: f"{tier} tier" for tier in TIERS}, BASE: "base (no steering)"}
ASR_TITLE, KL_TITLE = "ASR (95 % interval)", "KL from the base,\nfirst token (nats)"
PERCENT, NUMBER = FuncFormatter(lambda share, _: f"{100 * share:g}%"), StrMethodFormatter("{x:g}")
NOT_RUN = {"facecolor": "0.93", "edgecolor": "0.6", "hatch": "////", "linewidth": 0}


@printed
def plot_asr(table: pd.DataFrame) -> plt.Figure:
    """Bars of ASR with 95 % intervals, a group per language, the languages by tier: the base, and each way to steer it.

    Columns of `table`: `language`, `heads` (the keys of `BARS`; others are not read), `asr`, `low`, `high`. `heads`
    that the table does not name are left out; a language without such a row, or without an ASR in it, has a cross in
    place of the bar. Raises ValueError where a row appears twice.
    """
    table = table[table["heads"].isin(BARS.keys())]
    bars = [heads for heads in BARS if heads in set(table["heads"])]
    tiers = {tier: [name for name in dict.fromkeys(table["language"]) if tier_of(name) == tier] for tier in TIER_STYLES}
    names = [name for members in tiers.values() for name in members]
    legend = 1.1 + 0.07 * max(len(BARS[heads]["label"]) for heads in bars)  # inches, with the axis' numbers
    width = min(WIDTH, legend + (0.1 + 0.2 * len(bars)) * len(names))
    wide = width == WIDTH
    figure, axes = plt.subplots(figsize=(width, 3.1 if wide else 2.6), layout="constrained")
    above, places = axes.get_xaxis_transform(), np.array([])
    for tier, members in tiers.items():
        if members:
            start = places[-1] + 1.6 if len(places) else 0  # a wider gap between tiers
            own = start + np.arange(len(members))
            places = np.concatenate([places, own])
            axes.text(own.mean(), 1.03, tier, transform=above, ha="center", va="bottom", weight="bold")
            axes.plot((own[0] - 0.45, own[-1] + 0.45), (1.02, 1.02), "k", transform=above, clip_on=False, lw=1)
    columns = table.pivot(index="language", columns="heads", values=["asr", "low", "high"]).reindex(names).astype(float)
    share, absent = 0.8 / len(bars), []  # of a language's place, a bar
    for i, heads in enumerate(bars):
        middles = places + (i - (len(bars) - 1) / 2) * share
        asr, low, high = (columns[which, heads] for which in ("asr", "low", "high"))
        whiskers = {
            "yerr": np.abs([asr - low, high - asr]),
            "error_kw": {"elinewidth": 0.9, "capsize": min(2, 5 * share)},
        }
        drawn = axes.bar(middles, asr, 0.95 * share, edgecolor="k", linewidth=0.7, **whiskers, **BARS[heads])
        if BARS[heads]["color"] != "w":  # whiskers stay visible on a dark bar
            drawn.errorbar[2][0].set_path_effects([patheffects.withStroke(linewidth=2.4, foreground="w")])
        absent.extend(middles[np.isnan(asr)])
    keys = axes.containers[1::2]  # the bars, without their whiskers
    if absent:
        look = {"color": "0.4", "markersize": 4, "clip_on": False, "label": "not run"}
        keys += axes.plot(absent, [0.025] * len(absent), "x", transform=above, **look)
    labels = fonts.language_labels(names).values()
    axes.set_xticks(places, labels, rotation=35, ha="right", rotation_mode="anchor")
    axes.set(ylabel=ASR_TITLE, ylim=(0, None), xlim=(-0.6, places[-1] + 0.6))
    axes.yaxis.set_major_formatter(PERCENT)
    axes.tick_params(axis="x", length=0, pad=8)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    place = {"loc": "outside lower center", "ncols": len(keys)} if wide else {"loc": "outside right upper"}
    figure.legend(handles=keys, frameon=False, **place)
    return figure


def pareto_front(costs: np.ndarray) -> np.ndarray:
    """Which rows of costs (n, k), lower is better, no other row beats: as low in each, lower in one. Bool (n,)."""
    costs = np.asarray(costs, float)
    no_worse = (costs[:, None] <= costs[None]).all(-1)  # (n, n): row i against row j
    better = (costs[:, None] < costs[None]).any(-1)
    return ~(no_worse & better).any(0)


@printed
def plot_trade_off(table: pd.DataFrame) -> plt.Figure:
    """ASR against benign damage, a line per share of heads over its scaling factors, the Pareto front ringed.

    Columns of `table`: `share` (of all heads; 0 is the base), `scaling_factor`, with which points are labeled, `asr`,
    `kl` (nats, of the benign answers' first token from the base's).
    """
    table = table.sort_values(["share", "scaling_factor"], ignore_index=True)
    figure, axes = plt.subplots(figsize=(WIDTH, 3.6), layout="constrained")
    best = table[pareto_front(table[["asr", "kl"]].to_numpy())].sort_values("kl")
    ring = {"markersize": 11, "markerfacecolor": "none", "markeredgecolor": "0.35"}
    axes.plot(best["kl"], best["asr"], "o", label="Pareto front", **ring)
    axes.step(best["kl"], best["asr"], where="post", color="0.75", linewidth=3, zorder=0)
    base, steered = table[table["share"] == 0], table[table["share"] > 0]
    if len(base):
        axes.plot(base["kl"], base["asr"], "k*", markersize=8, label="base")
    for i, (share, rows) in enumerate(steered.groupby("share")):
        color, marker, line = SHARE_LINES[i % len(SHARE_LINES)]
        look = {"color": color, "marker": marker, "linestyle": line, "markersize": 5}
        axes.plot(rows["kl"], rows["asr"], label=f"{share:.0%} of heads", **look)
    # KL grows with the square of a small step: on this scale, equal steps of the scaling factor are about equally wide.
    _scale_by_root(axes, table["kl"].max(), NUMBER, (0.02, 0.1, 0.25, 0.5, 0.75, 1))
    axes.set(xlabel="benign damage: KL from the base, first token (nats)", ylabel="attack success rate (ASR)")
    axes.yaxis.set_major_formatter(PERCENT)
    axes.margins(0.08)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", frameon=False, title="numbers: scaling factor", handlelength=5)
    texts = [f"{row.scaling_factor:g}" if row.share else "" for row in table.itertuples()]
    label_points(axes, table[["kl", "asr"]].to_numpy(), texts)
    return figure


def label_points(axes: Axes, points: np.ndarray, texts: list[str]) -> None:
    """Write a text beside each point (n, 2), on whichever side it touches neither points nor other texts.

    An empty text, and one for which no side has room, is left out.
    """
    axes.figure.draw_without_rendering()
    half, room = 4 * axes.figure.dpi / 72, axes.get_window_extent()  # pixels, of a mark's side
    taken = [Bbox.from_extents(x - half, y - half, x + half, y + half) for x, y in axes.transData.transform(points)]
    style = {"textcoords": "offset points", "ha": "center", "va": "center", "fontsize": 7, "in_layout": False}
    halo = [patheffects.withStroke(linewidth=2, foreground="w")]  # lines may pass beneath
    # Up and right first: a falling curve leaves room there.
    places = [(7, 7), (0, 9), (9, 0), (7, -7), (-7, 7), (-7, -7), (0, -9), (-9, 0)]  # points
    places += [(1.6 * x, 1.6 * y) for x, y in places]
    for point, text in zip(points, texts, strict=True):
        for place in places if text else ():
            label = axes.annotate(text, point, place, path_effects=halo, **style)
            box = label.get_window_extent()
            if not any(map(box.overlaps, taken)) and room.contains(*box.min) and room.contains(*box.max):
                taken.append(box)
                break
            label.remove()


@printed
def plot_head_shares(table: pd.DataFrame) -> plt.Figure:
    """Gain and cost of steering a share of the heads, a panel per measure: lines for top, random and bottom heads.

    Columns of `table`: `heads` (the keys of `LINES`; anything where the share is 0 or 1), `share` (of all heads: 0 is
    the base and 1 all heads, where the lines meet), `asr` with its 95 % interval `low` and `high`, `benign_refusals`,
    `benign_changes`, `kl` (nats).
    """
    figure, panels = plt.subplots(2, 2, figsize=(WIDTH, 4.4), sharex=True, layout="constrained")
    titles = {"asr": ASR_TITLE, "kl": KL_TITLE} | {cost: COSTS[cost][3] for cost in list(COSTS)[:2]}
    ends = {share: table[table["share"] == share].iloc[:1] for share in (0, 1)}
    marks = ((0, "*", "k", 8, "base"), (1, "D", "#009E73", 5, ALL_HEADS))
    used = [heads for heads in LINES if (table["heads"] == heads).any()]
    for axes, (measure, title) in zip(panels.flat, titles.items(), strict=True):
        for i, heads in enumerate(used):
            own = table[(table["heads"] == heads) & ~table["share"].isin([0, 1])]
            rows = pd.concat([ends[0], own, ends[1]]).sort_values("share")
            inner = ~rows["share"].isin([0, 1])
            rows = rows.assign(low=rows["low"].where(inner), high=rows["high"].where(inner))  # the ends have their own
            shift = 0.008 * (i - (len(used) - 1) / 2)  # whiskers of one share stand side by side
            draw_line(axes, rows.assign(share=rows["share"] + shift), "share", measure, *LINES[heads], heads)
        for share, marker, color, size, label in marks:
            draw_line(axes, ends[share], "share", measure, color, marker, "", label, markersize=size, zorder=4)
        finish_panel(axes, title, measure)
        axes.xaxis.set_major_formatter(PERCENT)
        axes.set_xlim(-0.05, 1.05)
    for axes in panels[1]:
        axes.set_xlabel("share of heads steered")
    add_legend(figure, panels[0, 0])
    return figure


@printed
def plot_rankings(table: pd.DataFrame) -> plt.Figure:
    """ASR against benign refusals and against KL, a line for each ranking over its scaling factors.

    Columns of `table`: `heads` (the ranking; random heads are a band of 95 % intervals), `scaling_factor`, with which
    the points of the first ranking are labeled, `asr`, `low`, `high`, `benign_refusals`, `kl` (nats).
    """
    figure, panels = plt.subplots(1, 2, figsize=(WIDTH, 3.4), sharey=True, layout="constrained")
    base, steered = table[table["heads"] == BASE], table[table["heads"] != BASE]
    for axes, measure, form in zip(panels, ("benign_refusals", "kl"), (PERCENT, NUMBER), strict=True):
        axes.plot(base[measure], base["asr"], "k*", markersize=8, label=BASE, zorder=4)
        for i, (heads, rows) in enumerate(steered.groupby("heads", sort=False)):
            rows = pd.concat([base, rows.sort_values("scaling_factor")])  # every line begins at λ = 0
            if heads == RANDOM:
                axes.plot(rows[measure], rows["asr"], color="0.5", linewidth=1, zorder=1)
                axes.fill_between(rows[measure], rows["low"], rows["high"], color="0.82", zorder=0, label=heads)
                continue
            color, marker, line = SHARE_LINES[i % len(SHARE_LINES)]
            look = {"color": color, "marker": marker, "linestyle": line, "markersize": 4.5, "linewidth": 1.2}
            axes.plot(rows[measure], rows["asr"], label=heads, **look)
        _scale_by_root(axes, table[measure].max(), form, (0.03, 0.2, 0.5, 1))
        axes.yaxis.set_major_formatter(PERCENT)
        axes.grid(alpha=0.3)
        first = steered[steered["heads"] == steered["heads"].iloc[0]]
        texts = [f"{factor:g}" for factor in first["scaling_factor"]]
        label_points(axes, first[[measure, "asr"]].to_numpy(), texts)
    panels[0].set(xlabel=COSTS["benign_refusals"][3], ylabel=ASR_TITLE.partition(" (")[0])
    panels[1].set_xlabel(KL_TITLE.replace("\n", " "))
    add_legend(figure, panels[0])
    return figure


def _scale_by_root(axes: Axes, highest: float, form: Formatter, parts: tuple[float, ...]) -> None:
    """Small costs get room: an x axis by the square root, with ticks at 0 and at parts of `highest`."""
    axes.set_xscale("function", functions=(lambda x: np.sqrt(np.abs(x)) * np.sign(x), lambda x: x * np.abs(x)))
    axes.set_xticks(sorted({0.0, *(float(f"{highest * part:.1g}") for part in parts)}))
    axes.xaxis.set_major_formatter(form)


@printed
def plot_scaling(table: pd.DataFrame, chosen: float | None = None) -> plt.Figure:
    """ASR and what it costs over the scaling factor, whose chosen value is marked.

    Columns of `table`: `scaling_factor` (0: the base), `asr` with its 95 % interval `low` and `high`,
    `benign_refusals`, `benign_changes`, `icl_accuracy` (shares), `kl` (nats).
    """
    table = table.sort_values("scaling_factor").assign(icl_errors=1 - table["icl_accuracy"])
    factors = table["scaling_factor"].tolist()
    figure, panels = plt.subplots(1, 3, figsize=(WIDTH, 2.8), layout="constrained")
    measures = [{"asr": (*LINES[TOP], "ASR")}, COSTS, {"kl": ("k", "^", "-", "KL")}]
    for axes, lines, title in zip(panels, measures, (ASR_TITLE, "share of answers", KL_TITLE), strict=True):
        for measure, look in lines.items():
            draw_line(axes, table, "scaling_factor", measure, *look)
        finish_panel(axes, title, measure)
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
    return figure


def draw_line(axes: Axes, rows: pd.DataFrame, x: str, measure: str, color, marker, line, label: str, **look) -> None:
    """Marks of a measure over x and the line through them; ASR has whiskers from `low` to `high`."""
    rows = rows.dropna(subset=measure)
    look = {"markersize": 4.5, "linewidth": 1.2} | look
    look |= {"color": color, "marker": marker, "linestyle": line, "label": label}
    if measure == "asr":
        whiskers = np.abs([rows["asr"] - rows["low"], rows["high"] - rows["asr"]])
        axes.errorbar(rows[x], rows["asr"], yerr=whiskers, elinewidth=0.9, capsize=2, **look)
    else:
        axes.plot(rows[x], rows[measure], **look)


def finish_panel(axes: Axes, title: str, measure: str) -> None:
    """Zero at the foot: less is better in every panel."""
    axes.set(ylabel=title)
    axes.set_ylim(bottom=-0.04 * axes.get_ylim()[1])
    axes.yaxis.set_major_formatter(NUMBER if measure == "kl" else PERCENT)
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)


def add_legend(figure: plt.Figure, *panels: Axes) -> None:
    """One legend below for all panels."""
    keys = [axes.get_legend_handles_labels() for axes in panels]
    handles, labels = (list(chain(*parts)) for parts in zip(*keys, strict=True))
    n_columns = len(labels) if sum(map(len, labels)) <= 60 else 3  # letters
    figure.legend(handles, labels, loc="outside lower center", ncols=n_columns, frameon=False, handlelength=3)


@printed
def plot_transfer(table: pd.DataFrame) -> plt.Figure:
    """ASR with the heads of one language (rows) on prompts in another (columns), as a matrix of percentages.

    Columns of `table`: `heads_of` (a language, or a key of `SHARED_LISTS`: rows of their own at the foot),
    `prompts_of` (a language), `asr`, `low`, `high`. A language's own heads are outlined, cells that were not run are
    hatched. Up to five columns have room for intervals. Raises ValueError where a pair appears twice, UserError for
    an unknown language.
    """
    columns, named = in_order(set(table["prompts_of"])), set(table["heads_of"])
    languages, shared = in_order(named - SHARED_LISTS.keys()), [name for name in SHARED_LISTS if name in named]
    rows = [*languages, *shared]
    pivoted = table.pivot(index="heads_of", columns="prompts_of", values=["asr", "low", "high"]).astype(float)
    asr, low, high = (pivoted[which].reindex(index=rows, columns=columns) for which in ("asr", "low", "high"))
    texts = asr.map(lambda value: f"{100 * value:.0f}")
    with_intervals = len(columns) <= 5
    if with_intervals:
        interval = "\n[" + low.map("{:.0%}".format) + ", " + high.map("{:.0%}".format) + "]"
        texts += interval.replace("%", "", regex=True).where(low.notna(), "")
    cell = (0.75, 0.42) if with_intervals else (0.33, 0.26)  # inches
    size = (max(2.8, cell[0] * len(columns) + 2.3), cell[1] * len(rows) + 1.9)
    figure, axes = plt.subplots(figsize=size, layout="constrained")
    labels, highest = fonts.language_labels([*rows, *columns]) | SHARED_LISTS, np.nanmax(asr.to_numpy(), initial=0.01)
    image = draw_matrix(axes, asr, texts.to_numpy(), labels, highest)
    if languages and shared:
        axes.axhline(len(languages) - 0.5, color="w", linewidth=4)
    for row, column in np.argwhere(asr.isna()):
        axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, **NOT_RUN))
    own = [name for name in languages if name in columns]
    for name, (color, width) in product(own, (("k", 3), ("w", 1.4))):  # white in black shows on every color
        corner = (columns.index(name) - 0.5, rows.index(name) - 0.5)
        frame = {"facecolor": "none", "edgecolor": color, "linewidth": width, "clip_on": False, "zorder": 3}
        axes.add_patch(Rectangle(corner, 1, 1, **frame))
    axes.tick_params(length=0)
    axes.set(xlabel="prompts in", ylabel="steered heads of")
    mark_tiers(axes, columns, languages)
    figure.colorbar(image, ax=axes, label="ASR", aspect=25, pad=0.03, format=PERCENT)
    keys = tier_marks({*columns, *languages})
    if own:
        keys.append(Patch(facecolor="none", edgecolor="k", linewidth=1.5, label="own heads"))
    if asr.isna().any(axis=None):
        keys.append(Patch(**NOT_RUN, label="not run"))
    title = "numbers: ASR in %" + ", [95 % interval]" * with_intervals
    n_columns = min(len(keys), 3 if size[0] < 4.5 else 6)
    figure.legend(handles=keys, title=title, loc="outside lower center", ncols=n_columns, frameon=False)
    return figure


def in_order(names: set[str]) -> list[str]:
    """Languages in the paper's order. Raises UserError for an unknown one."""
    return sorted(names, key=lambda name: LANGUAGES.index(find_language(name)))
