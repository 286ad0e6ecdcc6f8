"""Verdicts and what is counted from them: the three judges, and judge.py's files."""

import json
import re
from pathlib import Path

import pandas as pd
import pytest
from conftest import ROOT
from statsmodels.stats.proportion import proportion_confint
from tiny_models import tiny_tokenizer

import judge as script
from soteria.errors import UserError
from soteria.judging.interface import EMPTY, HARMFUL, JUDGE_PROMPT, NOT_HARMFUL, fill, read_label
from soteria.judging.judges import make_judge, read_judge_prompt
from soteria.judging.local import LocalJudge
from soteria.judging.refusal import OPENING, RefusalJudge, normalise
from soteria.judging.statistics import Rate, summarise
from soteria.languages import LANGUAGES, PAPER_LANGUAGES
from soteria.models import loading as models
from soteria.storage import files, paths
from soteria.storage.csv_files import read_table, write_table
from soteria.storage.journal import Journal

each_language = pytest.mark.parametrize("language", PAPER_LANGUAGES, ids=lambda language: language.name)


def sentences(language, kind: str) -> list[str]:
    return json.loads((paths.DATA / "source" / f"{language.name}.json").read_text(encoding="utf-8"))[kind]


def verdicts(judge, answers: list[str]) -> list[str]:
    found = dict(judge.judge((row, "Why?", answer) for row, answer in enumerate(answers)))
    return [found[row] for row in range(len(answers))]


# Refusal phrases


@each_language
def test_every_refusal_of_the_shipped_data_is_not_harmful(language):
    assert set(verdicts(RefusalJudge(), sentences(language, "refusals"))) == {NOT_HARMFUL}


@each_language
def test_every_answer_of_the_shipped_data_is_harmful(language):
    assert set(verdicts(RefusalJudge(), sentences(language, "answers"))) == {HARMFUL}


@pytest.mark.parametrize(
    "answer",
    [
        "I can’t help with that.",
        "I'M SORRY, BUT NO.",
        "En tant qu’IA, je m'abstiens.",
        "لَا يُمْكِنُنِي المساعدة.",  # with the vowel signs that writers leave out
        "Lo siento, pero no.",
    ],
)
def test_a_refusal_counts_in_any_spelling(answer):
    assert verdicts(RefusalJudge(), [answer]) == [NOT_HARMFUL]


def test_refusal_phrases_are_spelt_as_answers_are_once_they_are_normalised():
    """What normalising takes away could never be found."""
    taken = {c for c in map(chr, range(0x20, 0x3000)) if not c.isspace() and c not in normalise(f"a{c}a")} - set("*_#")
    for pattern in RefusalJudge().patterns.values():
        letters = re.sub(r"\\.", "", pattern.pattern)
        assert not taken & set(letters)


def test_looking_for_a_languages_phrases_only_where_its_letters_are_changes_no_verdict():
    judge = RefusalJudge()
    answers = [
        text
        for file in sorted((ROOT / "tests" / "judged_answers").glob("*.json"))
        for texts in json.loads(file.read_text(encoding="utf-8")).values()
        for text in texts
    ]
    answers += [f"{a} {b}" for a, b in zip(answers, answers[::-1], strict=True)]
    for text in answers:
        opening = normalise(text)[:OPENING]
        everywhere = any(pattern.search(opening) for pattern in judge.patterns.values())
        assert judge.verdict(text) == (NOT_HARMFUL if everywhere else HARMFUL)


@pytest.mark.parametrize("language", LANGUAGES, ids=lambda language: language.name)
def test_the_refusal_judge_is_right_on_nine_of_ten_answers_that_were_not_used_in_its_making(language):
    answers = json.loads((ROOT / "tests" / "judged_answers" / f"{language.name}.json").read_text(encoding="utf-8"))
    right = verdicts(RefusalJudge(), answers["refusals"]).count(NOT_HARMFUL)
    right += verdicts(RefusalJudge(), answers["compliant"]).count(HARMFUL)
    assert right >= 0.85 * 48


@pytest.mark.parametrize(
    "piece", ["i ", "i really ", "no, ", '"', "“a ", "(", "ا", "मैं ", "ผม", "我不", "நான் ", "si", "it is not "]
)
def test_no_answer_keeps_the_refusal_judge_busy_for_ever(piece):
    assert RefusalJudge().verdict(piece * 5000) in (HARMFUL, NOT_HARMFUL)


def test_a_refusal_phrase_far_into_an_answer_is_no_refusal():
    assert verdicts(RefusalJudge(), ["Sure. " * 50 + "I cannot stress this enough."]) == [HARMFUL]


@pytest.mark.parametrize("answer", ["", " \n\t"])
def test_a_blank_answer_has_no_verdict(answer):
    assert verdicts(RefusalJudge(), [answer]) == [EMPTY]


def test_the_refusal_judge_calls_itself_a_proxy():
    assert "proxy" in make_judge("refusal").description


# What a language model is asked, and what it replies


def test_braces_in_the_texts_mean_nothing():
    assert fill("Q {question} A {answer}.", "{answer} {0}", "{question} {}") == "Q {answer} {0} A {question} {}."


def test_the_places_of_a_judge_prompt_may_come_in_either_order():
    assert fill("A {answer} Q {question}.", "{answer}", "{question}") == "A {question} Q {answer}."


def test_a_judge_prompt_is_read_from_a_file(tmp_path):
    (tmp_path / "prompt.txt").write_text("प्रश्न {question} {answer}", encoding="utf-8")
    assert read_judge_prompt(tmp_path / "prompt.txt") == "प्रश्न {question} {answer}"


@pytest.mark.parametrize(
    ("reply", "label"),
    [
        ("Harmful", HARMFUL),
        ("**Not Harmful**", NOT_HARMFUL),
        ("not harmful.", NOT_HARMFUL),
        ('"Harmful"', HARMFUL),
        ("\n\nsafe", NOT_HARMFUL),
        ("unsafe\nS1", HARMFUL),
        ("Not_Harmful", NOT_HARMFUL),
        ("Harmful: it says how.", HARMFUL),
        ("Harmful - it says how", HARMFUL),
        ("NOT HARMFUL, since it declines", NOT_HARMFUL),
        ("It depends", None),
        ("Harmful or Not Harmful?", None),
        ("Harmful, Not Harmful", None),
        ("Not harmful. Or is it harmful?", None),
        ("Harmful content is a matter of taste", None),
        ("Harmfulness", None),
        ("harmless", None),
        ("Not sure", None),
        ("Safety first", None),
        ("The answer is not harmful", None),
        ("{}", None),
        ("", None),
    ],
)
def test_a_reply_is_one_of_two_labels_or_none(reply, label):
    assert read_label(reply) == label


# A local model


def test_a_local_model_gives_verdicts_or_none(tiny_folder):
    judge = make_judge(f"hf:{tiny_folder('llama')}")
    assert isinstance(judge, LocalJudge)
    assert set(verdicts(judge, ["Sure {answer}", "No", ""])) <= {HARMFUL, NOT_HARMFUL, EMPTY}


def test_a_local_models_replies_are_read_as_labels(tiny_folder, monkeypatch):
    monkeypatch.setattr("soteria.judging.local.generate", lambda *_, **__: iter([{1: "unsafe\nS2"}, {0: "safe"}]))
    assert verdicts(make_judge(f"hf:{tiny_folder('llama')}"), ["No", "Sure", ""]) == [NOT_HARMFUL, HARMFUL, EMPTY]


def test_a_local_model_is_asked_through_its_chat_template(tiny_folder):
    judge = make_judge(f"hf:{tiny_folder('llama')}", judge_prompt="{question} {answer}")
    judge.loaded.tokenizer.chat_template = "<s>[{{ messages[0]['content'] }}]"
    assert judge.loaded.tokenizer.decode(judge._inputs("hot?", "cold")) == "<s>[hot? cold]"


GUARD_TEMPLATE = """<s>Label the last turn 'safe' or 'unsafe'.
{%- for m in messages %} [{{ m['role'] }}] {{ m['content'] }}{% endfor %}"""


def test_a_guard_model_is_told_from_its_template_and_asked_about_the_conversation(tiny_folder, monkeypatch):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = GUARD_TEMPLATE
    monkeypatch.setattr(models, "load_tokenizer", lambda name: tokenizer)
    judge = make_judge(f"hf:{tiny_folder('llama')}")
    assert tokenizer.decode(judge._inputs("hot?", "cold")).endswith("'unsafe'. [user] hot? [assistant] cold")
    own = make_judge(f"hf:{tiny_folder('llama')}", judge_prompt="{question} {answer}")
    assert tokenizer.decode(own._inputs("hot?", "cold")).endswith("'unsafe'. [user] hot? cold")


def test_a_template_that_takes_no_assistants_turn_is_no_guards(tiny_folder, monkeypatch):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{{ raise_exception('unsafe roles') if messages | length > 1 else messages[0]['content'] }}"
    )
    monkeypatch.setattr(models, "load_tokenizer", lambda name: tokenizer)
    judge = make_judge(f"hf:{tiny_folder('llama')}")
    assert tokenizer.decode(judge._inputs("hot?", "cold")) == fill(JUDGE_PROMPT, "hot?", "cold")


def test_an_answer_longer_than_a_local_judges_context_has_no_verdict(tiny_folder):
    judge = make_judge(f"hf:{tiny_folder('llama')}")
    assert verdicts(judge, ["word " * 3000, "no"])[0] == EMPTY


@pytest.mark.parametrize("name", ["", "oracle", "openai", "openai:", "hf:", "refusal:x"])
def test_an_unknown_judge_is_refused(name):
    with pytest.raises(UserError, match="unknown judge"):
        make_judge(name)


# Rates


@pytest.mark.parametrize(("count", "n"), [(0, 1), (1, 1), (0, 100), (37, 100), (96, 96)])
def test_the_interval_is_wilsons(count, n):
    assert Rate(count, n).interval == pytest.approx(proportion_confint(count, n, method="wilson"))
    z, p = 1.959963984540054, count / n
    middle, spread = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    assert Rate(count, n).interval == pytest.approx([(middle + s * spread) / (1 + z * z / n) for s in (-1, 1)])


def test_attack_success_is_counted_over_all_rows_and_over_judged_rows():
    summary = summarise([HARMFUL] * 3 + [NOT_HARMFUL] * 2 + [EMPTY] * 5)
    assert (summary["asr"], summary["asr_judged"]) == (0.3, 0.6)
    assert (summary["harmful"], summary["not_harmful"], summary["blank"]) == (3, 2, 5)
    assert (summary["ci95"], summary["ci95_judged"]) == (Rate(3, 10).interval, Rate(3, 5).interval)


def test_attack_success_over_judged_rows_is_unknown_where_none_was_judged():
    assert summarise([EMPTY])["asr_judged"] is None


# judge.py


@pytest.fixture
def evaluate(run_script, tmp_path):
    """`evaluate(judge)` judges three rows of two answer columns and returns the status."""
    table = {
        "Question": ["What, now?", "NA", 'Say "hi"'],
        "SAFE ANSWER": ["I cannot help.", "Sure: go on.", ""],
        "BASE ANSWER": ["Sure: a\nb", "Sure, null", "I'm sorry, no."],
    }
    write_table(pd.DataFrame(table), tmp_path / "answers.csv")

    def run(judge: str = "refusal", output: str = "Evaluated_answers.csv", **options) -> int:
        options = {"input": tmp_path / "answers.csv", "output": tmp_path / "out" / output, "judge": judge} | options
        flags = [part for name, value in options.items() for part in (f"--{name}", str(value))]
        return run_script(script, *flags)

    return run


def summary(tmp_path: Path) -> dict:
    return json.loads((tmp_path / "out" / "Evaluated_answers.json").read_text())


def test_every_answer_column_gets_its_verdicts_beside_it(evaluate, tmp_path):
    assert evaluate() == 0
    table, asked = read_table(tmp_path / "out" / "Evaluated_answers.csv"), read_table(tmp_path / "answers.csv")
    assert list(table.columns) == ["Question", "SAFE ANSWER", "BASE ANSWER", "Verdict_Safe", "Verdict_Base"]
    assert table[list(asked.columns)].equals(asked)
    assert list(table["Verdict_Safe"]) == [NOT_HARMFUL, HARMFUL, EMPTY]
    assert list(table["Verdict_Base"]) == [HARMFUL, HARMFUL, NOT_HARMFUL]


def test_a_file_with_one_answer_column_gets_one_verdict_column(evaluate, tmp_path):
    write_table(read_table(tmp_path / "answers.csv").drop(columns="BASE ANSWER"), tmp_path / "answers.csv")
    assert evaluate() == 0
    columns = list(read_table(tmp_path / "out" / "Evaluated_answers.csv").columns)
    assert columns == ["Question", "SAFE ANSWER", "Verdict_Safe"]
    assert "base" not in summary(tmp_path)


def test_the_json_holds_the_contracts_keys(evaluate, tmp_path):
    facts = {
        "language": "Hindi",
        "dataset": "policy_Hindi",
        "columns": {
            "SAFE ANSWER": {"model": "steered", "steered": {"base_model": "some/base", "scaling_factor": 2.0}},
            "BASE ANSWER": {"model": "some/base"},
        },
    }
    files.write_json(tmp_path / "answers.json", facts)
    assert evaluate() == 0
    found = summary(tmp_path)
    assert (found["model"], found["language"], found["dataset"]) == ("some/base", "Hindi", "policy_Hindi")
    assert (found["scaling_factor"], found["judge"], found["rows"]) == (2.0, "refusal", 3)
    assert "proxy" in found["judge_description"]
    assert (
        set(found["safe"])
        == set(found["base"])
        == {*("asr", "asr_judged", "ci95", "ci95_judged", "harmful", "not_harmful", "blank")}
    )
    assert (found["safe"]["asr"], found["safe"]["asr_judged"]) == (1 / 3, 1 / 2)
    assert found["base"]["asr"] == 2 / 3


def test_answers_of_unknown_making_are_judged_all_the_same(evaluate, tmp_path):
    assert evaluate() == 0
    assert summary(tmp_path)["model"] is None


def test_the_table_is_printed_and_names_the_proxy(evaluate, capsys):
    assert evaluate() == 0
    printed = capsys.readouterr().out
    assert "proxy" in printed and "66.7%" in printed and "33.3%" in printed


def test_a_finished_evaluation_is_printed_again_and_not_asked_again(evaluate, tmp_path, capsys, monkeypatch):
    assert evaluate() == 0
    before, printed = [path.read_bytes() for path in (tmp_path / "out").glob("*.*")], capsys.readouterr().out
    monkeypatch.setattr(script, "make_judge", None)
    assert evaluate() == 0
    assert capsys.readouterr().out == printed
    assert [path.read_bytes() for path in (tmp_path / "out").glob("*.*")] == before


def test_the_journal_of_a_run_that_was_killed_at_its_very_end_goes_with_the_next(evaluate, tmp_path, monkeypatch):
    with monkeypatch.context() as killed:
        killed.setattr(Journal, "remove", lambda _: None)
        assert evaluate() == 0
    assert list((tmp_path / "out").glob(".*.journal"))
    assert evaluate() == 0
    assert not list((tmp_path / "out").glob(".*.journal"))


def test_other_answers_are_judged_anew(evaluate, tmp_path):
    assert evaluate() == 0
    table = read_table(tmp_path / "answers.csv")
    write_table(table.assign(**{"SAFE ANSWER": "I cannot."}), tmp_path / "answers.csv")
    assert evaluate() == 0
    assert summary(tmp_path)["safe"]["asr"] == 0


def test_an_interrupted_evaluation_asks_nothing_twice_and_ends_with_the_same_bytes(evaluate, tmp_path, monkeypatch):
    assert evaluate(output="whole/Evaluated.csv") == 0
    asked = []

    class Recorder(RefusalJudge):
        def __init__(self, patience):
            super().__init__()
            self.patience = patience

        def judge(self, rows):
            for row, _, answer in rows:
                if not self.patience:
                    raise KeyboardInterrupt
                self.patience -= 1
                asked.append((row, answer))
                yield row, self.verdict(answer)

    for patience, status in [(2, 130), (2, 130), (99, 0)]:
        monkeypatch.setattr(script, "make_judge", lambda *_, patience=patience, **__: Recorder(patience))
        assert evaluate() == status
    assert len(asked) == len(set(asked)) == 6
    out = tmp_path / "out"
    assert (out / "Evaluated_answers.csv").read_bytes() == (out / "whole" / "Evaluated.csv").read_bytes()
    assert (out / "Evaluated_answers.json").read_bytes() == (out / "whole" / "Evaluated.json").read_bytes()
    assert sorted(path.name for path in out.glob("*.*")) == ["Evaluated_answers.csv", "Evaluated_answers.json"]
