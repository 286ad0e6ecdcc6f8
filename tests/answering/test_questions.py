"""Question sets: every odd text comes through unchanged or is refused by its row, from every kind of source."""

import json
from pathlib import Path

import datasets
import pandas as pd
import pytest

from soteria.answering.questions import benign_set, dataset_slug, read_questions
from soteria.errors import UserError
from soteria.languages import LANGUAGES, find_language
from soteria.storage import paths
from soteria.storage.csv_files import CsvFile, read_table, write_table

ENGLISH, HINDI, CHINESE = map(find_language, ("en", "hi", "zh"))

CARRIED = {
    "double quotes": 'Why "so"?',
    "only quotes": '""""',
    "single quotes": "it's 'so'",
    "comma": "hot, or cold?",
    "semicolon": "hot; or cold?",
    "tab": "hot\tor cold?",
    "newline": "two\nlines",
    "windows newline": "two\r\nlines",
    "lone carriage return": "two\rlines",
    "blank lines within": "a\n\n\nb",
    "right to left": "ما هذا؟",
    "marks of direction": "\u202babc\u202c \u200f?",
    "emoji": "👩‍👧‍👦 🏳️‍🌈?",
    "outside the basic plane": "𝕬 𠜎?",
    "combining marks": "e\u0301 क़?",
    "composed and decomposed apart": "é",
    "NUL": "a\x00b",
    "other control characters": "a\x07\x1b[31mb\x7f",
    "line separator": "a\u2028b\u2029c\x85d",
    "byte order mark within": "a\ufeffb",
    "byte order mark first": "\ufeffa",
    "zero width space": "\u200b?",
    "no-break space inside": "a\u00a0b",
    "NA": "NA",
    "N/A": "N/A",
    "null": "null",
    "nan": "nan",
    "None": "None",
    "true": "True",
    "number": "007",
    "float": "1e5",
    "minus": "-",
    "formula": "=1+1",
    "comment": "# no comment",
    "backslash": "a\\nb\\",
    "braces": "{question} {0} %s",
    "markup": "<b>&amp;</b>",
    "100,000 characters": "word " * 20_000,
    "spaces around": "  padded  ",
    "replacement character": "\ufffd?",
    "noncharacter": "\uffff?",
}
REFUSED = {"empty": "", "blank": " \t\u3000", "lone surrogate": "a\ud800b", "lone low surrogate": "\udc00"}
OTHERS = ["before", "after", "after"]  # the same row twice


def set_with(text: str) -> list[str]:
    return [OTHERS[0], text, *OTHERS[1:]]


def write_csv(folder: Path, questions: list[str]) -> Path:
    write_table(pd.DataFrame({"id": [*"0123"], "question": questions}), folder / "asked.csv")
    return folder / "asked.csv"


def write_json(folder: Path, questions: list[str], **options) -> Path:
    (folder / "asked.json").write_text(json.dumps([{"question": text} for text in questions], **options))
    return folder / "asked.json"


def write_jsonl(folder: Path, questions: list[str], **options) -> Path:
    lines = [json.dumps({"question": text}, **options) for text in questions]
    (folder / "asked.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "asked.jsonl"


def write_parquet(folder: Path, questions: list[str]) -> Path:
    pd.DataFrame({"question": questions}).to_parquet(folder / "asked.parquet")
    return folder / "asked.parquet"


WRITERS = [write_csv, write_json, write_jsonl, write_parquet]
each_writer = pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)


@pytest.mark.parametrize("what", CARRIED)
@each_writer
def test_an_odd_question_is_carried_through_unchanged(write, what, tmp_path):
    path = write(tmp_path, set_with(CARRIED[what]))
    assert read_questions(str(path), ENGLISH).questions == set_with(CARRIED[what])


@pytest.mark.parametrize("what", CARRIED)
def test_an_odd_answer_is_written_and_read_unchanged(what, tmp_path):
    table = pd.DataFrame({"Question": set_with(CARRIED[what]), "SAFE ANSWER": [CARRIED[what]] * 4})
    write_table(table, tmp_path / "answers.csv")
    assert read_table(tmp_path / "answers.csv").to_dict("list") == table.to_dict("list")


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.parametrize("write", [write_csv, write_json, write_jsonl])
def test_a_question_that_cannot_be_asked_is_refused_by_its_row(write, what, tmp_path):
    if write is write_csv and "surrogate" in what:
        write_csv(tmp_path, set_with("HERE"))
        text = (tmp_path / "asked.csv").read_bytes().replace(b"HERE", REFUSED[what].encode("utf-8", "surrogatepass"))
        (tmp_path / "asked.csv").write_bytes(text)
        path = tmp_path / "asked.csv"
    else:
        path = write(tmp_path, set_with(REFUSED[what]))
    with pytest.raises(UserError, match=r"row 1\b"):
        read_questions(str(path), ENGLISH)


@pytest.mark.parametrize("value", [None, 7, 1.5, True, ["a"], {"a": "b"}])
@pytest.mark.parametrize("write", [write_json, write_jsonl])
def test_a_question_that_is_no_text_is_refused_by_its_row(write, value, tmp_path):
    with pytest.raises(UserError, match=r"row 1 is no text"):
        read_questions(str(write(tmp_path, set_with(value))), ENGLISH)


def test_a_missing_value_in_parquet_is_refused_by_its_row(tmp_path):
    with pytest.raises(UserError, match=r"row 1 is no text"):
        read_questions(str(write_parquet(tmp_path, set_with(None))), ENGLISH)


RAW = {
    "byte order mark": b"\xef\xbb\xbfquestion\nhot?\ncold?\n",
    "windows line ends": b"question\r\nhot?\r\ncold?\r\n",
    "old mac line ends": b"question\rhot?\rcold?\r",
    "no newline at the end": b"question\nhot?\ncold?",
    "blank lines": b"\nquestion\n\nhot?\n\n\ncold?\n\n",
    "quotes throughout": b'"question"\n"hot?"\n"cold?"\n',
    "semicolons": b"id;question\n0;hot?\n1;cold?\n",
    "semicolons and quotes": b'\xef\xbb\xbf"id";"question"\r\n"0";"hot?"\r\n"1";"cold?"\r\n',
    "tabs": b"id\tquestion\n0\thot?\n1\tcold?\n",
    "capital": b"id,Question\n0,hot?\n1,cold?\n",
    "prompt": b"prompt,id\nhot?,0\ncold?,1\n",
}


@pytest.mark.parametrize("what", RAW)
def test_every_way_of_writing_a_csv_gives_the_same_questions(what, tmp_path):
    (tmp_path / "asked.csv").write_bytes(RAW[what])
    assert read_questions(str(tmp_path / "asked.csv"), ENGLISH).questions == ["hot?", "cold?"]


BROKEN = {
    "a quote that never ends": (b'question\nhot?\n"cold?\nold?\n', "row 1"),
    "text behind a quote": (b'question\nhot?\n"cold" or not?\n', "row 1"),
    "too many fields": (b"id,question\n0,hot?\n1,cold, or not?\n", "row 1"),
    "too few fields": (b"id,question\n0,hot?\n1\n", "row 1"),
    "latin-1": (b"question\nhot?\nWas f\xfcr eine?\n", "row 1"),
    "latin-1 in the header": (b"fr\xe5ga,question\n0,hot?\n", "no UTF-8"),
    "utf-16": ("question\nhot?\n".encode("utf-16"), "UTF-8"),
    "two columns of one name": (b"question,question\nhot?,cold?\n", "two columns 'question'"),
    "nothing": (b"", "is empty"),
    "a header alone": (b"question\n", "no rows"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_csv_is_refused_by_its_row(what, tmp_path):
    raw, said = BROKEN[what]
    (tmp_path / "asked.csv").write_bytes(raw)
    with pytest.raises(UserError, match=said):
        read_questions(str(tmp_path / "asked.csv"), ENGLISH)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.json", '[{"question": "hot?"}, 5]', "row 1"),
        ("a.json", '"hot?"', "row 0"),
        ("a.json", "[]", "no column"),
        ("a.jsonl", '{"question": "hot?"}\n{"question": \n', "row 1"),
        ("a.parquet", "no parquet", "is no Parquet file"),
    ],
)
def test_a_broken_file_of_another_kind_is_refused(name, text, said, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=said):
        read_questions(str(tmp_path / name), ENGLISH)


def test_a_row_number_counts_the_rows_behind_the_header_and_the_line_is_named_too(tmp_path):
    (tmp_path / "asked.csv").write_text('question\n"two\nlines"\nhot, or cold?\n')
    with pytest.raises(UserError, match=r"row 1 \(line 4\) has 2 fields"):
        read_questions(str(tmp_path / "asked.csv"), ENGLISH)


# Columns and languages


def test_a_column_named_for_the_language_is_asked_where_no_question_column_is(tmp_path):
    table = pd.DataFrame({"id": ["0"], "en": ["hot?"], "zh": ["热吗？"], "hi": ["गर्म?"], "tags": ["['x']"]})
    write_table(table, tmp_path / "many.csv")
    asked = [read_questions(str(tmp_path / "many.csv"), language).questions for language in (ENGLISH, CHINESE, HINDI)]
    assert asked == [["hot?"], ["热吗？"], ["गर्म?"]]
    with pytest.raises(UserError, match="none named for Bengali"):
        read_questions(str(tmp_path / "many.csv"), find_language("bn"))


def test_a_question_column_that_is_named_goes_before_all_others(tmp_path):
    write_table(pd.DataFrame({"question": ["hot?"], "text": ["cold?"]}), tmp_path / "a.csv")
    assert read_questions(str(tmp_path / "a.csv"), ENGLISH, column="text").questions == ["cold?"]
    with pytest.raises(UserError, match="no column 'words'"):
        read_questions(str(tmp_path / "a.csv"), ENGLISH, column="words")


@pytest.mark.parametrize("spelling", ["Hindi", "hindi", "hi", "HI"])
def test_rows_of_other_languages_are_left_out(spelling, tmp_path):
    table = pd.DataFrame({"question": ["hot?", "गर्म?", "ठंडा?"], "language": ["en", spelling, spelling]})
    write_table(table.assign(category=["a", "b", "c"]), tmp_path / "a.csv")
    found = read_questions(str(tmp_path / "a.csv"), HINDI)
    assert (found.questions, found.categories) == (["गर्म?", "ठंडा?"], ["b", "c"])
    with pytest.raises(UserError, match=r"no rows in Telugu; its column 'language' holds .*en"):
        read_questions(str(tmp_path / "a.csv"), find_language("te"))


@pytest.mark.parametrize("language", LANGUAGES, ids=lambda language: language.name)
def test_every_language_is_found_by_name_and_code_in_a_language_column(language, tmp_path):
    write_table(pd.DataFrame({"question": ["a", "b"], "lang": [language.code, language.name]}), tmp_path / "a.csv")
    assert read_questions(str(tmp_path / "a.csv"), language).questions == ["a", "b"]


@pytest.mark.parametrize("name", ["set", "set.jsonl"])
def test_a_set_is_found_by_name_with_or_without_its_ending(name, tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "DATA", tmp_path)
    (tmp_path / "prompts").mkdir()
    write_jsonl(tmp_path / "prompts", ["hot?"]).rename(tmp_path / "prompts" / "set.jsonl")
    assert read_questions(name, ENGLISH).questions == ["hot?"]
    assert dataset_slug(name) == "set"


def test_harmless_questions_are_found_by_name_and_language(tmp_path):
    assert Path(benign_set("everyday", HINDI)).name == "everyday_Hindi.csv"
    assert benign_set(str(tmp_path / "own.csv"), HINDI) == str(tmp_path / "own.csv")


# Hub datasets, as local folders of their shape


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def save(folder: Path, name: str, rows: dict[str, list]) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_parquet(folder / name)


def test_a_dataset_with_a_column_a_language_is_read_as_multijail_is(tmp_path):
    rows = {
        "id": [1, 2],
        "source": ["a", "b"],
        "en": ["hot?", "cold?"],
        "ar": ["حار؟", "بارد؟"],
        "tags": [["x"], ["y"]],
    }
    save(tmp_path / "MultiJail", "data/train-00000-of-00001.parquet", rows)
    found = read_questions(str(tmp_path / "MultiJail"), find_language("Arabic"))
    assert (found.name, found.questions) == ("MultiJail", rows["ar"])


def test_a_dataset_with_a_language_column_and_splits_is_read_by_split(tmp_path):
    for split, word in (("train", "hot"), ("test", "cold")):
        rows = {"question": [f"{word}?", f"{word} गर्म?"], "language": ["English", "Hindi"], "category": ["a", "b"]}
        save(tmp_path / "set", f"data/{split}-00000-of-00001.parquet", rows)
    found = read_questions(str(tmp_path / "set"), HINDI, split="test")
    assert (found.questions, found.categories) == (["cold गर्म?"], ["b"])
    assert read_questions(str(tmp_path / "set"), HINDI).questions == ["hot गर्म?"]
    with pytest.raises(UserError, match="no split 'validation', but train, test"):
        read_questions(str(tmp_path / "set"), HINDI, split="validation")


def test_a_dataset_with_a_subset_a_language_gives_the_languages_own(tmp_path):
    for code, word in (("en", "hot?"), ("zh", "热吗？")):
        save(tmp_path / "set", f"{code}.parquet", {"prompt": [word]})
    configs = "".join(f"- config_name: {code}\n  data_files: {code}.parquet\n" for code in ("en", "zh"))
    (tmp_path / "set" / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    assert read_questions(str(tmp_path / "set"), CHINESE).questions == ["热吗？"]
    with pytest.raises(UserError, match="no subset for Hindi, but en, zh"):
        read_questions(str(tmp_path / "set"), HINDI)


def test_a_dataset_with_a_split_a_language_gives_the_languages_own(tmp_path):
    for name, word in (("English", "hot?"), ("Hindi", "गर्म?")):
        save(tmp_path / "set", f"{name}.parquet", {"question": [word]})
    data = "".join(f"  - split: {name}\n    path: {name}.parquet\n" for name in ("English", "Hindi"))
    (tmp_path / "set" / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files:\n{data}---\n")
    assert read_questions(str(tmp_path / "set"), HINDI).questions == ["गर्म?"]


def test_a_folder_that_is_no_dataset_is_refused_in_one_sentence(tmp_path):
    (tmp_path / "set").mkdir()
    with pytest.raises(UserError, match="cannot be read as a dataset"):
        read_questions(str(tmp_path / "set"), HINDI)


def test_a_split_of_a_single_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="leave out the split 'test'"):
        read_questions(str(write_csv(tmp_path, set_with("a"))), ENGLISH, split="test")


def test_a_csv_is_read_one_row_at_a_time(tmp_path):
    path = write_csv(tmp_path, set_with("a"))
    rows = CsvFile.open(path).rows()
    assert next(rows) == ["0", "before"]
    path.write_text("question\n")  # what was read does not change any more
    assert len(list(CsvFile.open(path).rows())) == 0
