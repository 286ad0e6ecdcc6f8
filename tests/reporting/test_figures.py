"""The pictures: what they show is what they were given, nothing on them collides, and their files repeat."""

import os
import subprocess
import sys
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import colors
from matplotlib import pyplot as plt
from matplotlib.collections import LineCollection
from matplotlib.text import Text

from soteria.errors import UserError
from soteria.grid.comparison import METHOD
from soteria.languages import PAPER_LANGUAGES
from soteria.reporting import figures, fonts, steering_figures, tables

NAMES = [language.name for language in PAPER_LANGUAGES]
pytestmark = pytest.mark.filterwarnings("error:Glyph")  # a letter without a font


def some_effects(names=NAMES, shape=(4, 8)) -> dict[str, torch.Tensor]:
    """Most heads near zero, the first a hundred times as strong."""
    generator = torch.Generator().manual_seed(0)
    effects = {name: torch.randn(shape, generator=generator, dtype=torch.float64) / 1000 for name in names}
    for effect in effects.values():
        effect[0, 0] = -0.4
    return effects


def some_lists(names=NAMES, shape=(4, 8), count=16) -> dict[str, list[tuple[int, int]]]:
    generator = np.random.default_rng(0)
    return {
        name: [divmod(int(i), shape[1]) for i in generator.choice(shape[0] * shape[1], count, replace=False)]
        for name in names
    }


def some_rates(names=NAMES) -> pd.DataFrame:
    rates = np.linspace(0, 1, len(names))
    rows = {"language": names, "base": 0.5 + rates / 2, "base_low": 0.4 + rates / 2, "base_high": 0.6 + rates / 2}
    rows |= {"safe": rates / 4, "safe_low": rates / 5, "safe_high": rates / 4 + 0.05}
    return pd.DataFrame(rows)


def some_trade_off(shares=(0.1, 0.25, 0.5, 0.75, 1.0), factors=range(3, 9)) -> pd.DataFrame:
    """Curves so close to one another that labels have to make way."""
    steps = [(share, factor) for share in shares for factor in factors]
    rows = [(share, factor, 0.6 / factor + 0.02 * share, 0.002 * share * factor**2) for share, factor in steps]
    return pd.DataFrame([(0.0, 0.0, 0.4, 0.0), *rows], columns=["share", "scaling_factor", "asr", "kl"])


FIGURES = {
    "effects": lambda own=True: figures.plot_effects(some_effects(), some_lists(), own_names=own),
    "effects of two languages": lambda own=True: figures.plot_effects(some_effects(NAMES[:2]), own_names=own),
    "effects of a large model": lambda own=True: figures.plot_effects(some_effects(NAMES[:5], (32, 32)), own_names=own),
    "overlaps": lambda own=True: figures.plot_overlaps(some_lists(), own_names=own),
    "overlap of two languages": lambda own=True: figures.plot_overlaps(some_lists(NAMES[:2]), own_names=own),
    "layer profiles": lambda own=True: figures.plot_layer_profiles(some_effects()),
    "layer profiles of a deep model": lambda own=True: figures.plot_layer_profiles(some_effects(shape=(80, 4))),
    "ASR": lambda own=True: steering_figures.plot_asr(some_rates(), own_names=own),
    "ASR of three languages": lambda own=True: steering_figures.plot_asr(
        some_rates(["English", "Hindi", "Bengali"]), own_names=own
    ),
    "trade-off": lambda own=True: steering_figures.plot_trade_off(some_trade_off()),
    "trade-off of one share": lambda own=True: steering_figures.plot_trade_off(some_trade_off([0.5])),
}


# Reading


def touching(figure: plt.Figure) -> list[tuple[str, str]]:
    """Pairs of a figure's texts of which one lies on the other, when drawn."""
    figure.draw_without_rendering()
    texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
    texts = [text for text in texts if text.axes is None or text.axes.get_visible()]
    hidden = hidden_ticks(figure)
    boxes = {text: text.get_window_extent().padded(-0.5) for text in texts if text not in hidden}
    return [
        (a.get_text(), b.get_text()) for a, b in combinations(boxes, 2) if boxes[a].overlaps(boxes[b]) and touch(a, b)
    ]


def touch(a: Text, b: Text) -> bool:
    """Whether texts touch whose boxes do: of those slanted alike, the distance between their lines counts."""
    if a.get_rotation() != b.get_rotation() or a.get_rotation() % 90 == 0:
        return True
    (ax, ay), (bx, by) = (text.get_transform().transform(text.get_position()) for text in (a, b))
    angle = np.deg2rad(a.get_rotation())
    apart = abs((bx - ax) * np.sin(angle) - (by - ay) * np.cos(angle))
    return apart < a.get_fontsize() * a.figure.dpi / 72


def hidden_ticks(figure: plt.Figure) -> set[Text]:
    """Labels that are not drawn: of ticks out of the axis' limits, and of an axis that is switched off."""
    hidden = set()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
                if not axes.axison or not low <= tick.get_loc() <= high:
                    hidden |= {tick.label1, tick.label2}
    return hidden


def names_on(labels: list[Text]) -> list[str]:
    """The languages that labels name, in English."""
    names = {label: name for name, label in fonts.language_labels(NAMES).items()}
    return [names[label.get_text()] for label in labels]


@pytest.mark.parametrize("own", [True, False], ids=["own names", "English names"])
@pytest.mark.parametrize("name", FIGURES)
def test_no_text_of_a_figure_lies_on_another_or_is_too_small(name, own):
    figure = FIGURES[name](own)
    assert touching(figure) == []
    sizes = [text.get_fontsize() for text in figure.findobj(Text) if text.get_text().strip()]
    assert min(sizes) >= 7 and figure.get_figwidth() <= figures.WIDTH


def test_a_collision_would_be_seen():
    figure, axes = plt.subplots()
    plt.close(figure)
    axes.text(0.5, 0.5, "one"), axes.text(0.5, 0.5, "other")
    assert touching(figure) == [("one", "other")]


def lightness(colour: str) -> float:
    return float(np.dot(colors.to_rgb(colour), (0.299, 0.587, 0.114)))


@pytest.mark.parametrize(
    "styles",
    [figures.TIER_STYLES.values(), steering_figures.SHARE_STYLES, figures.STYLES.values()],
    ids=["tiers", "shares", "conditions"],
)
def test_marks_differ_in_shape_and_lines_in_dashes_as_well_as_in_colour(styles):
    for parts in zip(*styles, strict=True):
        assert len(set(parts)) == len(parts)


def test_the_papers_tiers_differ_in_greyscale():
    greys = [lightness(figures.TIER_STYLES[tier][0]) for tier in ("High", "Mid", "Low")]
    assert min(abs(a - b) for a, b in combinations(greys, 2)) > 0.2


# Files


def test_saving_twice_writes_both_files_with_the_same_bytes(tmp_path):
    figure = FIGURES["trade-off"]()
    first, second = (figures.save(figure, tmp_path / f"{i}" / "a.b.png") for i in range(2))
    assert [path.name for path in first] == ["a.b.png", "a.b.pdf"]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    png, pdf = (path.read_bytes() for path in first)
    assert png.startswith(b"\x89PNG") and pdf.startswith(b"%PDF")
    assert b"Date" not in pdf and b"/Type3" not in pdf


SAVE_ELSEWHERE = """
import sys
from pathlib import Path
import test_figures
test_figures.figures.save(test_figures.FIGURES["effects"](), Path(sys.argv[1]))
"""


def test_another_process_without_a_display_writes_the_same_bytes(tmp_path):
    places = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "PYTHONHASHSEED": "7"}
    kept = {
        name: value for name, value in os.environ.items() if name not in ("DISPLAY", "WAYLAND_DISPLAY", "MPLBACKEND")
    }
    command = [sys.executable, "-c", SAVE_ELSEWHERE, tmp_path / "other" / "a.png"]
    subprocess.run(command, check=True, env=kept | places, timeout=120)
    for path in figures.save(FIGURES["effects"](), tmp_path / "here" / "a.png"):
        assert path.read_bytes() == (tmp_path / "other" / path.name).read_bytes()


def test_a_figure_that_cannot_be_saved_as_both_leaves_neither(tmp_path, monkeypatch):
    figure = FIGURES["ASR of three languages"]()
    print_to = figure.savefig

    def full_disk(path, format, **options):
        print_to(path, format=format, **options)
        if format == "pdf":
            raise OSError("no space left on device")

    monkeypatch.setattr(figure, "savefig", full_disk)
    with pytest.raises(OSError, match="no space"):
        figures.save(figure, tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


def test_no_figure_is_left_open():
    for make in FIGURES.values():
        make()
    assert plt.get_fignums() == []


# Languages' own names


@pytest.mark.parametrize("name", ["effects", "overlaps", "ASR"])
def test_languages_stand_with_their_own_names_or_in_english_only(name):
    for own in (True, False):
        texts = {text.get_text() for text in FIGURES[name](own).findobj(Text)}
        assert set(fonts.language_labels(NAMES, own).values()) <= texts
    assert "Spanish" in texts and not any("español" in text for text in texts)


def test_the_table_as_a_picture_names_languages_too():
    rates = [some_rates(["Spanish"]).assign(rate=rate, heads=METHOD) for rate in tables.RATES]
    axes = figures.plot_comparison(pd.concat(rates), "title").axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["Spanish  español"]


def test_english_names_do_not_look_for_fonts(monkeypatch):
    monkeypatch.setattr(fonts, "chosen_families", None)
    figures.plot_overlaps(some_lists(), own_names=False)


# Effects


def enclosed(axes: plt.Axes, shape: tuple[int, int]) -> list[set[tuple[int, int]]]:
    """Per set of lines, the cells inside: an odd number of lines is between them and the left, and the bottom."""
    found = []
    for collection in axes.findobj(LineCollection):
        (lines,) = [collection.get_segments()]
        middles = [tuple(line.mean(0)) for line in lines]
        cells = [(layer, head) for layer in range(shape[0]) for head in range(shape[1])]
        left = {(l, h) for l, h in cells if sum(y == l and x < h for x, y in middles) % 2}  # noqa: E741
        below = {(l, h) for l, h in cells if sum(x == h and y < l for x, y in middles) % 2}  # noqa: E741
        assert left == below
        found.append(left)
    return found


@pytest.mark.parametrize("count", [1, 16, 32])
def test_the_outlined_cells_are_the_selected_heads(count):
    lists = some_lists(NAMES[:3], count=count)
    figure = figures.plot_effects(some_effects(NAMES[:3]), lists)
    for axes, name in zip(figure.axes, lists, strict=False):
        assert axes.get_title() == fonts.language_labels([name])[name]
        assert enclosed(axes, (4, 8)) == [set(lists[name])] * 2  # white in black


def test_without_selected_heads_nothing_is_outlined():
    figure = figures.plot_effects(some_effects(NAMES[:2]))
    assert not any(axes.findobj(LineCollection) for axes in figure.axes[:2])


def test_a_selected_head_outside_the_map_is_refused():
    with pytest.raises(UserError, match=r"list of Hindi names head \[4, 0\].*4 layers of 8 heads"):
        figures.plot_effects(some_effects(["Hindi"]), {"Hindi": [(4, 0)]})


def test_a_panel_shows_its_languages_effects_and_all_panels_have_one_scale():
    effects = some_effects()
    figure = figures.plot_effects(effects)
    images = [axes.get_images()[0] for axes in figure.axes[: len(NAMES)]]
    for image, effect in zip(images, effects.values(), strict=True):
        assert np.array_equal(image.get_array(), effect)
        assert image.get_clim() == (-0.4, max(float(other.max()) for other in effects.values()))


def test_the_scale_rises_through_zero_and_tells_common_effects_apart():
    norm = figures.effect_scale({name: effect.numpy() for name, effect in some_effects().items()})
    assert (np.diff(norm(np.linspace(-0.4, norm.vmax, 1000))) > 0).all()
    assert norm(0.001) - norm(-0.001) > 0.1  # of a scale from -0.4 on


def test_effects_that_are_all_zero_are_drawn(tmp_path):
    figures.save(figures.plot_effects({"Hindi": torch.zeros(2, 2)}), tmp_path / "a.png")


def test_the_colour_bar_names_the_unit():
    assert "change of probability" in figures.plot_effects(some_effects(NAMES[:2])).axes[-1].get_ylabel()


# Overlaps


def test_overlaps_are_shared_heads_over_all_heads_of_two_languages():
    lists = some_lists()
    table = figures.overlaps(lists)
    for a in NAMES:
        for b in NAMES:
            shared = sum(head in lists[b] for head in lists[a])
            assert table.loc[a, b] == shared / (len(lists[a]) + len(lists[b]) - shared)


def drawn_overlaps(lists) -> tuple[list[str], plt.Axes, plt.Axes]:
    """The languages as they stand, the tree, the matrix."""
    tree, axes = figures.plot_overlaps(lists).axes[:2]
    return names_on(axes.get_yticklabels()), tree, axes


def test_similar_languages_stand_beside_one_another():
    one, other = some_lists(["one", "other"], count=8).values()
    lists = {"Hindi": one, "Thai": other, "Arabic": one[:-1], "Tamil": other[:-1]}
    order = drawn_overlaps(lists)[0]
    assert {frozenset(order[:2]), frozenset(order[2:])} == {
        frozenset({"Hindi", "Arabic"}),
        frozenset({"Thai", "Tamil"}),
    }


def test_the_matrix_shows_the_overlaps_in_the_order_of_the_names_with_numbers_and_tiers():
    lists = some_lists()
    names, _, axes = drawn_overlaps(lists)
    table = figures.overlaps(lists).loc[names, names]
    assert sorted(names) == sorted(NAMES)
    assert np.array_equal(axes.get_images()[0].get_array(), table)
    assert [float(text.get_text()) for text in axes.texts] == [round(value, 2) for value in table.to_numpy().flat]
    marks = [line.get_marker() for line in axes.lines]
    assert marks == [figures.TIER_STYLES[figures.tier_of(name)][1] for name in names]


@pytest.mark.parametrize("count", [1, 4, 16])  # heads of 32: with few, many overlaps are equal
def test_the_tree_joins_the_languages_that_stand_below_it(count):
    lists = some_lists(count=count)
    names, tree, _ = drawn_overlaps(lists)
    leaves = 0
    for line in tree.lines:
        left, right, heights = round(line.get_xdata()[0]), round(line.get_xdata()[-1]), line.get_ydata()
        if heights[0] == heights[-1] == 0 and heights[1] > 0:
            assert heights[1] == pytest.approx(1 - figures.jaccard(lists[names[left]], lists[names[right]]))
            leaves += 1
    assert leaves and len(tree.lines) == len(NAMES) - 1


@pytest.mark.parametrize("count", [1, 2])
def test_one_or_two_languages_keep_their_order(count):
    assert drawn_overlaps(some_lists(NAMES[:count]))[0] == NAMES[:count]


def test_languages_with_the_same_heads_are_drawn(tmp_path):
    figures.save(figures.plot_overlaps({name: [(0, 0)] for name in NAMES[:3]}), tmp_path / "a.png")


# Layer profiles


def test_a_profile_is_the_mean_over_heads_then_over_the_tiers_languages():
    effects = some_effects()
    table = figures.layer_profiles(effects).set_index(["tier", "layer"])
    assert list(table.index) == [(tier, layer) for tier in ("High", "Mid", "Low") for layer in range(4)]
    for tier, layer in table.index:
        own = [sum(effects[x.name][layer].tolist()) / 8 for x in PAPER_LANGUAGES if x.tier == tier]
        assert table.loc[tier, layer].tolist() == pytest.approx([sum(own) / len(own), min(own), max(own)])


def test_a_language_outside_the_tiers_has_a_profile_of_its_own():
    assert list(figures.layer_profiles(some_effects(["Swahili", "Hindi"]))["tier"]) == ["Mid"] * 4 + ["no tier"] * 4


# ASR


def test_bars_and_whiskers_are_the_rates_with_their_intervals_tier_by_tier():
    table = some_rates().sample(frac=1, random_state=0)
    axes = steering_figures.plot_asr(table).axes[0]
    names = names_on(axes.get_xticklabels())
    assert list(map(figures.tier_of, names)) == ["High"] * 5 + ["Mid"] * 4 + ["Low"] * 3
    rows = table.set_index("language").loc[names]
    base, safe = (bars for bars in axes.containers if hasattr(bars, "patches"))
    for bars, which in ((base, "base"), (safe, "safe")):
        assert [bar.get_height() for bar in bars] == list(rows[which])
        ends = np.array([segment[:, 1] for segment in bars.errorbar[2][0].get_segments()])
        assert ends == pytest.approx(rows[[f"{which}_low", f"{which}_high"]].to_numpy())
    assert base.patches[0].get_hatch() != safe.patches[0].get_hatch()


def test_of_the_tables_conditions_and_rates_only_the_methods_asr_is_drawn():
    table = pd.concat(
        some_rates(["English", "Hindi"]).assign(rate=rate, heads=heads)
        for rate in ("asr", "icl_accuracy")
        for heads in (METHOD, "all heads")
    )
    axes = steering_figures.plot_asr(table).axes[0]
    assert names_on(axes.get_xticklabels()) == ["English", "Hindi"]


@pytest.mark.parametrize("absent", ["row", "number"])
def test_a_bar_that_was_not_run_is_a_cross_and_no_bar(absent):
    table = pd.DataFrame(
        [("Hindi", "base", 0.5, 0.4, 0.6), ("Hindi", "steered", 0.0, 0.0, 0.1), ("Thai", "base", 0.5, 0.4, 0.6)],
        columns=["language", "heads", "asr", "low", "high"],
    )
    if absent == "number":
        table.loc[len(table)] = ("Thai", "steered", np.nan, np.nan, np.nan)
    figure = steering_figures.tier_bars(table, steering_figures.BASE_AND_STEERED, own_names=True)
    axes = figure.axes[0]
    _, steered = (bars for bars in axes.containers if hasattr(bars, "patches"))
    zero, none = (bar.get_height() for bar in steered)
    assert zero == 0 and np.isnan(none)
    (crosses,) = [line for line in axes.lines if line.get_label() == "not run"]
    assert crosses.get_xdata() == pytest.approx([steered[1].get_x() + steered[1].get_width() / 2])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["base", "steered", "not run"]


def test_where_all_bars_were_run_the_legend_says_nothing_of_others():
    texts = FIGURES["ASR"]().legends[0].get_texts()
    assert [text.get_text() for text in texts] == ["base", "steered"]


# Trade-off


# Few values: rows tie, and some are equal.
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=12))
def test_the_pareto_front_is_the_non_dominated_rows(costs):
    wanted = []
    for a in costs:
        dominated = False
        for b in costs:
            if b[0] <= a[0] and b[1] <= a[1] and (b[0] < a[0] or b[1] < a[1]):
                dominated = True
        wanted.append(not dominated)
    assert steering_figures.pareto_front(np.array(costs)).tolist() == wanted


def test_the_ringed_points_are_the_pareto_front():
    table = some_trade_off()
    (rings,) = [x for x in steering_figures.plot_trade_off(table).axes[0].lines if x.get_label() == "Pareto front"]
    front = table[steering_figures.pareto_front(table[["asr", "kl"]])]
    assert set(zip(*rings.get_data(), strict=True)) == set(zip(front["kl"], front["asr"], strict=True))


def test_every_point_is_labelled_beside_its_mark_and_no_label_hides_a_mark():
    table = some_trade_off()
    axes = steering_figures.plot_trade_off(table).axes[0]
    axes.figure.draw_without_rendering()
    steered = table[table["share"] > 0]
    assert sorted(text.xy for text in axes.texts) == sorted(zip(steered["kl"], steered["asr"], strict=True))
    marks = axes.transData.transform(table[["kl", "asr"]].to_numpy())
    boxes = [Text.get_window_extent(text) for text in axes.texts]
    assert not any(box.contains(*mark) for box in boxes for mark in marks)
    assert all(axes.bbox.contains(*corner) for box in boxes for corner in (box.min, box.max))


def test_a_trade_off_averages_over_languages_and_leaves_out_what_lacks_one():
    def comparison(language, factor, asr, kl):
        measured = {"asr": {"value": asr}, tables.DIVERGENCE: {"value": kl}}
        base = {"asr": {"value": 0.5}, tables.DIVERGENCE: {"value": 0.0}}
        conditions = {"base": base, METHOD: measured, "random heads": measured}
        return {"language": language, "scaling_factor": factor, "n_heads": 8, "conditions": conditions}

    rows = [("Hindi", 2.0, 0.25, 0.1), ("Thai", 2.0, 0.75, 0.3), ("Hindi", 3.0, 0.0, 0.5)]
    found = tables.trade_off([comparison(*row) for row in rows], n_heads_total=32)
    assert found.to_numpy().tolist() == [[0, 0, 0.5, 0], [0.25, 2, 0.5, pytest.approx(0.2)]]
