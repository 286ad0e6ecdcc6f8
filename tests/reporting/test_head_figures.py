"""Figures of heads show the effects, overlaps and means that they are given."""

from itertools import product

import numpy as np
import pytest
import torch
from figure_samples import FIGURES, NAMES, names_on, some_effects, some_lists
from matplotlib import pyplot as plt
from matplotlib.collections import LineCollection

from soteria.errors import UserError
from soteria.languages import PAPER_LANGUAGES
from soteria.reporting import figures, fonts, head_figures


def enclosed(axes: plt.Axes, shape: tuple[int, int]) -> list[set[tuple[int, int]]]:
    """Per set of lines, the cells inside: an odd number of lines separates them from the left and from the bottom."""
    found = []
    for collection in axes.findobj(LineCollection):
        middles = [tuple(line.mean(0)) for line in collection.get_segments()]
        cells = [(layer, head) for layer in range(shape[0]) for head in range(shape[1])]
        left = {(l, h) for l, h in cells if sum(y == l and x < h for x, y in middles) % 2}  # noqa: E741
        below = {(l, h) for l, h in cells if sum(x == h and y < l for x, y in middles) % 2}  # noqa: E741
        assert left == below
        found.append(left)
    return found


def test_a_panel_shows_its_languages_effects_on_one_scale_with_its_selected_heads_outlined():
    effects = some_effects()
    for count in (1, 16, 32):
        lists = some_lists(NAMES[:3], count=count)
        figure = head_figures.plot_effects(effects, lists)
        for axes, (name, effect) in zip(figure.axes, effects.items(), strict=False):
            image = axes.get_images()[0]
            assert axes.get_title() == fonts.language_labels([name])[name]
            assert np.array_equal(image.get_array(), effect) and image.origin == "lower"
            assert image.get_clim() == (-0.4, max(float(other.max()) for other in effects.values()))
            assert enclosed(axes, (4, 8)) == ([set(lists[name])] * 2 if name in lists else [])  # white in black
    assert "change of probability" in figure.axes[-1].get_ylabel()


def test_a_selected_head_outside_the_map_is_refused():
    with pytest.raises(UserError, match=r"Hindi.*\[4, 0\].*4 layers of 8 heads"):
        head_figures.plot_effects(some_effects(["Hindi"]), {"Hindi": [(4, 0)]})


def test_the_scale_rises_through_zero_and_tells_common_effects_apart(tmp_path):
    norm = head_figures.effect_scale({name: effect.numpy() for name, effect in some_effects().items()})
    assert (np.diff(norm(np.linspace(-0.4, norm.vmax, 1000))) > 0).all()
    assert norm(0.001) - norm(-0.001) > 0.1  # of a scale that starts at -0.4
    figures.save(head_figures.plot_effects({"Hindi": torch.zeros(2, 2)}), tmp_path / "zeros.png")


def test_a_profile_is_the_mean_over_heads_then_over_the_tiers_languages():
    effects = some_effects()
    table = head_figures.layer_profiles(effects).set_index(["tier", "layer"])
    assert list(table.index) == [(tier, layer) for tier in ("High", "Mid", "Low") for layer in range(4)]
    for tier, layer in table.index:
        own = [sum(effects[x.name][layer].tolist()) / 8 for x in PAPER_LANGUAGES if x.tier == tier]
        assert table.loc[tier, layer].tolist() == pytest.approx([sum(own) / len(own), min(own), max(own)])
    lines = {line.get_label(): line for line in head_figures.plot_layer_profiles(effects).axes[0].lines}
    assert lines["Mid (4 languages)"].get_ydata().tolist() == table.loc["Mid"]["mean"].tolist()
    found = head_figures.layer_profiles(some_effects(["Swahili", "Hindi"]))["tier"]
    assert list(found) == ["Mid"] * 4 + ["no tier"] * 4


def test_the_table_of_ranks_names_layer_head_and_effect():
    table = head_figures.ranked_table({"Hindi": torch.tensor([[0.5, -0.25]])}, {"Hindi": [(0, 0), (0, 1)]})
    assert table["Hindi"].to_dict() == {1: "0.0 (+0.5000)", 2: "0.1 (-0.2500)"}


def test_the_matrix_shows_shared_heads_over_all_heads_in_the_order_of_the_names_with_tiers():
    lists = some_lists()
    axes = head_figures.plot_overlaps(lists).axes[1]
    names = names_on(axes.get_yticklabels())
    assert names == names_on(axes.get_xticklabels()) and sorted(names) == sorted(NAMES)
    for (i, a), (j, b) in product(enumerate(names), repeat=2):
        shared = sum(head in lists[b] for head in lists[a])
        wanted = shared / (len(lists[a]) + len(lists[b]) - shared)
        assert axes.get_images()[0].get_array()[i, j] == wanted
        assert float(axes.texts[len(names) * i + j].get_text()) == round(wanted, 2)
    marks = [line.get_marker() for line in axes.lines]
    assert marks == [figures.TIER_STYLES[figures.tier_of(name)][1] for name in names]


def test_the_tree_joins_the_languages_below_it():
    for count in (1, 4, 16):  # heads of 32: with few, many overlaps are equal
        lists = some_lists(count=count)
        tree, axes = head_figures.plot_overlaps(lists).axes[:2]
        names, table, pairs = names_on(axes.get_yticklabels()), head_figures.overlaps(lists), 0
        joints = tree.collections[0].get_segments()
        for x, heights in (joint.T for joint in joints):
            left, right = round((x[0] - 5) / 10), round((x[-1] - 5) / 10)  # scipy's leaves lie at 5, 15, 25 ...
            if heights[0] == heights[-1] == 0 and heights[1] > 0:
                assert heights[1] == pytest.approx(1 - table.loc[names[left], names[right]])
                pairs += 1
        assert pairs and len(joints) == len(NAMES) - 1


def test_similar_languages_are_next_to_each_other():
    one, other = some_lists(["one", "other"], count=8).values()
    lists = {"Hindi": one, "Thai": other, "Arabic": one[:-1], "Tamil": other[:-1]}
    order = names_on(head_figures.plot_overlaps(lists).axes[1].get_yticklabels())
    assert {*map(frozenset, (order[:2], order[2:]))} == {frozenset({"Hindi", "Arabic"}), frozenset({"Thai", "Tamil"})}
    assert names_on(FIGURES["overlap of two languages"]().axes[1].get_yticklabels()) == NAMES[:2]
    for names in (NAMES[:1], NAMES[:3]):  # one language, and several with the same heads
        head_figures.plot_overlaps({name: [(0, 0)] for name in names}).draw_without_rendering()
