"""Tables of a grid: pooled rates and their intervals, blanks, sources, and what is said of them."""

import json

import numpy as np
import pandas as pd
import pytest
from conftest import named_by
from statsmodels.stats.proportion import confint_proportions_2indep

from soteria.answering.questions import read_questions, spread_rows
from soteria.grid.grid_file import Grid
from soteria.grid.limits import Limits
from soteria.judging.interface import DEGENERATE, EMPTY, FILTERED, HARMFUL, NOT_HARMFUL
from soteria.judging.statistics import Rate
from soteria.judging.verdicts import AnswerFile, inputs_of
from soteria.languages import find_language
from soteria.reporting import numbers, readable
from soteria.reporting.conditions import BASE_CONDITION, Cells, FoundCell
from soteria.reporting.output import not_run, write_grid
from soteria.reporting.readable import rate
from soteria.reporting.verdicts import verdicts
from soteria.reporting.write_up import Table, WriteUp, compose

H, N = HARMFUL, NOT_HARMFUL


def test_of_one_list_the_interval_is_wilsons():
    found = numbers.asr([[H, H, N, N, N, N, EMPTY, N]])
    assert [found["low"], found["high"]] == Rate(2, 7).interval
    assert found["asr"] == found["asr_judged"] == 2 / 7 and (found["least"], found["most"]) == (2 / 8, 3 / 8)
    assert (found["harmful"], found["rows"], found["unjudged"]) == (2, 8, 1)
    assert "least" not in numbers.asr([[H, N]]) and numbers.asr([[EMPTY]])["asr"] is None
    pooled = numbers.asr([[H, EMPTY, EMPTY, N], [N, H, EMPTY, N]])
    assert pooled["asr"] == 2 / 5 and pooled["low"] < 2 / 5 < pooled["high"]


def test_translations_of_a_question_are_drawn_together():
    """Twelve copies of one language know no more than one of them: the interval is as wide."""
    rows = [draw < 0.3 for draw in np.random.default_rng(0).random(96)]
    alone, twelve = numbers.interval([rows, rows]), numbers.interval([rows] * 12)
    assert np.allclose(alone, twelve, atol=0.02)
    independent = numbers.interval([rows[i:] + rows[:i] for i in range(0, 96, 8)])
    assert np.diff(independent) < 0.5 * np.diff(twelve)


def test_lists_of_different_lengths_are_drawn_row_by_row():
    low, high = numbers.interval([[True] * 10, [False] * 30])
    assert low < 0.25 < high


def test_a_difference_is_paired():
    before, after = [[H] * 40 + [N] * 56], [[H] * 20 + [N] * 76]
    found = numbers.difference(before, after)
    assert found["difference"] == pytest.approx(-20 / 96)
    assert found["difference_low"] < -20 / 96 < found["difference_high"] < 0
    assert found["difference_p"] == pytest.approx(2 * 0.5**20)


def test_several_sources_are_written_as_one_pattern_that_matches_them_and_no_other_file(tmp_path):
    for paths, source in (
        (["a/b/c.csv"], "a/b/c.csv"),
        (["cells/m/Hindi/base/p.csv", "cells/m/Thai/base/p.csv"], "cells/m/{Hindi,Thai}/base/p.csv"),
        (["a/random_50_0/p", "a/random_50_1/p"], "a/{random_50_0,random_50_1}/p"),
        (["Hindi/shared_Mid/p", "Tamil/shared_Low/p"], "{Hindi,Tamil}/{shared_Mid,shared_Low}/p"),
    ):
        assert numbers.together([tmp_path / path for path in paths], tmp_path) == source
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
    found = readable.readable_ablation(table)
    assert list(found["share"]) == ["–", "50%", "–"]
    assert list(found["ASR"]) == ["40.0% [30%, 50%]", "", "0% [0%, 4%]"]
    assert (found[["benign refused", "benign changed", "KL, nats", "ICL accuracy"]] == "").all(axis=None)
    assert not {"model", "prompts", "judge", "λ"} & set(found.columns)  # the same in each row
    assert "model" in readable.readable_ablation(table.assign(model=["m", "n", "n"]))


def test_selectivity_joins_the_intervals_of_both_rates(tmp_path, monkeypatch):
    """Of one language that is Newcombe's interval of a difference."""
    grid = Grid.model_validate(GRID | {"languages": ["en"], "borderline": "borderline"})
    cells, row = Cells(grid, grid.models[0], tmp_path), {"prompts": "policy", "judge": "refusal"}
    given = {"policy": [N] * 40 + [H] * 20 + [DEGENERATE] * 4 + [EMPTY] * 6, "borderline": [N] * 9 + [H] * 55}
    monkeypatch.setattr(FoundCell, "verdicts", lambda self, name, judge: given.get(name))
    found = numbers.selectivity(cells, BASE_CONDITION, ["English"], row)
    low, high = confint_proportions_2indep(40, 64, 9, 64, method="newcomb", compare="diff")
    assert found["selectivity"] == 40 / 64 - 9 / 64
    assert [found["selectivity_low"], found["selectivity_high"]] == pytest.approx([low, high])
    given["borderline"] = None
    assert numbers.selectivity(cells, BASE_CONDITION, ["English"], row) == {}


GRID = {
    "name": "none",
    "models": [{"base": "some/base", "tuned": "some/tuned"}],
    "languages": ["en", "hi"],
    "prompt_sets": ["policy"],
    "scaling_factor": 2,
    "answers": {"questions": 4},
}


@pytest.fixture
def empty(tmp_path) -> WriteUp:
    """All of a grid's tables where nothing has been run."""
    return compose(Grid.model_validate(GRID | {"ablations": {"shares": [0.5, 1], "transfer": True}}), tmp_path)


def test_a_grid_that_was_not_run_has_all_its_tables_blank_and_counted(empty, tmp_path):
    names = [table.name for table in empty.tables]
    assert names == ["main", "heads", "scaling", "transfer", "parameters"]
    for table in empty.tables:
        n = len(table.tidy)
        assert n > 0 and f"{n} of {n} numbers: not run, blank." in empty.caption(table)
        texts = table.readable.astype(str).to_numpy().ravel().tolist()
        assert not [text for text in texts if text in ("0", "0%", "0.000", "nan", "None")]
    assert verdicts(empty) == []
    assert not_run(empty) == ["10 cells were not run yet"]
    grid_file = tmp_path / "none.yaml"
    grid_file.write_text("name: none\n")
    write_grid(empty.grid, grid_file, tmp_path)
    assert "10 cells were not run yet" in (tmp_path / "report.html").read_text()


def heads_row(heads: str, asr: float, share: float | None = 0.5, over_top: tuple = ()) -> dict:
    compared = dict(zip(("over_top", "over_top_low", "over_top_high"), over_top, strict=False))
    named = {"model": "m", "prompts": "p", "judge": "refusal", "heads": heads}
    return named | {"share": share, "asr": asr} | compared


def test_the_interval_of_the_paired_difference_decides_what_is_said_of_a_control(empty):
    rows = [heads_row("base", 0.4, None), heads_row("top heads", 0.1)]
    rows.append(heads_row("random heads", 0.0, 0.25, (-1.0, -1.0, -1.0)))  # not the method's share
    for over_top, said in (
        ((0.1, 0.05, 0.15), "better than"),
        ((0.1, -0.01, 0.2), "no better than"),
        ((0.0, 0.0, 0.0), "no better than"),
        ((-0.05, -0.08, -0.02), "worse than"),
    ):
        tidy = pd.DataFrame([*rows, heads_row("random heads", 0.2, over_top=over_top)])
        empty.tables = [Table("heads", "", "", tidy, tidy)]
        sentences = " ".join(verdicts(empty))
        assert "ASR 40.0% → 10.0% with the top heads" in sentences and sentences.count("as many") == 1
        assert f"do {said} as many random heads" in sentences


def write_cells(results, given: dict[str, dict[str, str]], judge: str = "refusal") -> None:
    """Verdicts of cells, a letter a question: H, N, D for a degenerate one, or for one that a content filter blocked F,
    before E.
    """
    for language, cells in given.items():
        for name, letters in cells.items():
            model, folder = ("Base", name) if name == "base" else ("Safe", f"{name}_scaling_2")
            path = results / "cells" / "some_base" / language / folder / f"policy.by_{judge}.csv"
            path.parent.mkdir(parents=True, exist_ok=True)
            words = [{"H": H, "N": N, "D": DEGENERATE, "E": EMPTY, "F": FILTERED}[letter] for letter in letters]
            write_answers(path.with_name("policy.csv"), language, f"{model.upper()} ANSWER", len(words))
            noted = inputs_of(AnswerFile(path.with_name("policy.csv")), judge.replace("_", ":"))
            noted |= {"judge_description": judge}
            table = pd.read_csv(path.with_name("policy.csv")).assign(**{f"Verdict_{model}": words})
            table.to_csv(path, index=False)
            if n := letters.count("E") + letters.count("F"):
                noted[model.lower()] = {"unjudged": {"content filter": n}}
            path.with_suffix(".json").write_text(json.dumps(noted))


def write_answers(path, language: str, column: str, n: int) -> None:
    """Answers to the first questions that a grid with `answers: {questions: n}` asks."""
    found = read_questions(f"policy_{language}", find_language(language))
    questions = found.at(spread_rows(len(found.questions), n)).questions
    pd.DataFrame({"Question": questions, column: questions}).to_csv(path, index=False)
    made = {"language": language, "max_new_tokens": 512, "chat_template": False, "model": "some/base"}
    facts = {"language": language, "dataset": f"policy_{language}", "rows": n, "columns": {column: made}}
    path.with_suffix(".json").write_text(json.dumps(facts))


def test_rows_without_a_verdict_stand_beside_every_rate_and_both_sides_of_a_difference_are_over_the_same_rows(tmp_path):
    grid = Grid.model_validate(GRID | {"ablations": {"shared": []}})
    write_cells(tmp_path, {"English": {"base": "FHHN", "top_50": "NENN"}, "Hindi": {"base": "EEEE", "top_50": "HNNN"}})
    found = compose(grid, tmp_path)
    row = found.table("main").set_index("language").loc["English"]
    assert row["base"] == "66.7% [21%, 94%] (1/4: 50% – 75%; 1 filtered)"
    assert row["language-specific"] == "0% [0%, 56%] (1/4: 0% – 25%; 1 filtered)"
    assert row["language-specific − base"] == "-50.0% [-100.0%, +0.0%] (50.0% → 0.0%, 2)"
    assert found.table("main").set_index("language").loc["Hindi"]["base"] == "– (4/4: 0% – 100%; 4 filtered)"
    some = {"asr": 0.5, "low": 0, "high": 1, "unjudged": 3, "rows": 9, "least": 0.3, "most": 0.7}
    some |= {"filtered": 2, "least_unfiltered": 0.4, "most_unfiltered": 0.6}
    assert rate(some).endswith("(3/9: 30% – 70%; 2 filtered, without them 40% – 60%)")
    table = found.tables[0]
    assert "content filter" in table.counted and "1 have no judged row at all" in table.counted
    assert found.tidy("main").set_index(["name", "heads"]).loc["English", "base"]["filtered"] == 1
    said = verdicts(found)[-1]
    assert "6 of 16 answers have no verdict (6 × content filter)" in said and "upper bound" in said


def test_of_several_judges_each_is_shown_with_their_majority_and_how_far_pairs_agree(tmp_path):
    judges = ["refusal", "openai:a", "openai:b"]
    grid = Grid.model_validate(GRID | {"languages": ["en"], "judges": judges, "ablations": {"shared": []}})
    for judge, base in (("refusal", "HHNN"), ("openai_a", "HHHE"), ("openai_b", "HNNE")):
        write_cells(tmp_path, {"English": {"base": base, "top_50": "NNNN"}}, judge)
    found = compose(grid, tmp_path)
    base = found.tidy("main").set_index(["judge", "heads"])["asr"].xs("base", level="heads")
    assert base.to_dict() == {"refusal": 1 / 2, "openai:a": 1, "openai:b": 1 / 3, "majority": 1 / 2}
    source = found.tidy("main").set_index(["judge", "heads"]).loc[("majority", "base"), "source"]
    assert len(named_by(source, tmp_path)) == 3
    pairs = found.table("agreement").set_index(["judges", "heads"])
    assert pairs.loc[("refusal and openai:a", "base"), "agreement"].startswith("66.7% [")
    assert pairs.loc[("openai:a and openai:b", "base"), "kappa"].startswith("0.00 [")
    assert pairs.loc[("refusal and openai:a", "language-specific"), "kappa"] == "–"  # one label throughout
    assert list(pairs["rows"]) == ["3", "4"] * 3


def test_degenerate_answers_are_counted_beside_every_rate_that_takes_them_for_not_harmful(tmp_path):
    grid = Grid.model_validate(GRID | {"ablations": {"shared": []}})
    write_cells(tmp_path, {"English": {"base": "HHHN", "top_50": "DDHN"}, "Hindi": {"base": "HHNN", "top_50": "NNNN"}})
    found = compose(grid, tmp_path)
    row = found.table("main").set_index("language").loc["English"]
    assert row["base"] == "75.0% [30%, 95%]"
    assert row["language-specific"] == "25.0% [5%, 70%] (2 degenerate)"
    assert row["language-specific − base"].startswith("-50.0%")
    heads = found.table("heads").set_index("heads")
    assert list(heads.loc[["base", "top heads"], "degenerate"]) == ["0", "2"]
    assert "count as judged and not harmful" in found.tables[0].counted
    assert "62.5% → 12.5% (2 degenerate) with the top heads" in verdicts(found)[0]
    assert found.tidy("main").set_index(["name", "heads"]).loc["English", "language-specific"]["degenerate"] == 2


def test_a_control_is_paired_with_the_top_heads_answer_by_answer_in_every_draw(tmp_path):
    """Two languages of four questions, two random draws: the differences are counted by hand."""
    grid = Grid.model_validate(GRID | {"ablations": {"random_draws": 2, "shared": []}})
    given = {
        "English": {"base": "HHHH", "top_50": "HNNN", "random_50_0": "NNNN", "random_50_1": "HHNN"},
        "Hindi": {"base": "HHHN", "top_50": "NNNN", "random_50_0": "HNNN", "random_50_1": "NNNN"},
    }
    write_cells(tmp_path, given)
    table = compose(grid, tmp_path).tidy("heads").set_index("heads")
    row = table.loc["random heads"]
    assert row["asr"] == 3 / 16 and table.loc["top heads"]["asr"] == 1 / 8
    assert row["over_top"] == pytest.approx((-1 + 1 + 1 + 0) / 16)
    assert row["over_top_low"] < row["over_top"] < row["over_top_high"]
    assert pd.isna(table.loc["base"]["over_top"]) and pd.isna(table.loc["top heads"]["over_top"])


def test_the_limits_of_a_grid_say_which_scaling_factor_they_choose(empty):
    costs = {"kl": 0.1, "benign_refusals": 0.0, "icl_accuracy": 1.0}
    named = {"model": "m", "prompts": "p", "judge": "refusal"}
    rows = [{"scaling_factor": 0.0, "asr": 0.4, "benign_changes": 0.0}]
    rows += [{"scaling_factor": f, "asr": 0.4 - f / 10, "benign_changes": f / 50} for f in (1.0, 2.0, 3.0)]
    tidy = pd.DataFrame([named | costs | row for row in rows])
    empty.tables = [Table("scaling", "", "", tidy, tidy)]
    assert verdicts(empty) == []
    for limits, said in ({"max_changes": 0.05}, "λ = 2 is chosen"), ({"max_changes": 0.01}, "no λ keeps the limits"):
        empty.grid = empty.grid.model_copy(update={"limits": Limits(**limits)})
        assert said in verdicts(empty)[0]
    tidy.loc[2, "kl"] = float("nan")
    assert "not measured" in verdicts(empty)[0]
