"""Figures of steering show the rates that they are given, and never draw as zero what was not run."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from figure_samples import (
    FEW,
    FIGURES,
    LISTS,
    NAMES,
    legend,
    names_on,
    some_bars,
    some_effects,
    some_factors,
    some_rankings,
    some_shares,
    some_trade_off,
    some_transfer,
)
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import pyplot as plt
from matplotlib.patches import Rectangle
from matplotlib.text import Text

from soteria.errors import UserError
from soteria.reporting import figures, grid_figures, steering_figures
from soteria.reporting.labels import ALL_HEADS, BASE, RANDOM, TOP

INTERVAL = ["low", "high"]


def ends_of(bars) -> list[list[float]]:
    """Lower and upper ends of the whiskers that are drawn."""
    return [segment[:, 1].tolist() for segment in bars.get_segments() if len(segment)]


def line_of(axes: plt.Axes, label: str):
    """The marks (n, 2) and the whiskers' ends (n, 2) of the line with this label in the legend."""
    for found in [*axes.containers, *axes.lines]:
        if found.get_label() == label:
            line, _, bars = getattr(found, "lines", (found, None, ()))
            return line.get_xydata(), [ends for bar in bars for ends in ends_of(bar)]
    raise AssertionError(f"no line {label!r}")


# ASR


def test_bars_and_whiskers_are_the_rates_tier_by_tier_and_what_was_not_run_is_a_cross():
    whole = some_bars().sample(frac=1, random_state=0)
    without_number = some_bars(missing=())
    without_number.loc[
        without_number.eval("language == 'Hindi' and heads == 'shared by the tier'"), ["asr", *INTERVAL]
    ] = np.nan
    for table in (whole, without_number):
        figure = steering_figures.plot_asr(table)
        axes = figure.axes[0]
        names = names_on(axes.get_xticklabels())
        assert list(map(figures.tier_of, names)) == ["High"] * 5 + ["Mid"] * 4 + ["Low"] * 3
        assert [text.get_text() for text in axes.texts] == ["High", "Mid", "Low"]
        drawn = {bars.get_label(): bars for bars in axes.containers if hasattr(bars, "patches")}
        for heads, look in steering_figures.BARS.items():
            wanted = table[table["heads"] == heads].set_index("language").reindex(names)
            bars = drawn[look["label"]]
            assert np.array_equal([bar.get_height() for bar in bars], wanted["asr"], equal_nan=True)
            assert np.allclose(ends_of(bars.errorbar[2][0]), wanted[INTERVAL].dropna())
        (crosses,) = [line for line in axes.lines if line.get_label() == "not run"]
        missing = drawn["tier"][names.index("Hindi")]
        assert crosses.get_xdata() == pytest.approx([missing.get_x() + missing.get_width() / 2])
        assert legend(figure) == ["base", "language-specific", "tier", "universal", "not run"]


def test_heads_that_the_table_does_not_name_have_neither_bars_nor_crosses():
    assert legend(steering_figures.plot_asr(some_bars(FEW).query("heads in ['base', 'universal']"))) == [
        "base",
        "universal",
    ]
    with pytest.raises(ValueError, match="duplicate"):
        steering_figures.plot_asr(pd.concat([some_bars(FEW)] * 2))


# Trade-off


# Few values: rows tie, and some are equal.
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=12))
def test_the_pareto_front_is_the_rows_that_no_other_beats(costs):
    beaten = [any(b[0] <= a[0] and b[1] <= a[1] and b != a for b in costs) for a in costs]
    assert steering_figures.pareto_front(np.array(costs)).tolist() == [not worse for worse in beaten]


def test_a_trade_off_rings_its_front_and_labels_every_point_clear_of_all_marks():
    table = some_trade_off()
    axes = steering_figures.plot_trade_off(table).axes[0]
    front = table[steering_figures.pareto_front(table[["asr", "kl"]])].sort_values("kl")
    assert line_of(axes, "Pareto front")[0].tolist() == front[["kl", "asr"]].to_numpy().tolist()
    assert line_of(axes, "base")[0].tolist() == [[0.0, 0.4]]
    for share, rows in table[table["share"] > 0].groupby("share"):
        assert line_of(axes, f"{share:.0%} of heads")[0].tolist() == rows[["kl", "asr"]].to_numpy().tolist()
    axes.figure.draw_without_rendering()
    steered = table[table["share"] > 0]
    labeled = sorted((text.xy, text.get_text()) for text in axes.texts)
    assert labeled == sorted(((row.kl, row.asr), f"{row.scaling_factor:g}") for row in steered.itertuples())
    marks = axes.transData.transform(table[["kl", "asr"]].to_numpy())
    boxes = [Text.get_window_extent(text) for text in axes.texts]
    assert not any(box.contains(*mark) for box in boxes for mark in marks)
    assert all(axes.bbox.contains(*corner) for box in boxes for corner in (box.min, box.max))


# Shares of heads and scaling factors


def test_each_line_runs_from_the_base_over_its_own_shares_to_all_heads():
    table = some_shares()
    table.loc[(table["heads"] == TOP) & (table["share"] == 0.5), "kl"] = np.nan  # has no mark
    measures = ("asr", "kl", "benign_refusals", "benign_changes")
    for axes, measure in zip(steering_figures.plot_head_shares(table).axes, measures, strict=True):
        first, last = (table.loc[table["share"] == share, measure].item() for share in (0, 1))
        for heads in steering_figures.LINES:
            own = table[table["heads"] == heads].dropna(subset=measure)
            points, whiskers = line_of(axes, heads)
            assert points[:, 0] == pytest.approx([0, *own["share"], 1], abs=0.01)
            assert points[:, 1].tolist() == [first, *own[measure], last]
            wanted = own[INTERVAL].to_numpy().tolist() if measure == "asr" else []
            assert np.array(whiskers) == pytest.approx(np.array(wanted))
        assert line_of(axes, "base")[0].tolist() == [[0, first]]
        assert line_of(axes, ALL_HEADS)[0].tolist() == [[1, last]]
    steering_figures.plot_head_shares(table.query("0 < share < 1")).draw_without_rendering()


def test_gains_and_costs_are_the_tables_and_accuracy_is_what_is_lost():
    table = some_factors().sample(frac=1, random_state=0)
    figure = steering_figures.plot_scaling(table, chosen=5)
    gain, cost, moved = figure.axes
    table = table.sort_values("scaling_factor")
    wanted = [(gain, "ASR", table["asr"]), (moved, "KL", table["kl"])]
    wanted += [(cost, "benign questions refused", table["benign_refusals"])]
    wanted += [(cost, "benign answers changed", table["benign_changes"])]
    wanted += [(cost, "in-context answers wrong", 1 - table["icl_accuracy"])]
    for axes, label, values in wanted:
        assert line_of(axes, label)[0].tolist() == list(map(list, zip(table["scaling_factor"], values, strict=True)))
        assert axes.lines[-1].get_linestyle() != "-" and set(axes.lines[-1].get_xdata()) == {5}
    assert np.allclose(line_of(gain, "ASR")[1], table[INTERVAL])
    assert legend(figure)[-1] == "chosen: 5"
    assert not any("chosen" in text for text in legend(FIGURES["one factor"]()))


# Transfer


def test_the_matrix_shows_the_rates_with_shared_lists_and_base_at_the_foot():
    figure = steering_figures.plot_transfer(some_transfer().sample(frac=1, random_state=0))
    axes = figure.axes[0]
    rows, columns = names_on(axes.get_yticklabels()), names_on(axes.get_xticklabels())
    assert rows == [*NAMES, *LISTS] and columns == NAMES
    wanted = some_transfer().pivot(index="heads_of", columns="prompts_of", values="asr").loc[rows, columns]
    (image,) = axes.get_images()
    assert np.array_equal(image.get_array().filled(np.nan), wanted, equal_nan=True)
    assert [text.get_text() for text in axes.texts] == [f"{100 * x:.0f}" for x in wanted.to_numpy().flat if x == x]
    gap, *marks = axes.lines
    assert set(gap.get_ydata()) == {len(NAMES) - 0.5}
    marks = [line.get_marker() for line in marks]
    assert marks == [figures.TIER_STYLES[figures.tier_of(name)][1] for name in NAMES] * 2


def cells(axes: plt.Axes, hatched: bool) -> set[tuple[str, str]]:
    """Row and column of the hatched, or the outlined, cells."""
    rows, columns = names_on(axes.get_yticklabels()), names_on(axes.get_xticklabels())
    patches = [patch for patch in axes.patches if isinstance(patch, Rectangle) and bool(patch.get_hatch()) == hatched]
    return {(rows[round(x.get_y() + 0.5)], columns[round(x.get_x() + 0.5)]) for x in patches}


def test_cells_that_were_not_run_are_hatched_and_own_heads_outlined():
    for absent in ("row", "number"):
        table = some_transfer(FEW)
        figure = steering_figures.plot_transfer(table.dropna() if absent == "row" else table)
        assert cells(figure.axes[0], hatched=True) == {("Hindi", "English"), ("Bengali", "Bengali")}
        assert cells(figure.axes[0], hatched=False) == {(name, name) for name in FEW}
        assert len(figure.axes[0].texts) == len(table) - 2 and "not run" in legend(figure)
        assert figure.axes[0].texts[1].get_text() == "20\n[15, 27]"  # three columns leave room for intervals
    whole = steering_figures.plot_transfer(some_transfer(missing=()))
    assert cells(whole.axes[0], hatched=True) == set() and "not run" not in legend(whole)
    others = some_transfer(FEW).query("heads_of != 'Hindi' and prompts_of != 'English'")
    assert cells(steering_figures.plot_transfer(others).axes[0], hatched=False) == {("Bengali", "Bengali")}
    steering_figures.plot_transfer(some_transfer(FEW).assign(asr=np.nan)).draw_without_rendering()


def test_unknown_languages_and_pairs_that_appear_twice_are_refused():
    with pytest.raises(UserError, match="Klingon"):
        steering_figures.plot_transfer(some_transfer(FEW).replace("Hindi", "Klingon"))
    with pytest.raises(ValueError, match="duplicate"):
        steering_figures.plot_transfer(pd.concat([some_transfer(FEW)] * 2))


# Rankings


def test_each_ranking_is_a_line_from_the_base_and_random_heads_are_the_band_of_their_intervals():
    table = some_rankings()
    figure = steering_figures.plot_rankings(table.sample(frac=1, random_state=0))
    for axes, measure in zip(figure.axes, ("benign_refusals", "kl"), strict=True):
        for name in set(table["heads"]) - {BASE, RANDOM}:
            wanted = table[table["heads"].isin([BASE, name])][[measure, "asr"]].to_numpy()
            assert np.allclose(line_of(axes, name)[0], wanted)
        (band,) = axes.collections
        wanted = table[table["heads"].isin([BASE, RANDOM])]
        corners = {tuple(corner) for corner in band.get_paths()[0].vertices.round(9)}
        for end in INTERVAL:
            assert set(map(tuple, wanted[[measure, end]].round(9).to_numpy())) <= corners
        assert {text.get_text() for text in axes.texts} <= {"2", "4", "6"}
    assert set(legend(figure)) == set(table["heads"])


# A grid's


def grid_numbers(languages=tuple(FEW)) -> grid_figures.ModelNumbers:
    """A model's tables, with rows of another model, prompt set and judge that no figure may show."""
    extra = {"scaling_factor": 5.0, "icl_accuracy": 1.0}
    tables = {
        "main": some_bars(FEW, missing=()).rename(columns={"language": "name"}).assign(of="language"),
        "heads": some_shares().assign(**extra).replace({"share": {0.0: np.nan}}),
        "scaling": some_factors([0, 3, 4, 5]).assign(share=0.5, heads=[BASE, TOP, TOP, TOP]),
        "transfer": some_transfer(FEW),
        "rankings": some_rankings(),
    }
    own = {"model": "m", "prompts": "policy", "judge": "refusal"}
    strange = [{"model": "other"}, {"prompts": "other"}, {"judge": "other"}]
    tables = {
        name: pd.concat([table.assign(**own), *(table.assign(**own | other, asr=0.99) for other in strange)])
        for name, table in tables.items()
    }
    grid = SimpleNamespace(ablated_sets=["policy"], judges=["refusal", "other"], heads=0.5, scaling_factor=5.0)
    numbers = grid_figures.ModelNumbers(grid, "m", None, tables)
    numbers.__dict__["effects"] = some_effects(languages)  # what step 1 wrote
    return numbers


def test_a_grids_figures_show_the_rows_of_its_model_prompt_set_and_judge():
    drawn = {name: drawing.draw(grid_numbers()) for name, drawing in grid_figures.DRAWINGS.items()}
    bars = [bar.get_height() for bar in drawn["asr"].axes[0].patches]
    assert sorted(bars) == pytest.approx(sorted(some_bars(FEW, missing=())["asr"]))
    points = {line.get_label(): len(line.get_xdata()) for line in drawn["trade_off"].axes[0].lines}
    # Half of the heads at three factors, of which 5 is in both tables.
    wanted = {"base": 1, "10% of heads": 1, "25% of heads": 1, "50% of heads": 3, "75% of heads": 1, "100% of heads": 1}
    assert wanted.items() <= points.items()
    assert len(line_of(drawn["head_shares"].axes[0], TOP)[0]) == 6
    assert line_of(drawn["scaling"].axes[0], "ASR")[0][:, 0].tolist() == [0, 3, 4, 5]
    assert legend(drawn["scaling"])[-1] == "chosen: 5"
    assert max(image.get_array().max() for image in drawn["transfer"].axes[0].get_images()) < 0.99
    assert names_on(drawn["overlaps"].axes[1].get_yticklabels())
    assert all(len(heads) == 16 for heads in grid_numbers().selected.values())


def test_a_figure_without_its_numbers_is_refused_with_a_reason():
    numbers = grid_numbers(languages=("Hindi",))
    numbers.tables["heads"] = numbers.tables["heads"].query("share != share or share == 0.5")
    numbers.tables["scaling"] = numbers.tables["scaling"].query("scaling_factor in [0, 5]").assign(kl=np.nan)
    del numbers.tables["transfer"]
    numbers.tables["heads"]["kl"] = np.nan
    refused = ("trade_off", "head_shares", "scaling", "transfer", "overlaps")
    for name in refused:
        with pytest.raises(UserError, match=r"measured|only one|does not ask|no other"):
            grid_figures.DRAWINGS[name].draw(numbers)
