"""The pictures of ablations: what they show is what they were given, and what was not run is not drawn as zero."""

from itertools import product

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from test_figures import NAMES, names_on, touching

from soteria.errors import UserError
from soteria.grid.comparison import METHOD
from soteria.reporting import ablation_figures, figures, fonts, steering_figures

pytestmark = pytest.mark.filterwarnings("error:Glyph")  # a letter without a font

LISTS = ["Universal", "High", "Mid", "Low", "base"]


def some_transfer(names=NAMES, lists=LISTS, missing=((1, 0), (2, 2))) -> pd.DataFrame:
    """ASR of every pair, lower with a language's own heads; `missing` are (row, column) of pairs that were not run."""
    rows = []
    for (i, heads), (j, prompts) in product(enumerate([*names, *lists]), enumerate(names)):
        asr = np.nan if (i, j) in missing else 0.02 if i == j else 0.1 + 0.02 * ((3 * i + 5 * j) % 17)
        rows.append((heads, prompts, asr, max(0, asr - 0.05), asr + 0.07))
    return pd.DataFrame(rows, columns=["heads_of", "prompts_of", "asr", "low", "high"])


def some_shares(shares=(0.1, 0.25, 0.5, 0.75)) -> pd.DataFrame:
    """Random heads take away most and cost most; the base, and all heads, stand there once."""
    steps = [(0.0, "base"), *product(shares, [METHOD, "random heads", "bottom heads"]), (1.0, "all heads")]
    rows = []
    for share, heads in steps:
        strength = share * {"random heads": 1.2, "bottom heads": 1.1}.get(heads, 1)
        asr = 0.4 * np.exp(-3 * strength)
        rows.append((heads, share, asr, 0.8 * asr, 1.2 * asr, 0.3 * strength**2, 0.2 * strength**3, 0.3 * strength**3))
    names = ["heads", "share", "asr", "asr_low", "asr_high", "kl", "benign_refusals", "benign_changes"]
    return pd.DataFrame(rows, columns=names)


def some_factors(factors=(0, 3, 4, 5, 6, 7, 8)) -> pd.DataFrame:
    factors = np.array(factors, float)
    asr, harm = 0.4 * np.exp(-factors / 4), (factors / 8) ** 4
    table = {"scaling_factor": factors, "asr": asr, "asr_low": 0.8 * asr, "asr_high": 1.2 * asr}
    table |= {"benign_refusals": 0.08 * harm, "benign_changes": 0.38 * harm, "icl_accuracy": 1 - 0.05 * harm}
    return pd.DataFrame(table | {"kl": 0.2 * harm})


def some_methods(names=NAMES, missing=(("Hindi", "tier"),)) -> pd.DataFrame:
    rows = []
    for (i, language), (j, heads) in product(enumerate(names), enumerate(ablation_figures.METHODS)):
        asr = (0.4 + 0.02 * i) / (1 + 1.5 * j)
        if (language, heads) not in missing:
            rows.append((language, heads, asr, 0.8 * asr, 1.25 * asr))
    return pd.DataFrame(rows, columns=["language", "heads", "asr", "low", "high"])


def partial_cross() -> pd.DataFrame:
    """Every share at a scaling factor of 5, every factor at half of the heads."""
    steps = [(0.5, factor) for factor in range(3, 9)] + [(share, 5) for share in (0.25, 0.75, 1.0)]
    rows = [(s, f, 0.4 * np.exp(-s * f / 2), 0.35 * s**2 * (f / 5) ** 2.5) for s, f in steps]
    return pd.DataFrame([(0.0, 0.0, 0.4, 0.0), *rows], columns=["share", "scaling_factor", "asr", "kl"])


FEW = ["English", "Hindi", "Bengali"]
FIGURES = {
    "transfer": lambda own=True: ablation_figures.plot_transfer(some_transfer(), own_names=own),
    "transfer without shared lists": lambda own=True: ablation_figures.plot_transfer(
        some_transfer(lists=[], missing=()), own_names=own
    ),
    "transfer of shared lists": lambda own=True: ablation_figures.plot_transfer(
        some_transfer().query("heads_of in @LISTS"), own_names=own
    ),
    "transfer of three": lambda own=True: ablation_figures.plot_transfer(some_transfer(FEW), own_names=own),
    "transfer of five": lambda own=True: ablation_figures.plot_transfer(some_transfer(NAMES[4:9]), own_names=own),
    "transfer of one": lambda own=True: ablation_figures.plot_transfer(some_transfer(["Hindi"]), own_names=own),
    "methods": lambda own=True: ablation_figures.plot_methods(some_methods(), own_names=own),
    "methods of three": lambda own=True: ablation_figures.plot_methods(some_methods(FEW), own_names=own),
    "methods of one": lambda own=True: ablation_figures.plot_methods(some_methods(["Telugu"]), own_names=own),
    "shares": lambda own=True: ablation_figures.plot_head_shares(some_shares()),
    "shares of one list": lambda own=True: ablation_figures.plot_head_shares(
        some_shares().query("heads in ['base', @METHOD, 'all heads']")
    ),
    "factors": lambda own=True: ablation_figures.plot_scaling(some_factors(), chosen=5),
    "broken factors": lambda own=True: ablation_figures.plot_scaling(some_factors(np.linspace(0, 8, 17)), chosen=0.5),
    "one factor": lambda own=True: ablation_figures.plot_scaling(some_factors([5])),
    "trade-off of a partial cross": lambda own=True: steering_figures.plot_trade_off(partial_cross()),
}


@pytest.mark.parametrize("own", [True, False], ids=["own names", "English names"])
@pytest.mark.parametrize("name", FIGURES)
def test_no_text_of_a_figure_lies_on_another_or_is_too_small(name, own):
    figure = FIGURES[name](own)
    assert touching(figure) == []
    sizes = [text.get_fontsize() for text in figure.findobj(Text) if text.get_text().strip()]
    assert min(sizes) >= 7 and figure.get_figwidth() <= figures.WIDTH
    assert plt.get_fignums() == []


@pytest.mark.parametrize("name", FIGURES)
def test_nothing_is_cut_off(name):
    figure = FIGURES[name]()
    figure.draw_without_rendering()
    drawn = figure.get_tightbbox()  # inches
    assert drawn.x0 >= -0.02 and drawn.y0 >= -0.02
    assert drawn.x1 <= figure.get_figwidth() + 0.02 and drawn.y1 <= figure.get_figheight() + 0.02


@pytest.mark.parametrize("name", ["transfer of three", "methods of three", "shares", "factors"])
def test_the_same_table_gives_the_same_bytes(name, tmp_path):
    written = [figures.save(FIGURES[name](), tmp_path / f"{i}" / "a.png") for i in range(2)]
    for first, second in zip(*written, strict=True):
        assert first.read_bytes() == second.read_bytes()


def test_costs_and_methods_are_told_apart_without_colour():
    for parts in zip(*ablation_figures.COSTS.values(), strict=True):
        assert len(set(parts)) == len(parts)
    hatches = [look.get("hatch") for look in ablation_figures.METHODS.values()]
    assert len(set(hatches)) == len(hatches)
    assert len(set(ablation_figures.LINES.values())) == len(ablation_figures.LINES)


# Transfer


def rows_and_columns(axes: plt.Axes) -> tuple[list[str], list[str]]:
    """What the rows and the columns of a transfer are, as its table calls them."""
    english = {label: name for name, label in (fonts.language_labels(NAMES) | ablation_figures.SHARED_LISTS).items()}
    rows = [english[label.get_text()] for label in axes.get_yticklabels()]
    return rows, names_on(axes.get_xticklabels())


def test_the_cells_are_the_tables_rates_with_shared_lists_and_base_at_the_foot():
    table = some_transfer().sample(frac=1, random_state=0)
    axes = FIGURES["transfer"]().axes[0]
    rows, columns = rows_and_columns(axes)
    assert rows == [*NAMES, *LISTS] and columns == NAMES
    wanted = table.pivot(index="heads_of", columns="prompts_of", values="asr").loc[rows, columns]
    shown = np.concatenate([image.get_array().filled(np.nan) for image in axes.get_images()])
    assert np.array_equal(shown, wanted, equal_nan=True)
    numbers = [text.get_text() for text in axes.texts]
    assert numbers == [f"{100 * value:.0f}" for value in wanted.to_numpy().flat if not np.isnan(value)]
    assert len({image.get_clim() for image in axes.get_images()}) == 1
    places = [image.get_extent() for image in axes.get_images()]
    assert places[0][2] < places[1][3]  # a gap


def hatched(axes: plt.Axes) -> set[tuple[int, int]]:
    """Row, counted from above, and column of the hatched cells."""
    heights = axes.get_yticks()
    cells = [patch for patch in axes.patches if patch.get_hatch()]
    return {(int(np.argmin(abs(heights - cell.get_y() - 0.5))), round(cell.get_x() + 0.5)) for cell in cells}


@pytest.mark.parametrize("absent", ["row", "number"])
def test_a_cell_that_was_not_run_is_hatched_has_no_number_and_is_named_in_the_legend(absent):
    missing = {(1, 0), (2, 2)}
    table = some_transfer(FEW, missing=missing)
    figure = ablation_figures.plot_transfer(table.dropna() if absent == "row" else table)
    axes = figure.axes[0]
    assert hatched(axes) == missing
    assert not {(round(text.get_position()[1]), text.get_position()[0]) for text in axes.texts} & missing
    assert "not run" in [text.get_text() for text in figure.legends[0].get_texts()]


def test_where_all_was_run_nothing_is_hatched_and_the_legend_says_nothing_of_it():
    figure = FIGURES["transfer without shared lists"]()
    assert hatched(figure.axes[0]) == set()
    assert "not run" not in [text.get_text() for text in figure.legends[0].get_texts()]


def test_a_languages_own_heads_are_outlined_also_where_rows_and_columns_are_of_other_languages():
    table = some_transfer(FEW).query("heads_of != 'Hindi' and prompts_of != 'English'")
    axes = ablation_figures.plot_transfer(table).axes[0]
    rows, columns = rows_and_columns(axes)
    frames = [patch for patch in axes.patches if isinstance(patch, Rectangle) and not patch.get_hatch()]
    places = {(round(frame.get_y() + 0.5), round(frame.get_x() + 0.5)) for frame in frames}
    assert [(rows[row], columns[column]) for row, column in places] == [("Bengali", "Bengali")]
    assert len(frames) == 2  # white in black


def test_every_language_has_its_tiers_mark_above_and_beside():
    axes = FIGURES["transfer"]().axes[0]
    marks = [line.get_marker() for line in axes.lines]
    assert marks == [figures.TIER_STYLES[figures.tier_of(name)][1] for name in NAMES] * 2


def test_intervals_are_written_where_there_is_room():
    for name, brackets in (("transfer of three", True), ("transfer", False)):
        figure = FIGURES[name]()
        assert all(("[" in text.get_text()) == brackets for text in figure.axes[0].texts)
        assert ("interval" in figure.legends[0].get_title().get_text()) == brackets
    assert FIGURES["transfer of three"]().axes[0].texts[1].get_text() == "20\n[15, 27]"


def test_a_matrix_of_nothing_that_was_run_is_drawn(tmp_path):
    figures.save(ablation_figures.plot_transfer(some_transfer(FEW).assign(asr=np.nan)), tmp_path / "a.png")


def test_unknown_languages_and_pairs_that_are_there_twice_are_refused():
    table = some_transfer(FEW)
    with pytest.raises(UserError, match="unknown language 'Klingon'"):
        ablation_figures.plot_transfer(table.replace("Hindi", "Klingon"))
    with pytest.raises(ValueError, match="duplicate"):
        ablation_figures.plot_transfer(pd.concat([table, table]))


# Shares of heads


def lines_of(axes: plt.Axes, label: str) -> np.ndarray:
    """Points (n, 2) of the line that the legend calls so, with whiskers or without."""
    for found in [*axes.containers, *axes.lines]:
        if found.get_label() == label:
            return getattr(found, "lines", [found])[0].get_xydata()
    raise AssertionError(f"no line {label!r}")


def test_each_line_goes_from_the_base_over_its_own_shares_to_all_heads():
    table = some_shares()
    for axes, measure in zip(FIGURES["shares"]().axes, ("asr", "kl", "benign_refusals", "benign_changes"), strict=True):
        ends = {share: table.loc[table["share"] == share, measure].item() for share in (0, 1)}
        for heads in ablation_figures.LINES:
            own = table[table["heads"] == heads]
            points = lines_of(axes, heads)
            assert points[:, 0] == pytest.approx([0, *own["share"], 1], abs=0.01)
            assert points[:, 1].tolist() == [ends[0], *own[measure], ends[1]]
        assert lines_of(axes, "base").tolist() == [[0, ends[0]]]
        assert lines_of(axes, "all heads").tolist() == [[1, ends[1]]]


def test_a_measure_that_is_not_a_number_has_no_mark():
    table = some_shares()
    table.loc[(table["heads"] == METHOD) & (table["share"] == 0.5), "kl"] = np.nan
    axes = ablation_figures.plot_head_shares(table).axes
    assert len(lines_of(axes[0], METHOD)) == 6 and len(lines_of(axes[1], METHOD)) == 5


def test_shares_without_the_base_and_all_heads_are_drawn(tmp_path):
    table = some_shares().query("0 < share < 1")
    figures.save(ablation_figures.plot_head_shares(table), tmp_path / "a.png")


# Scaling factors


def test_gains_and_costs_are_the_tables_over_the_factors_and_accuracy_is_shown_as_what_is_lost():
    table = some_factors().sample(frac=1, random_state=0)
    gain, cost, moved = ablation_figures.plot_scaling(table).axes
    table = table.sort_values("scaling_factor")
    wanted = [(gain, "ASR", table["asr"]), (moved, "KL", table["kl"])]
    wanted += [(cost, "benign questions refused", table["benign_refusals"])]
    wanted += [(cost, "benign answers changed", table["benign_changes"])]
    wanted += [(cost, "in-context answers wrong", 1 - table["icl_accuracy"])]
    for axes, label, values in wanted:
        assert lines_of(axes, label).tolist() == list(map(list, zip(table["scaling_factor"], values, strict=True)))
    whiskers = [segment[:, 1].tolist() for segment in gain.containers[0].lines[2][0].get_segments()]
    assert np.allclose(whiskers, table[["asr_low", "asr_high"]])


def test_the_chosen_factor_is_marked_in_every_panel():
    figure = FIGURES["factors"]()
    for axes in figure.axes:
        assert any(line.get_linestyle() != "-" and set(line.get_xdata()) == {5} for line in axes.lines)
    assert figure.legends[0].get_texts()[-1].get_text() == "chosen: 5"
    texts = FIGURES["one factor"]().legends[0].get_texts()
    assert not any("chosen" in text.get_text() for text in texts)


# Methods


def test_bars_are_the_tables_rates_and_a_missing_one_is_a_cross():
    table = some_methods()
    figure = FIGURES["methods"]()
    axes = figure.axes[0]
    names = names_on(axes.get_xticklabels())
    for bars in (bars for bars in axes.containers if hasattr(bars, "patches")):
        wanted = table[table["heads"] == bars.get_label()].set_index("language")["asr"].reindex(names)
        assert np.array_equal([bar.get_height() for bar in bars], wanted, equal_nan=True)
    (crosses,) = [line for line in axes.lines if line.get_label() == "not run"]
    assert len(crosses.get_xdata()) == 1
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [*ablation_figures.METHODS, "not run"]


def test_heads_that_the_table_does_not_name_have_neither_bars_nor_crosses():
    table = some_methods(FEW).query("heads in ['base', 'universal']")
    texts = ablation_figures.plot_methods(table).legends[0].get_texts()
    assert [text.get_text() for text in texts] == ["base", "universal"]


# Trade-off


def test_every_point_of_a_partial_cross_is_labelled():
    table = partial_cross()
    axes = steering_figures.plot_trade_off(table).axes[0]
    assert sorted(text.get_text() for text in axes.texts) == sorted(f"{f:g}" for f in table["scaling_factor"][1:])
