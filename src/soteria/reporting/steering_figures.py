"""Pictures of what steering gains and what it costs, for print. Knows tables of rates; reads no files."""

from itertools import product

import numpy as np
import pandas as pd
from matplotlib import patheffects
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter, StrMethodFormatter
from matplotlib.transforms import Bbox

from soteria.grid.comparison import METHOD
from soteria.reporting import fonts
from soteria.reporting.figures import PRINT, STYLES, TIER_STYLES, WIDTH, naming_languages, tier_of

# Of the lines of a trade-off, one for each share of heads: Okabe and Ito's colours with markers and lines.
SHARE_STYLES = (
    ("#0072B2", "o", "-"),
    ("#E69F00", "s", "--"),
    ("#000000", "^", ":"),
    ("#CC79A7", "D", "-."),
    ("#009E73", "v", (0, (5, 1))),
    ("#D55E00", "P", (0, (1, 1))),
    ("#56B4E9", "X", (0, (3, 1, 1, 1, 1, 1))),
)
# Of bars, by what they show.
BASE_AND_STEERED = {"base": {"color": "w"}, "steered": {"color": STYLES[METHOD][0], "hatch": "////", "hatchcolor": "w"}}


@naming_languages(PRINT)
def plot_asr(table: pd.DataFrame, *, own_names: bool = True) -> plt.Figure:
    """Bars of ASR with Wilson 95 % intervals, base beside steered, languages grouped by tier.

    `table` has a row per language with its `base` and `safe` rates, as shares, and `base_low` to `safe_high`:
    `soteria.tables.tidy` makes it, of whose rows the method's ASR is drawn.
    """
    if "rate" in table:
        table = table[(table["rate"] == "asr") & (table["heads"] == METHOD)]
    long = pd.concat(
        table[["language", which, f"{which}_low", f"{which}_high"]].set_axis(["language", "asr", "low", "high"], axis=1)
        for which in ("base", "safe")
    )
    return tier_bars(long.assign(heads=np.repeat(["base", "steered"], len(table))), BASE_AND_STEERED, own_names)


def tier_bars(table: pd.DataFrame, looks: dict[str, dict], own_names: bool) -> plt.Figure:
    """Bars of ASR with 95 % intervals: a group per language, grouped by tier, in it a bar for each of the `looks`.

    `table` has the columns `language`, `heads` (a key of `looks`), `asr`, `low`, `high` (shares). A bar whose row is
    not there, or not a number, was not run: a cross stands in its place. Raises ValueError where a row is there twice.
    """
    languages = list(dict.fromkeys(table["language"]))
    tiers = [tier for tier in TIER_STYLES if tier in set(map(tier_of, languages))]
    legend = 1.1 + 0.07 * max(map(len, looks))  # inches, with the axis' numbers
    width = min(WIDTH, legend + (0.1 + 0.2 * len(looks)) * len(languages))
    wide = width == WIDTH
    figure, axes = plt.subplots(figsize=(width, 3.1 if wide else 2.6), layout="constrained")
    above = axes.get_xaxis_transform()
    places, names, start = [], [], 0.0
    for tier in tiers:
        members = [language for language in languages if tier_of(language) == tier]
        own = start + np.arange(len(members))
        axes.text(own.mean(), 1.03, tier, transform=above, ha="center", va="bottom", weight="bold")
        axes.plot((own[0] - 0.45, own[-1] + 0.45), (1.02, 1.02), "k", transform=above, clip_on=False, lw=1)
        places.extend(own)
        names.extend(members)
        start = own[-1] + 1.6  # a wider gap between tiers
    columns = table.pivot(index="language", columns="heads").reindex(names)
    share = 0.8 / len(looks)  # of a language's place, a bar
    absent = []
    for i, (heads, look) in enumerate(looks.items()):
        middles = np.array(places) + (i - (len(looks) - 1) / 2) * share
        asr, low, high = (
            columns[which].reindex(columns=[heads]).to_numpy(float)[:, 0] for which in ("asr", "low", "high")
        )
        bars = axes.bar(
            middles,
            asr,
            0.95 * share,
            yerr=np.abs([asr - low, high - asr]),
            edgecolor="k",
            linewidth=0.7,
            error_kw={"elinewidth": 0.9, "capsize": min(2, 5 * share)},
            **{"label": heads} | look,
        )
        if look["color"] != "w":  # whiskers are seen before a dark bar
            bars.errorbar[2][0].set_path_effects([patheffects.withStroke(linewidth=2.4, foreground="w")])
        absent.extend(middles[np.isnan(asr)])
    if absent:
        look = {"color": "0.4", "markersize": 4, "clip_on": False, "label": "not run"}
        axes.plot(absent, [0.025] * len(absent), "x", transform=above, **look)
    labels = fonts.language_labels(names, own_names)
    axes.set_xticks(places, [labels[name] for name in names], rotation=35, ha="right", rotation_mode="anchor")
    axes.set(ylabel="ASR (95 % interval)", ylim=(0, None), xlim=(-0.6, places[-1] + 0.6))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.tick_params(axis="x", length=0, pad=8)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    place = {"loc": "outside lower center", "ncols": len(looks) + 1} if wide else {"loc": "outside right upper"}
    keys = sorted(zip(*axes.get_legend_handles_labels(), strict=True), key=lambda key: key[1] == "not run")  # last
    figure.legend(*zip(*keys, strict=True), frameon=False, **place)
    plt.close(figure)
    return figure


def pareto_front(costs: np.ndarray) -> np.ndarray:
    """Which rows of costs (n, k), all to be low, no other row beats: as low in each, and lower in one. Bool (n,)."""
    costs = np.asarray(costs, float)
    no_worse = (costs[:, None] <= costs[None]).all(-1)  # (n, n): row i against row j
    better = (costs[:, None] < costs[None]).any(-1)
    return ~(no_worse & better).any(0)


@plt.rc_context(PRINT)
def plot_trade_off(table: pd.DataFrame) -> plt.Figure:
    """ASR against benign damage, a line per share of heads over its scaling factors, the Pareto front ringed.

    `table` has the columns `share` (of all heads, 0 to 1), `scaling_factor`, `asr` (0 to 1) and `kl` (nats, of the
    benign answers' first token from the base's): `soteria.tables.trade_off` makes it. Points are labelled with their
    scaling factors; a row of share 0 is the base.
    """
    table = table.sort_values(["share", "scaling_factor"], ignore_index=True)
    figure, axes = plt.subplots(figsize=(WIDTH, 3.6), layout="constrained")
    best = table[pareto_front(table[["asr", "kl"]].to_numpy())].sort_values("kl")
    axes.plot(
        best["kl"],
        best["asr"],
        "o",
        markersize=11,
        markerfacecolor="none",
        markeredgecolor="0.35",
        label="Pareto front",
    )
    axes.step(best["kl"], best["asr"], where="post", color="0.75", linewidth=3, zorder=0)
    base = table[table["share"] == 0]
    if len(base):
        axes.plot(base["kl"], base["asr"], "k*", markersize=8, label="base")
    steered = table[table["share"] > 0]
    for i, (share, rows) in enumerate(steered.groupby("share")):
        colour, marker, line = SHARE_STYLES[i % len(SHARE_STYLES)]
        axes.plot(
            rows["kl"],
            rows["asr"],
            linestyle=line,
            marker=marker,
            markersize=5,
            color=colour,
            label=f"{share:.0%} of heads",
        )
    # KL grows with the square of a small step: on this scale, equal steps of the scaling factor are about equally wide.
    axes.set_xscale("function", functions=(lambda kl: np.sqrt(np.abs(kl)) * np.sign(kl), lambda x: x * np.abs(x)))
    axes.set_xticks(_square_root_ticks(table["kl"].max()))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.set(xlabel="benign damage: KL from the base, first token (nats)", ylabel="attack success rate (ASR)")
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.margins(0.08)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", frameon=False, title="numbers: scaling factor", handlelength=5)
    texts = [f"{row.scaling_factor:g}" if row.share else "" for row in table.itertuples()]
    place_labels(axes, table[["kl", "asr"]].to_numpy(), texts)
    plt.close(figure)
    return figure


def _square_root_ticks(highest: float) -> list[float]:
    """Round numbers from 0 to about the highest that stand apart on a square-root scale."""
    ticks = [0.0]
    for tick in (digit * 10.0**power for power in range(-6, 3) for digit in (1, 2, 5)):
        if tick <= 1.1 * highest and np.sqrt(tick) - np.sqrt(ticks[-1]) > 0.09 * np.sqrt(highest):
            ticks.append(tick)
    return ticks


def place_labels(axes: Axes, points: np.ndarray, texts: list[str]) -> None:
    """Write texts beside points (n, 2) where they touch neither points nor one another, as near as there is room.

    An empty text leaves its point without a label; a text for which there is no room is left out. Fixes the figure's
    layout: one that changed later would move the points, and not the labels.
    """
    figure = axes.figure
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    half = 4 * figure.dpi / 72  # pixels, of a mark's side
    taken = [Bbox.from_extents(x - half, y - half, x + half, y + half) for x, y in axes.transData.transform(points)]
    room = axes.get_window_extent()
    # Up and right first: a curve that falls leaves room there.
    directions = [(np.cos(angle), np.sin(angle)) for angle in np.pi / 4 * np.array([1, 2, 0, 7, 3, 5, 6, 4])]
    leader = {"arrowstyle": "-", "color": "0.4", "linewidth": 0.5, "shrinkA": 0, "shrinkB": 3}
    style = {"textcoords": "offset points", "ha": "center", "va": "center", "fontsize": 7, "in_layout": False}
    for point, text in zip(points, texts, strict=True):
        if not text:
            continue
        label = axes.annotate(text, point, (0, 0), **style)
        for radius, (x, y) in product((9, 13, 18, 24, 32, 40), directions):  # printer's points from the mark's middle
            label.set_position((radius * x, radius * y))
            box = label.get_window_extent()
            if not any(map(box.overlaps, taken)) and room.contains(*box.min) and room.contains(*box.max):
                taken.append(box)
                far = {"arrowprops": leader} if radius > 13 else {}
                halo = [patheffects.withStroke(linewidth=2, foreground="w")]  # lines may pass beneath
                axes.annotate(text, point, label.get_position(), path_effects=halo, **style, **far)
                break
        label.remove()
