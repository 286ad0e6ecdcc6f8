"""Every figure from made-up numbers, and how tests read figures."""

from itertools import combinations, product

import numpy as np
import pandas as pd
import torch
from matplotlib import pyplot as plt
from matplotlib.text import Text

from soteria.languages import PAPER_LANGUAGES
from soteria.reporting import fonts, head_figures, steering_figures
from soteria.reporting.labels import BASE, BOTTOM, RANDOM, RANKINGS, SHARED_TIER, TOP

NAMES = [language.name for language in PAPER_LANGUAGES]
FEW = ["English", "Hindi", "Bengali"]
LISTS = ["Universal", "High", "Mid", "Low", BASE]


def some_effects(names=NAMES, shape=(4, 8)) -> dict[str, torch.Tensor]:
    """Most heads near zero, the first a hundred times as strong."""
    generator = torch.Generator().manual_seed(0)
    effects = {name: torch.randn(shape, generator=generator, dtype=torch.float64) / 1000 for name in names}
    for effect in effects.values():
        effect[0, 0] = -0.4
    return effects


def some_lists(names=NAMES, shape=(4, 8), count=16) -> dict[str, list[tuple[int, int]]]:
    generator = np.random.default_rng(0)
    heads = {name: generator.choice(shape[0] * shape[1], count, replace=False) for name in names}
    return {name: [divmod(int(i), shape[1]) for i in chosen] for name, chosen in heads.items()}


def some_bars(names=NAMES, missing=(("Hindi", SHARED_TIER),)) -> pd.DataFrame:
    rows = []
    for (i, language), (j, heads) in product(enumerate(names), enumerate(steering_figures.BARS)):
        asr = (0.4 + 0.02 * i) / (1 + 1.5 * j)
        if (language, heads) not in missing:
            rows.append((language, heads, asr, 0.8 * asr, 1.25 * asr))
    return pd.DataFrame(rows, columns=["language", "heads", "asr", "low", "high"])


def some_trade_off(shares=(0.1, 0.25, 0.5, 0.75, 1.0), factors=range(3, 9)) -> pd.DataFrame:
    """Curves so close to one another that labels have to make way."""
    rows = [
        (share, factor, 0.6 / factor + 0.02 * share, 0.002 * share * factor**2)
        for share in shares
        for factor in factors
    ]
    return pd.DataFrame([(0.0, 0.0, 0.4, 0.0), *rows], columns=["share", "scaling_factor", "asr", "kl"])


def some_shares(shares=(0.1, 0.25, 0.5, 0.75)) -> pd.DataFrame:
    """The base and all heads appear once; random heads take away most and cost most."""
    rows = []
    for share, heads in [(0.0, BASE), *product(shares, [TOP, RANDOM, BOTTOM]), (1.0, "all heads")]:
        strength = share * {RANDOM: 1.2, BOTTOM: 1.1}.get(heads, 1)
        asr = 0.4 * np.exp(-3 * strength)
        rows.append((heads, share, asr, 0.8 * asr, 1.2 * asr, 0.3 * strength**2, 0.2 * strength**3, 0.3 * strength**3))
    return pd.DataFrame(
        rows, columns=["heads", "share", "asr", "low", "high", "kl", "benign_refusals", "benign_changes"]
    )


def some_factors(factors=(0, 3, 4, 5, 6, 7, 8)) -> pd.DataFrame:
    factors = np.array(factors, float)
    asr, harm = 0.4 * np.exp(-factors / 4), (factors / 8) ** 4
    table = {"scaling_factor": factors, "asr": asr, "low": 0.8 * asr, "high": 1.2 * asr, "kl": 0.2 * harm}
    table |= {"benign_refusals": 0.08 * harm, "benign_changes": 0.38 * harm, "icl_accuracy": 1 - 0.05 * harm}
    return pd.DataFrame(table)


def some_rankings(factors=(2, 4, 6)) -> pd.DataFrame:
    """All rankings along λ, close to one another; all parameters cost most."""
    tables = [pd.DataFrame([{"heads": BASE, "asr": 0.4, "low": 0.3, "high": 0.5, "kl": 0.0, "benign_refusals": 0.0}])]
    for i, name in enumerate(RANKINGS.values()):
        own = some_factors(factors).assign(heads=name)
        tables.append(own.assign(kl=own["kl"] * (1 + i), benign_refusals=own["benign_refusals"] * (1 + i / 3)))
    return pd.concat(tables, ignore_index=True)


def some_transfer(names=NAMES, lists=LISTS, missing=((1, 0), (2, 2))) -> pd.DataFrame:
    """ASR of every pair, lower with a language's own heads; `missing` are (row, column) of pairs that were not run."""
    rows = []
    for (i, heads), (j, prompts) in product(enumerate([*names, *lists]), enumerate(names)):
        asr = np.nan if (i, j) in missing else 0.02 if i == j else 0.1 + 0.02 * ((3 * i + 5 * j) % 17)
        rows.append((heads, prompts, asr, max(0, asr - 0.05), asr + 0.07))
    return pd.DataFrame(rows, columns=["heads_of", "prompts_of", "asr", "low", "high"])


FIGURES = {
    "effects": lambda: head_figures.plot_effects(some_effects(), some_lists()),
    "effects of two languages": lambda: head_figures.plot_effects(some_effects(NAMES[:2])),
    "effects of a large model": lambda: head_figures.plot_effects(some_effects(NAMES[:5], (32, 32))),
    "overlaps": lambda: head_figures.plot_overlaps(some_lists()),
    "overlap of two languages": lambda: head_figures.plot_overlaps(some_lists(NAMES[:2])),
    "layer profiles": lambda: head_figures.plot_layer_profiles(some_effects()),
    "layer profiles of a deep model": lambda: head_figures.plot_layer_profiles(some_effects(shape=(80, 4))),
    "ASR": lambda: steering_figures.plot_asr(some_bars()),
    "ASR of three": lambda: steering_figures.plot_asr(some_bars(FEW)),
    "ASR of one": lambda: steering_figures.plot_asr(some_bars(["Telugu"])),
    "trade-off": lambda: steering_figures.plot_trade_off(some_trade_off()),
    "trade-off of one share": lambda: steering_figures.plot_trade_off(some_trade_off([0.5])),
    "shares": lambda: steering_figures.plot_head_shares(some_shares()),
    "shares of one list": lambda: steering_figures.plot_head_shares(
        some_shares().query("heads not in [@RANDOM, @BOTTOM]")
    ),
    "factors": lambda: steering_figures.plot_scaling(some_factors(), chosen=5),
    "broken factors": lambda: steering_figures.plot_scaling(some_factors(np.linspace(0, 8, 17)), chosen=0.5),
    "one factor": lambda: steering_figures.plot_scaling(some_factors([5])),
    "rankings": lambda: steering_figures.plot_rankings(some_rankings()),
    "two rankings": lambda: steering_figures.plot_rankings(
        some_rankings().query("heads in [@BASE, @RANDOM, 'safety']")
    ),
    "transfer": lambda: steering_figures.plot_transfer(some_transfer()),
    "transfer of shared lists": lambda: steering_figures.plot_transfer(some_transfer().query("heads_of in @LISTS")),
    "transfer of three": lambda: steering_figures.plot_transfer(some_transfer(FEW)),
    "transfer of one": lambda: steering_figures.plot_transfer(some_transfer(["Hindi"])),
}


def legend(figure: plt.Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def names_on(labels: list[Text]) -> list[str]:
    """What labels name, languages in English and shared lists as a table calls them."""
    names = {label: name for name, label in (fonts.language_labels(NAMES) | steering_figures.SHARED_LISTS).items()}
    return [names[label.get_text()] for label in labels]


def touching(figure: plt.Figure) -> list[tuple[str, str]]:
    """Pairs of a figure's texts that overlap when drawn."""
    figure.draw_without_rendering()
    hidden = {
        label
        for axes in figure.axes
        for axis in (axes.xaxis, axes.yaxis)
        for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks())
        for label in (tick.label1, tick.label2)
        if not axes.axison or not min(axis.get_view_interval()) <= tick.get_loc() <= max(axis.get_view_interval())
    }
    texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
    texts = [text for text in texts if text not in hidden and (text.axes is None or text.axes.get_visible())]
    boxes = {text: text.get_window_extent().padded(-0.5) for text in texts}
    pairs = [(a, b) for a, b in combinations(boxes, 2) if boxes[a].overlaps(boxes[b])]
    return [(a.get_text(), b.get_text()) for a, b in pairs if not side_by_side(a, b)]


def side_by_side(a: Text, b: Text) -> bool:
    """Whether the lines of two texts at the same slant are apart though their boxes overlap."""
    if a.get_rotation() != b.get_rotation() or a.get_rotation() % 90 == 0:
        return False
    (ax, ay), (bx, by) = (text.get_transform().transform(text.get_position()) for text in (a, b))
    angle = np.deg2rad(a.get_rotation())
    return abs((bx - ax) * np.sin(angle) - (by - ay) * np.cos(angle)) >= a.get_fontsize() * a.figure.dpi / 72
