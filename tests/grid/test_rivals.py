"""Rival rankings, all parameters and random draws in a small grid, run for real, against sums by hand."""

import csv
import json
import random
from pathlib import Path

import pandas as pd
import pytest
import safetensors.torch
import torch
import yaml
from conftest import named_by, run_in_child

import reproduce
from soteria.answering.generation import answer_questions
from soteria.answering.questions import spread_rows
from soteria.errors import UserError
from soteria.grid import cell_work, subject
from soteria.grid.cells import grid_cells
from soteria.grid.grid_file import read_grid
from soteria.judging import costs
from soteria.languages import find_language
from soteria.models.loading import load_model
from soteria.models.tensors import load_tensor
from soteria.reporting.draws import place
from soteria.scoring.heads import random_heads

ROOT = Path(__file__).resolve().parents[2]
BASE, TUNED = (ROOT / "data" / "models" / f"polyglot-{which}" for which in ("base", "tuned"))
LANGUAGES = ("Hindi", "Bengali")
RANKINGS = ["whole", "absolute", "task_vector", "safety", "random", "all_parameters"]
ABLATIONS = {
    "random_draws": 1,
    "scaling_factors": [2],
    "shared": [],
    "rankings": RANKINGS,
    "all_parameters_factors": [0.25],
    "draws": {"number": 3, "questions": 4},
}
GRID = {
    "name": "rivals",
    "models": [{"base": str(BASE), "tuned": str(TUNED)}],
    "languages": list(LANGUAGES),
    "tasks": ["antonym"],
    "prompt_sets": ["policy"],
    "benign": "everyday",
    "heads": 0.25,
    "scaling_factor": 5,
    "safety_questions": {"harmful": "policy-validation", "harmless": "everyday-validation"},
    "ablations": ABLATIONS,
    "scoring": {"n_trials": 2, "n_shots": 3},
    "answers": {"batch_size": 64, "max_new_tokens": 32, "questions": 10},
}
STEPS = ("--steps", "score", "answer", "judge", "tables")
N_HEADS = 8  # of each of the four layers


@pytest.fixture(scope="module", autouse=True)
def few_prompts():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(costs, "N_PROMPTS", 3)
        yield


def write_grid(folder: Path, **changes) -> Path:
    path = folder / "rivals.yaml"
    path.write_text(yaml.safe_dump(GRID | changes))
    return path


@pytest.fixture(scope="module")
def grid_file(tmp_path_factory) -> Path:
    return write_grid(tmp_path_factory.mktemp("grid"))


@pytest.fixture(scope="module")
def done(tmp_path_factory, grid_file) -> Path:
    results = tmp_path_factory.mktemp("results")
    run_in_child(reproduce, [str(grid_file), "--results", str(results), "--device", "cpu", *STEPS])
    return results


def facts(done: Path, language: str, cell: str) -> dict:
    return json.loads((done / "cells/polyglot-base" / language / cell / "cell.json").read_text())


def column(done: Path, language: str, cell: str, name: str) -> list[str]:
    return list(pd.read_csv(done / f"cells/polyglot-base/{language}/{cell}/{name}.csv").iloc[:, -1])


def test_every_ranking_is_run_along_the_factors_and_draws_are_run_beside_them(grid_file):
    grid = read_grid(grid_file)
    found = [cell.name.split("/")[2] for cell in grid_cells(grid, grid.models[0]) if cell.language == "Hindi"]
    ranked = ("top_25", "whole_25", "absolute_25", "task_vector_25", "safety_25", "random_25_0")
    drawn = [f"{kind}_25_{draw}_scaling_5" for kind in ("draw", "matched") for draw in range(3)]
    wanted = [f"{name}_scaling_{factor}" for name in ranked for factor in (2, 5)]
    assert sorted(found) == sorted(["base", *wanted, "all_parameters_scaling_0.25", *drawn])


def test_rivals_may_be_run_in_some_of_the_languages_only(tmp_path):
    grid = read_grid(write_grid(tmp_path, ablations=ABLATIONS | {"rival_languages": ["hi"]}))
    cells = [cell.name for cell in grid_cells(grid, grid.models[0]) if "/Bengali/" in cell.name]
    assert [cell.partition("/Bengali/")[2] for cell in cells] == [
        "base",
        "top_25_scaling_5",
        "random_25_0_scaling_5",
        "top_25_scaling_2",
    ]
    assert [grid.scored_answers(language) for language in LANGUAGES] == [["first", "whole"], ["first"]]
    path = write_grid(tmp_path, languages=["en", "hi"], ablations=ABLATIONS | {"rival_languages": ["hi"]})
    assert read_grid(path, languages=["hi"]).rival_languages == ["Hindi"]
    without = read_grid(path, languages=["en"])
    assert not without.ablations.rankings and not without.ablations.draws
    with pytest.raises(UserError, match="rival_languages"):
        read_grid(write_grid(tmp_path, ablations=ABLATIONS | {"rival_languages": ["Thai"]}))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"scoring": {"answer": "whole"}}, "whole is how the method itself ranks"),
        ({"heads": 1}, "a share below 1"),
        ({"ablations": ABLATIONS | {"random_draws": 0}}, "needs ablations.random_draws"),
        ({"ablations": ABLATIONS | {"rankings": ["norm"]}}, "ablations.rankings"),
        ({"safety_questions": None}, "needs safety_questions"),
        ({"safety_questions": {"harmful": "policy", "harmless": "everyday-validation"}}, "are reported on"),
        ({"safety_questions": {"harmful": "policy-validation", "harmless": "everyday"}}, "are reported on"),
        (
            {
                "safety_questions": {
                    "harmful": "policy-validation",
                    "harmless": f"{ROOT}/data/benign/everyday_{{language}}.csv",
                }
            },
            "are reported on",
        ),
    ],
)
def test_a_grid_whose_rivals_cannot_be_had_is_refused(changes, said, tmp_path):
    with pytest.raises(UserError, match=said):
        read_grid(write_grid(tmp_path, **changes))


def test_given_lists_have_rivals_that_need_no_scores(tmp_path):
    path, given = tmp_path / "given.yaml", {key: value for key, value in GRID.items() if key != "heads"}
    for rankings, said in ((["task_vector", "random"], None), (["absolute"], "need scores")):
        ablations = ABLATIONS | {"rankings": rankings}
        path.write_text(yaml.safe_dump(given | {"head_folder": "lists", "ablations": ablations}))
        if said:
            with pytest.raises(UserError, match=said):
                read_grid(path)
        else:
            grid = read_grid(path)
            names = {cell.name.split("/")[2] for cell in grid_cells(grid, grid.models[0])}
            assert {"task_vector_given_scaling_2", "matched_given_2_scaling_5"} <= names


def slices() -> dict[tuple[int, int], float]:
    """The norm of every head's change, from the files."""
    base, tuned = (safetensors.torch.load_file(folder / "model.safetensors") for folder in (BASE, TUNED))
    names = sorted((name for name in base if name.endswith("o_proj.weight")), key=lambda name: int(name.split(".")[2]))
    changes = [(tuned[name].double() - base[name].double()).chunk(N_HEADS, dim=1) for name in names]
    return {(layer, head): part.norm().item() for layer, own in enumerate(changes) for head, part in enumerate(own)}


def test_each_ranking_takes_the_heads_of_highest_score(done):
    scores, n = done / "indirect_effect", 4 * N_HEADS // 4
    effects = [
        load_tensor(scores / f"polyglot-base{kind}/antonym_Hindi/antonym_Hindi_indirect_effect.pt").double().mean(0)
        for kind in ("", "_whole")
    ]
    divergence = load_tensor(scores / "polyglot-base/safety_Hindi/safety_Hindi_divergence.pt")
    assert len(divergence) == 10 and divergence.min() >= -1e-6  # the first ten questions, as everywhere in this grid
    by_hand = {"top": effects[0], "whole": effects[1], "absolute": effects[0].abs(), "safety": divergence.mean(0)}
    by_hand["task_vector"] = torch.tensor(list(slices().values())).view(4, N_HEADS)
    lists = {}
    for name, score in by_hand.items():
        lists[name] = {tuple(head) for head in facts(done, "Hindi", f"{name}_25_scaling_2")["head_list"]}
        assert lists[name] == {divmod(i, N_HEADS) for i in score.flatten().topk(n).indices.tolist()}
    assert len(set(map(frozenset, lists.values()))) == len(lists)


def test_a_matched_draw_has_the_norm_of_the_methods_change_and_the_heads_of_its_fellow(done):
    norms = slices()

    def norm(heads: list) -> float:
        return sum(norms[tuple(head)] ** 2 for head in heads) ** 0.5

    for language in LANGUAGES:
        method = 5 * norm(facts(done, language, "top_25_scaling_5")["head_list"])
        for draw in range(3):
            plain, matched = (facts(done, language, f"{kind}_25_{draw}_scaling_5") for kind in ("draw", "matched"))
            heads = [list(head) for head in random_heads([divmod(i, N_HEADS) for i in range(4 * N_HEADS)], 8, draw)]
            assert plain["head_list"] == matched["head_list"] == heads
            assert matched["matched_scaling_factor"] * norm(heads) == pytest.approx(method, rel=1e-6)
            assert plain["scaling_factor"] == 5 and "matched_scaling_factor" not in plain
            assert plain["answers_from"] != matched["answers_from"]
            answers = done / f"cells/polyglot-base/{language}/matched_25_{draw}_scaling_5/policy.json"
            steered = json.loads(answers.read_text())["columns"]["SAFE ANSWER"]["steered"]
            assert steered["scaling_factor"] == matched["matched_scaling_factor"]


def test_draws_answer_questions_at_equal_distances_of_all_categories_and_levels_of_harm():
    assert spread_rows(10, 4) == [0, 2, 5, 7] and spread_rows(96, 48) == list(range(0, 96, 2))
    assert spread_rows(3, 3) == spread_rows(3, 9) == [0, 1, 2]
    for language in LANGUAGES:
        topics = json.loads((ROOT / f"data/source/{language}.json").read_text())["disallowed_topics"]
        with (ROOT / f"data/prompts/policy_{language}.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        kinds = [(row["category"], sum(t in row["question"] for t in sum(topics.values(), []))) for row in rows]  # noqa: RUF017
        some = [kinds[row] for row in spread_rows(len(kinds), 48)]
        for part in (0, 1):
            assert {kind[part] for kind in some} == {kind[part] for kind in kinds}


def test_the_place_of_the_method_counts_ties_against_it():
    assert place(3, [1, 3, 5]) == {"place": 3, "p": 3 / 4}
    assert place(0, [1, 3, 5]) == {"place": 1, "p": 1 / 4}
    assert place(9, [1, 3, 5]) == {"place": 4, "p": 1}


def test_the_draws_table_is_counted_again_from_the_cells(done):
    table, rows = pd.read_csv(done / "tables/rivals_draws.csv"), spread_rows(10, 4)
    assert len(table) == 3 * 2 * 3 and table["p"].notna().all()  # two languages and both, two kinds, three measures
    for row in table.itertuples():
        kind, own = ("matched" if "matched" in row.drawn else "draw"), LANGUAGES if row.of == "all" else [row.name]

        def count(cell: str, own=own, row=row) -> int:
            n = 0
            for language in own:
                name = "policy.by_refusal" if row.measure == "asr" else "benign.by_refusal"
                name = "benign" if row.measure == "benign_changes" else name
                values, base = column(done, language, cell, name), column(done, language, "base", "benign")
                values, base = (x if len(x) == 4 else [x[i] for i in rows] for x in (values, base))
                wanted = (
                    base
                    if row.measure == "benign_changes"
                    else ["Harmful" if row.measure == "asr" else "Not Harmful"] * 4
                )
                n += sum((a != b) == (row.measure == "benign_changes") for a, b in zip(values, wanted, strict=True))
            return n

        method, draws = count("top_25_scaling_5"), [count(f"{kind}_25_{draw}_scaling_5") for draw in range(3)]
        n = 4 * len(own)
        found = (row.method, row.base, row.mean, row.lowest, row.highest)
        by_hand = (method / n, count("base") / n, sum(draws) / 3 / n, min(draws) / n, max(draws) / n)
        assert found == pytest.approx(by_hand)
        assert (row.questions, row.place) == (4, 1 + sum(draw <= method for draw in draws))
        assert row.p == row.place / 4
        assert len(named_by(row.source, done)) == 3 * len(own) and len(named_by(row.method_source, done)) == 2 * len(
            own
        )


def test_the_rankings_table_has_each_ranking_at_each_factor_with_its_costs(done):
    table = pd.read_csv(done / "tables/rivals_rankings.csv")
    assert len(table) == 1 + 6 * 2 + 1
    assert (
        table[["asr", "low", "high", "benign_refusals", "benign_changes", "kl", "icl_accuracy"]].notna().all(axis=None)
    )
    assert table.iloc[-1]["heads"] == "all parameters" and table.iloc[-1]["share_of_parameters"] == 1
    page = (done / "report.html").read_text()
    assert "among 3 random draws of as many heads, on 4 questions a language, the method has place" in page
    for name in ("rivals_rankings.png", "rivals_rankings.pdf", "rivals_rankings.tex", "rivals_draws.md"):
        assert (done / "tables" / name).exists()


def test_all_parameters_answer_as_the_formula_on_every_tensor_does(done):
    loaded, tuned = load_model(str(BASE), "cpu"), load_model(str(TUNED), "cpu").model
    with torch.no_grad():
        for own, other in zip(loaded.model.parameters(), tuned.parameters(), strict=True):
            own.copy_(own - 0.25 * (other - own))
    found = pd.read_csv(
        done / "cells/polyglot-base/Bengali/all_parameters_scaling_0.25/policy.csv", keep_default_na=False
    )
    asked, spoken = list(found["Question"]), find_language("Bengali")
    assert list(found["SAFE ANSWER"]) == answer_questions(loaded, asked, spoken, batch_size=64, max_new_tokens=32)
    assert "head_list" not in facts(done, "Bengali", "all_parameters_scaling_0.25")


def test_killed_and_run_again_it_ends_with_the_same_tables_and_then_does_nothing(
    done, grid_file, tmp_path, run_script, monkeypatch
):
    words, draw = [str(grid_file), "--results", str(tmp_path), "--device", "cpu", *STEPS], random.Random(16)
    for _ in range(3):
        run_in_child(reproduce, words, kill_after=draw.uniform(1, 8))
    run_in_child(reproduce, words)
    tables = [{path.name: path.read_bytes() for path in (root / "tables").iterdir()} for root in (done, tmp_path)]
    assert tables[0] == tables[1]
    monkeypatch.setattr(subject, "load_model", lambda *_: pytest.fail("a model was loaded"))
    monkeypatch.setattr(cell_work, "make_judge", lambda *_: pytest.fail("something was judged"))
    assert run_script(reproduce, *words) == 0


def test_a_plan_counts_the_scores_cells_and_answers_of_rivals(grid_file, tmp_path, run_script, capsys):
    assert run_script(reproduce, grid_file, "--plan", "--results", tmp_path) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| polyglot-base | 40"))
    cells, scores, answers = (text.strip() for text in row.split("|")[2:5])
    # Effects of the first token and the whole answer, and safety; 14 cells of 10 questions and 6 draws of 4, with as
    # many harmless ones.
    assert (cells, scores) == ("40 (0 done)", "6")
    assert answers == f"{2 * (14 * (10 + 10) + 6 * (4 + 4)):,}"
