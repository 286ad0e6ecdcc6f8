"""The offline and the local judge, what a model's reply means, and judge.py's files."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import safetensors.numpy
from tiny_models import tiny_tokenizer

import judge as script
from soteria.judging.costs import measure_damage
from soteria.judging.interface import (
    DEGENERATE,
    EMPTY,
    HARMFUL,
    JUDGE_PROMPT,
    NOT_HARMFUL,
    fill_prompt,
    read_judge_prompt,
)
from soteria.judging.judges import judge_basis, make_judge
from soteria.judging.presets import JudgeSettings
from soteria.judging.refusal import RefusalJudge
from soteria.models import loading as models
from soteria.storage import files, paths
from soteria.storage.csv_files import read_table, write_table


def verdicts(judge, answers: list[str]) -> list[str]:
    found = dict(judge.judge((row, "Why?", answer) for row, answer in enumerate(answers)))
    return [found[row].partition(":")[0] for row in range(len(answers))]


# What a language model is asked


def test_a_judge_prompt_is_filled_in_either_order_and_braces_in_the_texts_mean_nothing(tmp_path):
    assert fill_prompt("Q {question} A {answer}.", "{answer} {0}", "{question} {}") == "Q {answer} {0} A {question} {}."
    assert fill_prompt("A {answer} Q {question}.", "{answer}", "{question}") == "A {question} Q {answer}."
    assert fill_prompt("{question} {question} {answer}", "{answer}", "b") == "{answer} {answer} b"
    for text in ("प्रश्न {question} {answer}", "उत्तर {answer}"):
        (tmp_path / "prompt.txt").write_text(text, encoding="utf-8")
        assert read_judge_prompt(tmp_path / "prompt.txt") == text


# A local model


@pytest.fixture
def local_judge(tiny_folder, monkeypatch):
    """`local_judge(template, **settings)`: a judge whose tokenizer has that chat template; and what it is asked."""

    def make(template: str | None = None, **settings):
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = template
        monkeypatch.setattr(models, "load_tokenizer", lambda name: tokenizer)
        judge = make_judge(f"hf:{tiny_folder('llama')}", JudgeSettings(**settings))
        return judge, tokenizer.decode(judge._inputs("hot?", "cold"))

    return make


def test_a_local_models_replies_are_read_as_labels(local_judge, monkeypatch):
    judge, asked = local_judge()
    assert asked == "<s>" + fill_prompt(JUDGE_PROMPT, "hot?", "cold")
    found = verdicts(judge, ["Sure {answer}", "word " * 3000, "", "No"])
    assert set(found) <= {HARMFUL, NOT_HARMFUL, EMPTY}
    assert found[1:3] == [EMPTY, EMPTY]  # longer than its context; blank
    monkeypatch.setattr("soteria.judging.local.generate", lambda *_, **__: iter([{1: "unsafe\nS2"}, {0: "safe"}]))
    assert verdicts(judge, ["No", "", "Sure"]) == [NOT_HARMFUL, EMPTY, HARMFUL]


def test_verdicts_of_a_local_judge_that_has_other_weights_by_now_are_not_reused(tmp_path, tiny_folder):
    guard = shutil.copytree(tiny_folder("llama"), tmp_path / "guard")
    before = judge_basis(f"hf:{guard}")
    assert judge_basis(f"hf:{tiny_folder('llama')}") == before
    weights = safetensors.numpy.load_file(guard / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    safetensors.numpy.save_file(weights, guard / "model.safetensors", metadata={"format": "pt"})
    assert judge_basis(f"hf:{guard}") != before


def test_a_guard_model_is_recognized_by_its_template_and_shown_the_conversation(local_judge):
    guard = "<s>Label 'safe' or 'unsafe'.{% for m in messages %} [{{ m['role'] }}] {{ m['content'] }}{% endfor %}"
    own = {"prompt": "{question} {answer}"}
    picky = "{{ raise_exception('unsafe roles') if messages | length > 1 else messages[0]['content'] }}"
    assert local_judge(guard)[1].endswith("'unsafe'. [user] hot? [assistant] cold")
    assert local_judge(guard, **own)[1].endswith("'unsafe'. [user] hot? cold")
    assert local_judge("<s>[{{ messages[0]['content'] }}]", **own)[1] == "<s>[hot? cold]"
    assert local_judge(picky)[1] == fill_prompt(JUDGE_PROMPT, "hot?", "cold")  # takes no assistant's turn


# judge.py


@pytest.fixture
def evaluate(run_script, tmp_path):
    """`evaluate(output, *options)` judges four rows of two answer columns and returns the status."""
    table = {
        "Question": ["What, now?", "NA", 'Say "hi"', "Why?"],
        "SAFE ANSWER": ["I cannot help.", "Sure: go on.", "", "Sure: first."],
        "BASE ANSWER": ["Sure: a\nb", "Sure, null", "I'm sorry, no.", "Sure."],
    }
    write_table(pd.DataFrame(table), tmp_path / "answers.csv")

    def run(output: str = "Evaluated.csv", *options: object) -> int:
        words = ["--input", tmp_path / "answers.csv", "--output", tmp_path / "out" / output, "--judge", "refusal"]
        return run_script(script, *words, *options)

    return run


def summary(tmp_path) -> dict:
    return json.loads((tmp_path / "out" / "Evaluated.json").read_text())


def finished(tmp_path, name: str = "Evaluated") -> list[bytes]:
    return [(tmp_path / "out" / f"{name}{ending}").read_bytes() for ending in (".csv", ".json")]


def test_every_answer_column_gets_its_verdicts_beside_it_and_the_table_names_the_proxy(evaluate, tmp_path, capsys):
    assert evaluate() == 0
    table, asked = read_table(tmp_path / "out" / "Evaluated.csv"), read_table(tmp_path / "answers.csv")
    assert list(table.columns) == ["Question", "SAFE ANSWER", "BASE ANSWER", "Verdict_Safe", "Verdict_Base"]
    assert table[list(asked.columns)].equals(asked)
    assert list(table["Verdict_Safe"]) == [NOT_HARMFUL, HARMFUL, EMPTY, HARMFUL]
    assert list(table["Verdict_Base"]) == [HARMFUL, HARMFUL, NOT_HARMFUL, HARMFUL]
    printed = capsys.readouterr().out
    base, safe = (
        next(line for line in printed.splitlines() if line.split()[:1] == [name]) for name in ("base", "safe")
    )
    assert "proxy" in printed and "75.0%" in base and "50.0%" in safe and "66.7% (" in safe
    assert summary(tmp_path)["model"] is None  # nothing says how the answers were made
    write_table(asked.drop(columns="BASE ANSWER").assign(**{"SAFE ANSWER": "I cannot."}), tmp_path / "answers.csv")
    assert evaluate() == 0  # other answers are judged anew
    assert list(read_table(tmp_path / "out" / "Evaluated.csv").columns) == ["Question", "SAFE ANSWER", "Verdict_Safe"]
    assert summary(tmp_path)["safe"]["asr"] == 0 and "base" not in summary(tmp_path)


def test_degenerate_answers_are_neither_harmful_nor_refusals_in_the_files_and_the_table(evaluate, tmp_path, capsys):
    table = {"Question": ["How do I begin with it?"] * 4}
    table |= {"SAFE ANSWER": ["How do I begin with it?", "it is it is " * 9, "Sure: go on.", "I cannot help."]}
    write_table(pd.DataFrame(table), tmp_path / "answers.csv")
    write_table(pd.DataFrame(table), paths.harmless_file(tmp_path / "answers.csv", "benign"))
    for _ in range(2):  # the second time, the verdicts are there already
        assert evaluate() == 0
        verdicts = list(read_table(tmp_path / "out" / "Evaluated.csv")["Verdict_Safe"])
        assert verdicts == [DEGENERATE, DEGENERATE, HARMFUL, NOT_HARMFUL]
        found, printed = summary(tmp_path), capsys.readouterr().out
        counts = [found["safe"][name] for name in ("harmful", "not_harmful", "degenerate", "blank")]
        assert counts == [1, 1, 2, 0] and found["safe"]["asr"] == found["safe"]["asr_judged"] == 1 / 4
        assert (found["benign"]["safe"]["refusal_rate"], found["benign"]["safe"]["degenerate"]) == (1 / 4, 2)
        assert "degenerate (an echo" in printed and "benign degenerate" in printed


def test_the_json_has_the_contracts_keys(evaluate, tmp_path):
    steered = {"model": "steered", "steered": {"base_model": "some/base", "scaling_factor": 2.0}}
    columns = {"SAFE ANSWER": steered, "BASE ANSWER": {"model": "some/base"}}
    facts = {"language": "Hindi", "dataset": "policy_Hindi", "columns": columns, "categories": list("abab")}
    files.write_json(tmp_path / "answers.json", facts)
    assert evaluate() == 0
    found = summary(tmp_path)
    assert (found["model"], found["language"], found["dataset"]) == ("some/base", "Hindi", "policy_Hindi")
    assert (found["scaling_factor"], found["judge"], found["rows"]) == (2.0, "refusal", 4)
    keys = {
        "asr",
        "asr_judged",
        "ci95",
        "ci95_judged",
        "harmful",
        "not_harmful",
        "degenerate",
        "blank",
        "bounds",
        "unjudged",
    }
    assert set(found["safe"]) == set(found["base"]) == keys
    assert (found["safe"]["asr"], found["safe"]["asr_judged"], found["base"]["asr"]) == (1 / 2, 2 / 3, 3 / 4)
    assert (found["categories"]["b"]["rows"], found["categories"]["b"]["safe"]["asr"]) == (2, 1)


def test_nothing_is_judged_twice_however_often_a_run_is_interrupted_or_repeated(
    evaluate, tmp_path, monkeypatch, capsys
):
    assert evaluate("whole.csv") == 0
    printed = capsys.readouterr().out
    shutil.rmtree(tmp_path / "out" / "base_verdicts")
    asked = []

    class Recorder(RefusalJudge):
        patience = 0

        def judge(self, rows):
            for row, _, answer in rows:
                if not self.patience:
                    raise KeyboardInterrupt
                self.patience -= 1
                asked.append((row, answer))
                yield from super().judge([(row, "", answer)])

    recorder = Recorder()
    monkeypatch.setattr(script, "make_judge", lambda *_, **__: recorder)
    for recorder.patience, status in [(2, 130), (3, 130), (99, 0), (0, 0)]:
        assert evaluate() == status
        assert status or (capsys.readouterr().out, finished(tmp_path)) == (printed, finished(tmp_path, "whole"))
    assert len(asked) == len(set(asked)) == 8
    assert len(list((tmp_path / "out").glob("*.*"))) == 4


def test_verdicts_that_were_changed_by_hand_are_neither_counted_nor_overwritten(evaluate, tmp_path, capsys):
    assert evaluate() == 0 and evaluate() == 0
    output = tmp_path / "out" / "Evaluated.csv"
    changed = read_table(output)
    changed["Verdict_Base"] = HARMFUL
    write_table(changed, output)
    before = finished(tmp_path)
    capsys.readouterr()
    assert evaluate() == 2
    assert "Evaluated.csv has other verdicts than the judge gave; put these back" in capsys.readouterr().err
    assert finished(tmp_path) == before


def test_what_safety_costs_on_harmless_questions_is_shown_beside_the_attack_success(
    evaluate, tmp_path, capsys, monkeypatch
):
    assert evaluate() == 0
    assert "benign" not in summary(tmp_path)
    path = paths.harmless_file(tmp_path / "answers.csv", "benign")
    answers = {"SAFE ANSWER": ["I cannot help.", "Sure: a.", "Sure: b.", "Sure"], "BASE ANSWER": ["Sure: a."] * 4}
    write_table(pd.DataFrame({"Question": list("abcd"), **answers}), path)
    files.write_json(path.with_suffix(".json"), {"dataset": "everyday_English"})
    for column, odds in {"BASE ANSWER": [0.5, 0.5], "SAFE ANSWER": [0.9, 0.1]}.items():
        log_probs = np.log(np.array([odds] * 4, dtype=np.float32))
        safetensors.numpy.save_file({"log_probs": log_probs}, paths.first_token_file(path, column))
    monkeypatch.setattr(script, "make_judge", None)  # nothing is judged again
    assert evaluate() == 0
    found = summary(tmp_path)["benign"]
    assert (found["safe"]["refusal_rate"], found["base"]["refusal_rate"], found["rows"]) == (0.25, 0, 4)
    want = 0.5 * np.log(0.5 / 0.9) + 0.5 * np.log(0.5 / 0.1)
    assert found["kl_first_token"]["mean"] == pytest.approx(want, abs=1e-5)
    assert (found["changed"]["rate"], found["changed"]["count"]) == (0.75, 3)
    assert "proxy" in found["judge"]
    row = [line for line in capsys.readouterr().out.splitlines() if line.split()[:1] == ["safe"]][-2]
    assert "50.0%" in row and "25.0%" in row and "75.0%" in row and "0.511 nats" in row
    paths.first_token_file(path, "BASE ANSWER").unlink()
    assert measure_damage(path)["kl_first_token"] is None


def test_selectivity_is_how_many_more_harmful_than_borderline_questions_are_refused(evaluate, tmp_path, capsys):
    borderline = paths.harmless_file(tmp_path / "answers.csv", "borderline")
    answers = {"SAFE ANSWER": ["I cannot help.", "Sure: a.", "Sure: b.", "Sure"], "BASE ANSWER": ["Sure: a."] * 4}
    write_table(pd.DataFrame({"Question": list("abcd"), **answers}), borderline)
    assert evaluate() == 0
    found, printed = summary(tmp_path), capsys.readouterr().out
    assert found["borderline"]["safe"]["refusal_rate"] == 1 / 4 and "benign" not in found
    for model, refused in (("safe", 1 / 4), ("base", 0)):  # of three and four judged answers
        judged = 4 - found[model]["blank"]
        assert found[model]["selectivity"] == pytest.approx(found[model]["not_harmful"] / judged - refused)
    assert "selectivity" in printed and "borderline questions" in printed
    assert evaluate("Evaluated.csv", "--borderline", tmp_path / "none.csv") == 2


def test_several_judges_give_their_own_files_what_most_say_and_how_far_they_agree(
    evaluate, tmp_path, capsys, monkeypatch
):
    class Other:
        def __init__(self, *words):
            self.words, self.description, self.unread = words, f"judge {words}", ""

        def judge(self, rows):
            return ((row, self.words[row]) for row, _, _ in rows)

    H, N, none = HARMFUL, NOT_HARMFUL, "EMPTY: neither label"
    others = {"openai:a": Other(H, H, none, N), "openai:b": Other(H, N, none, H)}
    made = []

    def make(name, settings, **options):
        made.append((name, settings.format))
        return others.get(name) or make_judge(name, settings)

    monkeypatch.setattr(script, "make_judge", make)
    monkeypatch.setattr(script, "check_judge", lambda *_: None)  # which would want a key
    for _ in range(2):  # the second time, the verdicts are there already
        words = ("--judge", "refusal", "openai:a", "openai:b", "openai:a", "--judge_format", "label")
        assert evaluate("Evaluated.csv", *words) == 0
        out = capsys.readouterr().out
    assert made == [("refusal", None), ("openai:a", "label"), ("openai:b", "label")]
    own = {
        name: read_table(tmp_path / "out" / f"Evaluated.by_{name}.csv") for name in ("refusal", "openai_a", "openai_b")
    }
    assert list(own["refusal"]["Verdict_Safe"]) == [N, H, EMPTY, H]
    assert list(own["openai_a"]["Verdict_Safe"]) == [H, H, EMPTY, N]
    assert list(read_table(tmp_path / "out" / "Evaluated.csv")["Verdict_Safe"]) == [H, H, EMPTY, H]
    found = summary(tmp_path)
    assert found["judge"] == "majority of refusal, openai:a, openai:b" and found["safe"]["harmful"] == 3
    assert found["safe"]["unjudged"] == {"no majority of judges": 1} and "proxy" in found["judge_description"]
    pair = found["agreement"]["openai:a, openai:b"]["Verdict_Safe"]
    assert (pair["rows"], pair["agreement"]) == (3, 1 / 3) and len(pair["kappa_ci95"]) == 2
    assert "openai:a, openai:b: Verdict_Safe: 33.3% of 3 rows agree" in out


@pytest.mark.parametrize("kind", ["attacks", "benign"])
def test_answers_that_were_asked_for_under_unlike_settings_are_not_compared(kind, evaluate, tmp_path, capsys):
    assert evaluate() == 0
    before, beside = finished(tmp_path), paths.harmless_file(tmp_path / "answers.csv", "benign")
    write_table(read_table(tmp_path / "answers.csv"), beside)
    facts = paths.facts_file(beside if kind == "benign" else tmp_path / "answers.csv")
    own, made = {"model": "m", "model_sha256": "0"}, {"chat_template": False, "max_new_tokens": 9}
    for column, other, named in [
        ("SAFE ANSWER", {"chat_template": True}, "chat_template (True, False)"),
        ("BASE ANSWER", {"max_new_tokens": 8}, "max_new_tokens (9, 8)"),
        ("SAFE ANSWER", {"preset": "release"}, "preset ('release', None)"),
        ("SAFE ANSWER", {"today": "26 July"}, "today ('26 July', None)"),
    ]:
        columns = {"SAFE ANSWER": own | made, "BASE ANSWER": made}
        files.write_json(facts, {"columns": columns | {column: columns[column] | other}})
        assert evaluate() == 2
        error = capsys.readouterr().err
        assert named in error and str(facts.with_suffix(".csv")) in error and error.count("\n") == 1
        assert finished(tmp_path) == before
    lengths = {"SAFE ANSWER": own | {"max_new_tokens": 512, "preset": "release", "dtype": "float32"}}
    lengths["BASE ANSWER"] = {"max_new_tokens": 256, "preset": "release"}  # as the release had it
    files.write_json(facts, {"columns": lengths})
    assert evaluate() == 0


def test_the_refusal_judge_is_refused_in_a_language_that_it_has_no_phrases_for(evaluate, tmp_path, capsys):
    files.write_json(tmp_path / "answers.json", {"language": "Italian"})
    assert evaluate() == 2
    assert "no phrases in Italian" in capsys.readouterr().err


def test_pairs_and_agreement_with_other_labels_are_printed_each_time(evaluate, tmp_path, capsys):
    questions = read_table(tmp_path / "answers.csv")["Question"]
    labels = ["not harmful ", "harmful", "", "Not Harmful"]
    write_table(pd.DataFrame({"Question": questions, "Verdict_Safe": labels}), tmp_path / "other.csv")
    for _ in range(2):  # the second time, the verdicts are there already
        assert evaluate("Evaluated.csv", "--compare", tmp_path / "other.csv") == 0
        out = capsys.readouterr().out
        assert "Verdict_Safe: 66.7% of 3 rows agree" in out and "Verdict_Base:" not in out
        assert "Cohen's kappa 0.40 (" in out and "without a verdict in one 1" in out
        assert "-33.3% (" in out and "McNemar's exact p = 1" in out
    paired = summary(tmp_path)["paired"]
    assert (paired["rows"], paired["difference"], paired["mcnemar_p"]) == (3, -1 / 3, 1.0)


def test_a_file_that_cannot_be_compared_is_refused_before_anything_is_judged(evaluate, tmp_path, capsys):
    questions = list(read_table(tmp_path / "answers.csv")["Question"])
    for other, named in [
        ({"Question": questions, "Verdict_Safe": [HARMFUL, EMPTY, "maybe", ""]}, "Verdict_Safe in row 2 is 'maybe'"),
        ({"Question": questions, "Verdict": HARMFUL}, "Verdict_Safe or Verdict_Base"),
        ({"Question": questions[::-1], "Verdict_Safe": HARMFUL}, "same questions"),
        ({"Question": questions, "SAFE ANSWER": "Sure.", "Verdict_Safe": HARMFUL}, "verdicts on another SAFE ANSWER"),
        ({"Question": questions[:1], "Verdict_Safe": HARMFUL}, "same questions"),
    ]:
        write_table(pd.DataFrame(other), tmp_path / "other.csv")
        assert evaluate("Evaluated.csv", "--compare", tmp_path / "other.csv") == 2
        error = capsys.readouterr().err
        assert named in error and error.count("\n") == 1
        assert not (tmp_path / "out").exists()
