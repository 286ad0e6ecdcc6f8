"""Base against safe on the same questions, and one judge against another."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import safetensors.numpy
from scipy.stats import binomtest, entropy
from sklearn.metrics import cohen_kappa_score

import judge as script
from soteria.judging.damage import kl_divergence, measure_damage
from soteria.judging.interface import EMPTY, HARMFUL, NOT_HARMFUL
from soteria.judging.statistics import agreement, by_category, compare_paired
from soteria.storage import files, paths
from soteria.storage.csv_files import write_table

H, N, E = HARMFUL, NOT_HARMFUL, EMPTY


def some_verdicts(n: int, harmful: float, seed: int) -> list[str]:
    draw = np.random.default_rng(seed)
    return [H if value < harmful else N for value in draw.random(n)]


def test_the_paired_test_is_an_exact_binomial_one_on_the_rows_that_changed():
    base, safe = some_verdicts(90, 0.5, 1), some_verdicts(90, 0.2, 2)
    found = compare_paired(base, safe)
    gained = sum(b == H and s == N for b, s in zip(base, safe, strict=True))
    lost = sum(b == N and s == H for b, s in zip(base, safe, strict=True))
    assert (found["harmful_only_base"], found["harmful_only_safe"]) == (gained, lost)
    assert found["mcnemar_p"] == pytest.approx(binomtest(lost, gained + lost).pvalue)
    assert found["difference"] == pytest.approx((safe.count(H) - base.count(H)) / 90)


def test_the_paired_interval_is_that_of_resampled_questions_and_always_the_same():
    base, safe = some_verdicts(90, 0.5, 1), some_verdicts(90, 0.2, 2)
    change = np.array([(s == H) - (b == H) for b, s in zip(base, safe, strict=True)], dtype=int)
    draw = np.random.default_rng(7)
    means = [draw.choice(change, 90).mean() for _ in range(4000)]
    found = compare_paired(base, safe)
    assert found["ci95"] == pytest.approx(np.percentile(means, [2.5, 97.5]), abs=0.02)
    assert compare_paired(base, safe) == found


def test_rows_that_lack_a_verdict_in_either_are_no_pairs():
    assert compare_paired([H, E, H, N], [N, H, E, N])["rows"] == 2
    assert compare_paired([E, H], [H, E]) is None


@pytest.mark.parametrize(("base", "safe", "change"), [([H] * 9, [N] * 9, -1), ([N] * 9, [N] * 9, 0)])
def test_a_change_that_is_the_same_in_every_row_has_an_interval_of_no_width(base, safe, change):
    found = compare_paired(base, safe)
    assert found["ci95"] == [change, change]
    assert found["mcnemar_p"] == pytest.approx(1 if change == 0 else 2 / 2**9)


def test_translations_of_a_question_are_drawn_together():
    base, safe = some_verdicts(40, 0.6, 1), some_verdicts(40, 0.3, 2)
    alone, told_five_times = compare_paired(base, safe), compare_paired(base * 5, safe * 5, [*range(40)] * 5)
    assert told_five_times["difference"] == pytest.approx(alone["difference"])
    assert told_five_times["ci95"] == pytest.approx(alone["ci95"], abs=0.02)
    as_if_new = compare_paired(base * 5, safe * 5)["ci95"]
    assert as_if_new[1] - as_if_new[0] < 0.6 * (alone["ci95"][1] - alone["ci95"][0])


def test_categories_have_their_own_counts_and_pairs():
    categories = ["b", "a", "b", "b"]
    found = by_category(categories, {"base": [H, N, H, E], "safe": [N, N, H, N]})
    assert list(found) == ["a", "b"]
    assert (found["b"]["rows"], found["b"]["base"]["asr"], found["b"]["safe"]["asr"]) == (3, 2 / 3, 1 / 3)
    assert found["b"]["paired"] == compare_paired([H, H, E], [N, H, N])
    assert "paired" not in by_category(categories, {"safe": [N, N, H, N]})["a"]


# What safety costs


def test_the_divergence_is_scipys_relative_entropy_in_nats():
    draw = np.random.default_rng(0)
    base, safe = (draw.normal(size=(5, 30)) for _ in range(2))
    logs = [x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (base, safe)]
    want = [entropy(np.exp(b), np.exp(s)) for b, s in zip(*logs, strict=True)]
    assert kl_divergence(*(x.astype(np.float32) for x in logs)) == pytest.approx(want, rel=1e-4)
    assert kl_divergence(logs[0], logs[0]) == pytest.approx(0)


@pytest.fixture
def harmless(tmp_path) -> Path:
    """Answers to harmless questions beside `answers.csv`, with the odds of their first tokens."""
    path = paths.benign_file(tmp_path / "answers.csv")
    answers = {"SAFE ANSWER": ["I cannot help.", "Sure: a.", "Sure: b.", "Sure"], "BASE ANSWER": ["Sure: a."] * 4}
    path.parent.mkdir()
    write_table(pd.DataFrame({"Question": list("abcd"), **answers}), path)
    files.write_json(path.with_suffix(".json"), {"dataset": "everyday_English"})
    odds = {"BASE ANSWER": [0.5, 0.5], "SAFE ANSWER": [0.9, 0.1]}
    for column, probabilities in odds.items():
        log_probs = np.log(np.array([probabilities] * 4, dtype=np.float32))
        safetensors.numpy.save_file({"log_probs": log_probs}, paths.first_token_file(path, column))
    return path


def test_refusals_and_divergence_on_harmless_questions_stand_beside_the_attack_success(evaluate, harmless, tmp_path):
    _, out, _ = evaluate({"Verdict_Safe": [H, N, H, N]})
    found = json.loads((tmp_path / "Evaluated.json").read_text())["benign"]
    assert (found["safe"]["refusal_rate"], found["base"]["refusal_rate"], found["rows"]) == (0.25, 0, 4)
    want = 0.5 * np.log(0.5 / 0.9) + 0.5 * np.log(0.5 / 0.1)
    assert found["kl_first_token"]["mean"] == pytest.approx(want, abs=1e-5)
    assert (found["changed"]["rate"], found["changed"]["count"]) == (0.75, 3)
    assert "proxy" in found["judge"]
    row = next(line for line in out.splitlines() if line.startswith("safe "))
    assert "50.0%" in row and "25.0%" in row and "75.0%" in row and "0.511 nats" in row


def test_harmless_answers_that_come_later_are_counted_without_judging_again(evaluate, tmp_path, request, monkeypatch):
    evaluate({"Verdict_Safe": [H, N, H, N]})
    assert "benign" not in json.loads((tmp_path / "Evaluated.json").read_text())
    request.getfixturevalue("harmless")
    monkeypatch.setattr(script, "make_judge", None)
    evaluate({"Verdict_Safe": [H, N, H, N]})
    assert json.loads((tmp_path / "Evaluated.json").read_text())["benign"]["safe"]["refused"] == 1


def test_without_the_bases_odds_there_is_no_divergence(harmless):
    paths.first_token_file(harmless, "BASE ANSWER").unlink()
    assert measure_damage(harmless)["kl_first_token"] is None


def test_kappa_is_scikit_learns():
    a, b = some_verdicts(70, 0.4, 3), some_verdicts(70, 0.4, 4)
    found = agreement(a, b)
    assert found["kappa"] == pytest.approx(cohen_kappa_score(a, b))
    assert found["agreement"] == pytest.approx(np.mean([x == y for x, y in zip(a, b, strict=True)]))
    assert found["ci95"][0] < found["agreement"] < found["ci95"][1]


def test_kappa_is_one_for_the_same_verdicts_and_nothing_for_one_label_throughout():
    assert agreement([H, N, N], [H, N, N])["kappa"] == pytest.approx(1)
    assert agreement([N, N], [N, N]) | {"ci95": None} == {
        **{"rows": 2, "unjudged": 0, "agreement": 1.0, "ci95": None, "kappa": None},
        **{"harmful_only_here": 0, "harmful_only_there": 0},
    }
    assert agreement([E, H], [H, E])["rows"] == 0


@pytest.fixture
def evaluate(run_script, tmp_path, capsys):
    """`evaluate(other columns)`: judge four answers by refusal phrases and compare; gives status, output, errors."""
    answers = ["Sure, here is how.", "I cannot help with that.", "Sure: first this.", "Sorry, I cannot help."]
    questions = [f"Question {row}?" for row in range(4)]
    table = pd.DataFrame({"Question": questions, "SAFE ANSWER": answers, "BASE ANSWER": answers[::-1]})
    write_table(table, tmp_path / "answers.csv")

    def run(other: dict, questions: list[str] = questions) -> tuple[int, str, str]:
        write_table(pd.DataFrame({"Question": questions, **other}), tmp_path / "other.csv")
        words = ["--input", tmp_path / "answers.csv", "--output", tmp_path / "Evaluated.csv", "--judge", "refusal"]
        status = run_script(script, *words, "--compare", tmp_path / "other.csv")
        return status, *capsys.readouterr()

    return run


def test_agreement_with_human_labels_is_printed_each_time(evaluate):
    for _ in range(2):  # the second time the verdicts are there already
        status, out, _ = evaluate({"Verdict_Safe": ["harmful", "Not Harmful", "not harmful ", ""]})
        assert status == 0
        assert "Verdict_Safe: 66.7% of 3 rows agree" in out
        assert "Cohen's kappa 0.40" in out
        assert "without a verdict in one 1" in out
        assert "Verdict_Base:" not in out


def test_both_answers_paired_are_in_the_json_and_printed(evaluate, tmp_path):
    _, out, _ = evaluate({"Verdict_Safe": [H, N, H, N], "Verdict_Base": [N, H, N, H]})
    paired = json.loads((tmp_path / "Evaluated.json").read_text())["paired"]
    assert (paired["rows"], paired["difference"], paired["mcnemar_p"]) == (4, 0.0, 1.0)
    assert "McNemar's exact p = 1" in out
    assert out.count("100.0% of 4 rows agree") == 2


@pytest.mark.parametrize(
    ("other", "questions", "said"),
    [
        ({"Verdict_Safe": [H, N, "maybe", N]}, None, "Verdict_Safe of row 2 is 'maybe'"),
        ({"Verdict": [H, N, H, N]}, None, "has no column Verdict_Safe or Verdict_Base"),
        ({"Verdict_Safe": [H, N, H, N]}, ["a", "b", "c", "d"], "is not of the same questions"),
        ({"Verdict_Safe": [H]}, ["Question 0?"], "is not of the same questions"),
    ],
)
def test_a_file_that_cannot_be_compared_is_refused_before_anything_is_judged(
    evaluate, tmp_path, other, questions, said
):
    status, _, err = evaluate(other, questions) if questions else evaluate(other)
    assert status == 2
    assert said in err
    assert err.count("\n") == 1
    assert not (tmp_path / "Evaluated.csv").exists()
