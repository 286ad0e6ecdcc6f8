"""The method beside its controls: what is compared, and what the table says of it."""

import copy
from functools import partial

import pandas as pd
import pytest
import torch

import make_tables as script
from soteria.grid.comparison import METHOD, N_RANDOM, Measurement, answered_in_full, compare, conditions
from soteria.judging.interface import EMPTY, HARMFUL, NOT_HARMFUL
from soteria.judging.refusal import RefusalJudge
from soteria.judging.statistics import Rate, compare_paired
from soteria.models.task_vector import TaskVector
from soteria.reporting import tables
from soteria.storage import files, paths
from soteria.storage.csv_files import write_table

RANKING = [(layer, head) for layer in range(5) for head in range(6)]
CONTROLS = ("random heads", "bottom heads", "all heads")
H, N = HARMFUL, NOT_HARMFUL


# Measuring


@torch.no_grad()
def greedy(loaded, ids: list[int], n: int) -> list[int]:
    """The oracle: one full forward a token."""
    for _ in range(n):
        ids = [*ids, int(loaded.model(torch.tensor([ids])).logits[0, -1].argmax())]
    return ids


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mistral-sliding", "gemma2"])
def test_an_answer_is_right_in_full_where_greedy_decoding_gives_it(architecture, tiny_loaded):
    loaded = tiny_loaded(architecture)
    prompts = [loaded.tokenizer(text).input_ids for text in ("Q: hot\nA:", "Q: the big old city\nA:", "no")]
    lengths = [3, 1, 4]
    rows, right = [], []
    for prompt, n in zip(prompts, lengths, strict=True):
        answer = greedy(loaded, prompt, n)
        wrong_last = [*answer[:-1], (answer[-1] + 1) % 400]
        wrong_first = [*answer[: len(prompt)], (answer[len(prompt)] + 1) % 400, *answer[len(prompt) + 1 :]]
        for ids in (answer, wrong_last, wrong_first):
            rows.append(ids)
            right.append(greedy(loaded, prompt, n) == ids)
    n_prompt = [len(prompt) for prompt in prompts for _ in range(3)]
    assert list(answered_in_full(loaded, rows, n_prompt)) == right == [True, False, False] * 3


def test_the_method_takes_the_rankings_start_and_the_bottom_its_end():
    found = conditions(RANKING, 7, 5, 6)
    assert found[METHOD] == [RANKING[:7]]
    assert found["bottom heads"] == [RANKING[-7:]]
    assert found["all heads"] == [RANKING]


def test_the_base_model_comes_first_with_no_heads():
    assert next(iter(conditions(RANKING, 7, 5, 6).items())) == ("base", [[]])


def test_random_heads_are_as_many_as_the_methods_and_each_draw_is_another():
    draws = conditions(RANKING, 7, 5, 6)["random heads"]
    assert [len(set(draw)) for draw in draws] == [7] * N_RANDOM
    assert len({frozenset(draw) for draw in draws}) == N_RANDOM
    assert all(set(draw) <= set(RANKING) for draw in draws)


def test_random_heads_are_the_same_every_time():
    assert conditions(RANKING, 7, 5, 6)["random heads"] == conditions(RANKING, 7, 5, 6)["random heads"]


def test_measurements_add_up_their_counts():
    total = Measurement(Rate(1, 4), Rate(0, 2), Rate(1, 2), Rate(3, 3)) + Measurement(
        Rate(2, 6), Rate(1, 2), Rate(1, 2), Rate(0, 1)
    )
    assert total == Measurement(Rate(3, 10), Rate(1, 4), Rate(2, 4), Rate(3, 4))


def test_the_divergence_is_the_mean_over_questions_and_models():
    one, other = (Measurement(*[Rate(1, 4)] * 4, values) for values in ((0.1, 0.2), (0.3, 0.8)))
    assert (one + other).as_json()["kl_first_token"] == {"value": 0.35}


class WeightBench:
    """Stands in for a bench: notes the first weight of each layer that it meets."""

    def __init__(self):
        self.met = []

    def measure(self, loaded, judge, base):
        assert base == (None if not self.met else "answers of the base")
        self.met.append(torch.stack([projection.weight[0, 0].clone() for projection in loaded.projections]))
        return Measurement(Rate(1, 4), Rate(0, 2), Rate(0, 2), Rate(3, 3), (0.5,)), "answers of the base"


def test_each_list_of_heads_is_measured_and_a_conditions_counts_are_added(tiny_loaded, tmp_path):
    loaded, bench = tiny_loaded("llama"), WeightBench()
    tuned = copy.deepcopy(loaded)
    with torch.no_grad():
        for projection in tuned.projections:
            projection.weight += 1
    tuned.model.save_pretrained(tmp_path)
    vector = TaskVector.open(loaded.name, str(tmp_path))
    lists = {"base": [[]], METHOD: [[(0, 0)]], "random heads": [[(1, 0)], [(2, 0)], [(0, 1)]]}
    found = compare(loaded, vector, lists, 2.0, bench, RefusalJudge())
    assert [found[name].asr for name in lists] == [Rate(1, 4), Rate(1, 4), Rate(3, 12)]
    assert [len(found[name].divergences) for name in lists] == [1, 1, 3]
    moved = [torch.round(bench.met[0] - weights).tolist() for weights in bench.met]
    assert moved == [[0, 0, 0], [2, 0, 0], [0, 2, 0], [0, 0, 2], [0, 0, 0]]


# Tables


def comparison(language="Hindi", asr=None, scaling_factor=2.0) -> dict:
    """What compare_controls.py writes, with made-up rates out of 100. `asr` is by condition."""
    counts = {"base": 80, METHOD: 20, "random heads": 40, "bottom heads": 60, "all heads": 10} | (asr or {})
    return {
        "base_model": "some/base",
        "finetune_model": "some/tuned",
        "language": language,
        "scaling_factor": scaling_factor,
        "policy": "policy",
        "judge": RefusalJudge.description,
        "conditions": {
            condition: Measurement(Rate(count, 100), Rate(5, 100), Rate(6, 100), Rate(70, 100)).as_json()
            for condition, count in counts.items()
        },
    }


def write(results, *comparisons) -> None:
    for item in comparisons:
        files.write_json(results / "controls" / f"{item['language']}_{item['scaling_factor']:g}.json", item)


def test_the_table_has_a_row_per_language_and_heads_and_a_mean_of_each():
    table = tables.main_table(tables.tidy([comparison("English"), comparison("Hindi")]))
    conditions = [METHOD, *CONTROLS]
    assert list(table["heads"]) == conditions * 3
    assert list(table["language"]) == ["English"] * 4 + ["Hindi"] * 4 + ["mean of 2"] * 4
    assert list(table["tier"])[::4] == ["High", "Mid", ""]


def test_a_cell_shows_base_and_safe_with_their_intervals():
    row = tables.main_table(tables.tidy([comparison()])).iloc[0]
    base, safe = ([f"{end:.0%}" for end in Rate(count, 100).interval] for count in (80, 20))
    assert row["ASR"] == f"80.0% [{', '.join(base)}] → 20.0% [{', '.join(safe)}]"
    assert (row["benign refusals"], row["ICL accuracy"]) == ("5.0% → 5.0%", "70.0% → 70.0%")


def test_means_are_over_languages_with_the_relative_change():
    found = tables.means(tables.tidy([comparison("English", {METHOD: 10}), comparison("Hindi", {METHOD: 30})]))
    method = found[(found["heads"] == METHOD) & (found["rate"] == "asr")].iloc[0]
    assert (method["base"], method["safe"]) == pytest.approx((0.8, 0.2))
    assert method["relative_change"] == pytest.approx(-0.75)


@pytest.mark.parametrize(("method", "said"), [(20, "lower than"), (60, "higher than"), (40, "the same as")])
def test_the_verdict_says_whether_the_method_beats_random_heads(method, said):
    verdict = tables.verdict_on_controls(tables.tidy([comparison(asr={METHOD: method})]))
    assert f"{method:.1f}%, {said} with as many random heads" in verdict
    assert all(name in verdict for name in CONTROLS)


def test_languages_come_in_the_papers_order(tmp_path):
    write(tmp_path, comparison("Telugu"), comparison("English"), comparison("Arabic"))
    assert [item["language"] for item in tables.load_comparisons(tmp_path)] == ["English", "Arabic", "Telugu"]


def test_a_broken_file_is_left_out(tmp_path):
    write(tmp_path, comparison())
    (tmp_path / "controls" / "broken.json").write_text("{")
    (tmp_path / "controls" / "other.json").write_text("[]")
    assert len(tables.load_comparisons(tmp_path)) == 1


def test_the_divergence_stands_beside_the_rates_and_a_dash_where_it_was_not_measured():
    measured = [comparison("English"), comparison("Hindi")]
    for item, value in zip(measured, (0.1, 0.3), strict=True):
        item["conditions"][METHOD]["kl_first_token"] = {"value": value}
    table = tables.main_table(tables.tidy(measured), tables.divergences(measured))
    assert list(table[table["heads"] == METHOD][tables.DIVERGENCE_TITLE]) == ["0.100", "0.300", "0.200"]
    assert set(table[table["heads"] != METHOD][tables.DIVERGENCE_TITLE]) == {"–"}


def judged(results, language, base, safe) -> None:
    """What run.sh leaves for a language: verdicts and, in the answers' facts, categories a, b, a, b …"""
    path = tables.evaluated_file(comparison(language), results)
    questions = [f"{language} {row}" for row in range(len(base))]
    write_table(pd.DataFrame({"Question": questions, "Verdict_Base": base, "Verdict_Safe": safe}), path)
    files.write_json(path.with_suffix(".json"), {"base": {}, "safe": {}})
    answers = results / "generations" / path.name.removeprefix("Evaluated_")
    files.write_json(answers.with_suffix(".json"), {"categories": ["ab"[row % 2] for row in range(len(base))]})


def test_pairs_are_compared_per_language_tier_and_category(tmp_path):
    verdicts = {
        "English": ([H, H, H, N], [N, H, N, N]),
        "Hindi": ([H, N, H, N], [N, N, N, H]),
        "Arabic": ([H, H, N, N], [H, N, N, EMPTY]),
    }
    for language, (base, safe) in verdicts.items():
        judged(tmp_path, language, base, safe)
    table = tables.paired_table([comparison(language) for language in [*verdicts, "Telugu"]], tmp_path)
    assert list(table["of"]) == ["language"] * 3 + ["tier"] * 2 + ["all"] + ["category"] * 2
    assert list(table["name"]) == [*verdicts, "High", "Mid", "all", "a", "b"]
    assert list(table["rows"]) == [4, 4, 3, 4, 7, 11, 6, 5]
    mid = table[table["name"] == "Mid"].iloc[0]
    questions = [0, 1, 2, 3] * 2
    want = compare_paired(*(verdicts["Hindi"][at] + verdicts["Arabic"][at] for at in (0, 1)), questions)
    assert [mid["difference"], [mid["low"], mid["high"]], mid["p"]] == [
        want["difference"],
        want["ci95"],
        want["mcnemar_p"],
    ]
    assert (mid["base"], mid["safe"]) == (4 / 8, 2 / 8)
    assert len(tables.readable_pairs(table)) == len(table)


def test_without_verdicts_on_both_models_there_is_no_paired_table(tmp_path):
    assert tables.paired_table([comparison("Hindi")], tmp_path).empty


def evaluated(results, judge_description) -> None:
    _, path = paths.answer_files(results, "Hindi", "some/base", "policy_Hindi", 2.0)
    found = {"asr": 0.5, "ci95": [0.4, 0.6], "harmful": 48}
    files.write_json(path.with_suffix(".json"), {"rows": 96, "judge_description": judge_description, "safe": found})


def test_what_run_sh_found_on_the_checkpoint_stands_in_the_table(tmp_path):
    evaluated(tmp_path, RefusalJudge.description)
    asr = tables.use_evaluated(comparison(), tmp_path)["conditions"][METHOD]["asr"]
    assert asr == {"value": 0.5, "ci95": [0.4, 0.6], "count": 48, "n": 96}


def test_another_judges_numbers_do_not_stand_beside_the_controls(tmp_path):
    evaluated(tmp_path, "openai:some-model")
    assert tables.use_evaluated(comparison(), tmp_path) == comparison()


def test_latex_has_the_rules_of_booktabs_and_no_bare_percent_sign():
    latex = tables.to_latex(tables.main_table(tables.tidy([comparison()])), "some_base, 5 % of it")
    assert all(
        rule in latex for rule in (r"\toprule", r"\midrule", r"\bottomrule", r"\caption{some\_base, 5 \% of it}")
    )
    assert r"80.0\% [71\%, 87\%] $\to$ 20.0\%" in latex
    assert "%" not in latex.replace(r"\%", "")


def test_markdown_is_a_table_of_equal_columns():
    lines = tables.to_markdown(pd.DataFrame({"a": ["long text", "x"], "b": [1, 22]})).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[1].replace("-", "") == "|||"


# make_tables.py


@pytest.fixture
def make_tables(run_script, tmp_path):
    return partial(run_script, script, "--results", tmp_path)


def test_the_table_is_written_as_markdown_csv_and_picture(make_tables, tmp_path):
    write(tmp_path, comparison("English"), comparison("Hindi"))
    assert make_tables() == 0
    text = (tmp_path / "tables" / "main.md").read_text()
    assert "proxy" in text and "mean of 2" in text and "lower than" in text
    assert len(pd.read_csv(tmp_path / "tables" / "main.csv")) == 2 * 4 * 4
    assert (tmp_path / "tables" / "main.png").read_bytes().startswith(b"\x89PNG")


def test_a_language_that_was_not_run_is_named_and_not_counted(make_tables, tmp_path):
    write(tmp_path, comparison("Hindi"))
    assert make_tables("--language", "hi", "Bengali") == 0
    text = (tmp_path / "tables" / "main.md").read_text()
    assert "Not run: Bengali." in text and "lower than" in text and "mean of 1" in text
    assert list(pd.read_csv(tmp_path / "tables" / "main.csv")["language"].unique()) == ["Hindi"]


def test_only_the_wanted_languages_are_in_the_table(make_tables, tmp_path):
    write(tmp_path, comparison("English"), comparison("Hindi"))
    assert make_tables("--language", "English", "--name", "english") == 0
    assert "Hindi" not in (tmp_path / "tables" / "english.md").read_text()


def test_several_scaling_factors_are_refused_until_one_is_given(make_tables, tmp_path, capsys):
    write(tmp_path, comparison(), comparison(scaling_factor=4.0))
    assert make_tables() == 2
    assert "--scaling_factor" in capsys.readouterr().err and not (tmp_path / "tables").exists()
    assert make_tables("--scaling_factor", 4) == 0
    assert "scaling factor 4" in (tmp_path / "tables" / "main.md").read_text()


def test_the_same_results_give_the_same_text(make_tables, tmp_path):
    write(tmp_path, comparison())
    written = []
    for _ in range(2):
        assert make_tables() == 0
        written.append([(tmp_path / "tables" / f"main{ending}").read_bytes() for ending in (".md", ".csv")])
    assert written[0] == written[1]
