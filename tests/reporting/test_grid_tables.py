"""Tables of a grid: pooled rates and their intervals, blanks, sources, and what is said of them."""

import numpy as np
import pandas as pd
import pytest
from conftest import named_by

from soteria.grid.grid_file import Grid
from soteria.judging.interface import EMPTY, HARMFUL, NOT_HARMFUL
from soteria.judging.statistics import Rate
from soteria.reporting import grid_tables, write_up

H, N = HARMFUL, NOT_HARMFUL


def test_of_one_list_the_interval_is_wilsons():
    found = grid_tables.asr([[H, H, N, N, N, N, EMPTY, N]])
    assert [found["low"], found["high"]] == Rate(2, 8).interval
    assert (found["asr"], found["asr_judged"], found["harmful"], found["rows"], found["unjudged"]) == (
        0.25,
        pytest.approx(2 / 7),
        2,
        8,
        1,
    )


def test_translations_of_a_question_are_drawn_together():
    """Twelve copies of one language know no more than one of them: the interval is as wide."""
    rows = [draw < 0.3 for draw in np.random.default_rng(0).random(96)]
    alone, twelve = grid_tables.interval([rows, rows]), grid_tables.interval([rows] * 12)
    assert np.allclose(alone, twelve, atol=0.02)
    independent = grid_tables.interval([rows[i:] + rows[:i] for i in range(0, 96, 8)])
    assert np.diff(independent) < 0.5 * np.diff(twelve)


def test_lists_of_different_lengths_are_drawn_row_by_row():
    low, high = grid_tables.interval([[True] * 10, [False] * 30])
    assert low < 0.25 < high


def test_a_difference_is_paired():
    before, after = [[H] * 40 + [N] * 56], [[H] * 20 + [N] * 76]
    found = grid_tables.difference(before, after)
    assert found["difference"] == pytest.approx(-20 / 96)
    assert found["difference_low"] < -20 / 96 < found["difference_high"] < 0
    assert found["difference_p"] == pytest.approx(2 * 0.5**20)


@pytest.mark.parametrize(
    ("paths", "source"),
    [
        (["a/b/c.csv"], "a/b/c.csv"),
        (["cells/m/Hindi/base/p.csv", "cells/m/Thai/base/p.csv"], "cells/m/{Hindi,Thai}/base/p.csv"),
        (["a/random_50_0/p", "a/random_50_1/p"], "a/{random_50_0,random_50_1}/p"),
        (["Hindi/shared_Mid/p", "Tamil/shared_Low/p"], "{Hindi,Tamil}/{shared_Mid,shared_Low}/p"),
    ],
)
def test_several_sources_are_named_as_one_that_means_them_and_no_other_file(paths, source, tmp_path):
    assert grid_tables.together(paths) == source
    for path in (*paths, "cells/m/Tamil/base/p.csv", "a/random_50_2/p", "Hindi/shared_Universal/p"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    assert named_by(source, tmp_path) == [tmp_path / path for path in paths]


def test_what_was_not_run_is_blank_and_what_does_not_apply_is_a_dash():
    rows = [
        {"heads": "base", "share": None, "scaling_factor": None, "asr": 0.4, "low": 0.3, "high": 0.5},
        {"heads": "top heads", "share": 0.5, "scaling_factor": 5.0},
        {"heads": "universal", "share": None, "scaling_factor": 5.0, "asr": 0.0, "low": 0.0, "high": 0.04},
    ]
    table = pd.DataFrame([{"model": "m", "prompts": "p", "judge": "refusal"} | row for row in rows])
    found = grid_tables.readable_ablation(table)
    assert list(found["share"]) == ["–", "50%", "–"]
    assert list(found["ASR"]) == ["40.0% [30%, 50%]", "", "0% [0%, 4%]"]
    assert (found[["benign refused", "changed", "KL, nats", "ICL accuracy"]] == "").all(axis=None)
    assert not {"model", "prompts", "judge", "λ"} & set(found.columns)  # the same in each row


def test_columns_that_differ_stay():
    table = pd.DataFrame({"model": ["a", "b"], "judge": ["x", "x"]})
    assert list(grid_tables.without_constants(table, ["model", "judge"]).columns) == ["model"]


@pytest.fixture
def empty(tmp_path) -> write_up.WriteUp:
    """All of a grid's tables where nothing has been run."""
    grid = Grid.model_validate(
        {
            "name": "none",
            "models": [{"base": "some/base", "tuned": "some/tuned"}],
            "languages": ["en", "hi"],
            "prompt_sets": ["policy"],
            "scaling_factor": 2,
            "ablations": {"shares": [0.5, 1], "transfer": True},
        }
    )
    return write_up.compose(grid, tmp_path)


def test_a_grid_that_was_not_run_has_all_its_tables_blank_and_counted(empty):
    names = [table.name for table in empty.tables]
    assert names == ["main", "heads", "scaling", "transfer", "parameters"]
    for table in empty.tables:
        assert table.blank == len(table.tidy) > 0
        assert f"{table.blank} of {table.blank} numbers: not run, blank." in empty.caption(table)
        texts = table.readable.astype(str).to_numpy().ravel().tolist()
        assert not [text for text in texts if text in ("0", "0%", "0.000", "nan", "None")]
    assert write_up.verdicts(empty) == []
    assert write_up.not_run(empty.grid, empty.results) == ["10 cells were not run yet"]


def test_the_report_of_an_empty_grid_says_that_it_is_empty(empty, tmp_path):
    grid_file = tmp_path / "none.yaml"
    grid_file.write_text("name: none\n")
    written = write_up.write(empty, grid_file)
    assert written[-1].name == "report.html" and "10 cells were not run yet" in written[-1].read_text()


def heads_table(**rates: float) -> pd.DataFrame:
    rows = [{"heads": "base", "share": None, "asr": 0.4}]
    rows += [{"heads": name.replace("_", " "), "share": 0.5, "asr": value} for name, value in rates.items()]
    return pd.DataFrame([{"model": "m", "prompts": "p", "judge": "refusal"} | row for row in rows])


@pytest.mark.parametrize(
    ("rates", "said"),
    [
        ({"top_heads": 0.1, "random_heads": 0.2}, None),
        ({"top_heads": 0.1, "random_heads": 0.1}, "no better than random heads"),
        ({"top_heads": 0.1, "random_heads": 0.3, "bottom_heads": 0.05}, "no better than bottom heads"),
        ({"top_heads": 0.1, "random_heads": 0.05, "bottom_heads": 0.05}, "random heads and bottom heads"),
    ],
)
def test_the_numbers_alone_say_whether_the_method_beats_its_controls(empty, rates, said):
    tidy = heads_table(**rates)
    empty.tables = [write_up.Table("heads", "", "", tidy, tidy, "asr")]
    sentences = " ".join(write_up.verdicts(empty))
    assert "ASR 40.0% → 10.0% with the top heads" in sentences
    assert ("no better" in sentences) == (said is not None) and (said or "") in sentences
