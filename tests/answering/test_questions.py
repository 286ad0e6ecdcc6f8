"""Question sets: every odd text comes through unchanged or is refused by its row, from every kind of source."""

import json
from pathlib import Path

import datasets
import pandas as pd
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from soteria.answering.questions import benign_set, dataset_slug, read_questions
from soteria.errors import UserError
from soteria.languages import LANGUAGES, find_language
from soteria.storage import paths
from soteria.storage.csv_files import write_table

ENGLISH, HINDI, CHINESE, TELUGU = map(find_language, ("en", "hi", "zh", "te"))

ODD = [
    'Why "so"?', '""""', "it's 'so'", "hot, or cold?", "hot; or cold?", "hot\tor cold?", "a\n\n\nb", "a\r\nb", "a\rb",
    "ما هذا؟", "\u202babc\u202c \u200f?", "👩‍👧‍👦 🏳️‍🌈?", "𝕬 𠜎?", "e\u0301 क़?", "é", "a\x00b", "a\x07\x1b[31mb\x7f",
    "a\u2028b\u2029c\x85d", "a\ufeffb", "\ufeffa", "\u200b?", "a\u00a0b", "NA", "N/A", "null", "nan", "None", "True",
    "007", "1e5", "-", "=1+1", "# no comment", "a\\nb\\", "{question} {0} %s", "<b>&amp;</b>", "word " * 20_000,
    "  padded  ", "\ufffd?", "\uffff?", "same", "same",
]  # fmt: skip


def write_asked(folder: Path, ending: str, questions: list) -> str:
    """Write a file of questions; gives its path."""
    path, rows = folder / f"asked.{ending}", [{"question": text} for text in questions]
    if ending == "csv":
        write_table(pd.DataFrame({"id": "0", "question": questions}), path)
    elif ending == "parquet":
        pd.DataFrame(rows).to_parquet(path)
    elif ending == "json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(ODD)
@given(st.lists(st.text(min_size=1).filter(str.strip), min_size=1, max_size=5))
def test_every_question_is_carried_through_unchanged(tmp_path, questions):
    for ending in ("csv", "json", "jsonl", "parquet"):
        assert read_questions(write_asked(tmp_path, ending, questions), ENGLISH).questions == questions


def test_a_question_that_cannot_be_asked_is_refused_by_its_row(tmp_path):
    cases = [(ending, text) for ending in ("csv", "json", "jsonl") for text in ("", " \t\u3000")]
    cases += [("json", text) for text in ("a\ud800b", "\udc00", None, 7, 1.5, True, ["a"], {"a": "b"})]
    cases += [(ending, None) for ending in ("jsonl", "parquet")]
    for ending, text in cases:
        with pytest.raises(UserError, match=r"row 1\b"):
            read_questions(write_asked(tmp_path, ending, ["a", text, "b"]), ENGLISH, strict=True)


@pytest.mark.parametrize("name", ["asked.xlsx", "asked.csv"])
def test_a_spreadsheet_is_refused_without_showing_its_bytes(tmp_path, name):
    pd.DataFrame({"question": ["hot?"]}).to_excel(tmp_path / "asked.xlsx", index=False)
    (tmp_path / "asked.xlsx").rename(tmp_path / name)
    with pytest.raises(UserError, match=r"save it as CSV") as refusal:
        read_questions(str(tmp_path / name), ENGLISH)
    assert str(refusal.value).isprintable() and "PK" not in str(refusal.value)


def test_a_row_without_a_question_is_left_out_and_named_and_other_rows_are_as_they_were(tmp_path, caplog):
    cases = [(ending, text) for ending in ("csv", "json", "jsonl") for text in ("", " \t\u3000")]
    cases += [("json", None), ("jsonl", None), ("parquet", None)]
    for ending, text in cases:
        caplog.clear()
        found = read_questions(write_asked(tmp_path, ending, ["a", text, "b"]), ENGLISH)
        assert (found.questions, found.read["left_out"]) == (["a", "b"], [1])
        assert "left out 1 of 3 rows without a question in 'question': row 1" in caplog.text
        with pytest.raises(UserError, match="no rows with a question"):
            read_questions(write_asked(tmp_path, ending, [text]), ENGLISH)
    for text in ("a\ud800b", 7, ["a"]):  # not empty, but no text either: something is wrong with the file
        with pytest.raises(UserError, match="row 1"):
            read_questions(write_asked(tmp_path, "json", ["a", text]), ENGLISH)


CSV_STYLES = [
    b"\xef\xbb\xbfquestion\nhot?\ncold?\n",
    b"question\r\nhot?\r\ncold?\r\n",
    b"question\rhot?\rcold?\r",
    b"question\nhot?\ncold?",
    b"\nquestion\n\nhot?\n\n\ncold?\n\n",
    b'"question"\n"hot?"\n"cold?"\n',
    b"id;question\n0;hot?\n1;cold?\n",
    b'\xef\xbb\xbf"id";"question"\r\n"0";"hot?"\r\n"1";"cold?"\r\n',
    b"id\tquestion\n0\thot?\n1\tcold?\n",
    b"id,Question\n0,hot?\n1,cold?\n",
    b"prompt,id\nhot?,0\ncold?,1\n",
]


def test_every_style_of_csv_gives_the_same_questions(tmp_path):
    for raw in CSV_STYLES:
        (tmp_path / "asked.csv").write_bytes(raw)
        assert read_questions(str(tmp_path / "asked.csv"), ENGLISH).questions == ["hot?", "cold?"], raw


BROKEN = [
    ("csv", b'id,question\n0,"two\nlines"\n1,cold, or not?\n', r"row 1 \(line 4\)"),
    ("csv", b"question\nhot?\na\xed\xa0\x80b\n", "row 1"),  # a lone surrogate
    ("csv", "question\nhot?\n".encode("utf-16"), "UTF-8"),
    ("csv", b"question\n", "no rows"),
    ("json", b'[{"question": "hot?"}, 5]', "row 1"),
    ("json", b'"hot?"', "row 0"),
    ("json", b"[]", "no column"),
    ("json", b'[{"question": "Was f\xfcr eine?"}]', "UTF-8"),
    ("jsonl", b'{"question": "hot?"}\n{"question": \n', "row 1"),
    ("parquet", b"no parquet", "Parquet"),
]


def test_a_broken_file_is_refused_by_its_row(tmp_path):
    for ending, raw, named in BROKEN:
        (tmp_path / f"asked.{ending}").write_bytes(raw)
        with pytest.raises(UserError, match=named) as caught:
            read_questions(str(tmp_path / f"asked.{ending}"), ENGLISH)
        assert f"asked.{ending}" in str(caught.value)


# Columns, languages and names


def test_values_that_cannot_be_read_compressed_files_and_no_name_are_refused(tmp_path, monkeypatch):
    asked = pyarrow.array([b"\xff"]).view(pyarrow.string())
    for values in ({"question": asked}, {"question": ["Why?"], "at": pyarrow.array([2**62], pyarrow.timestamp("us"))}):
        pyarrow.parquet.write_table(pyarrow.table(values), tmp_path / "asked.parquet")
        with pytest.raises(UserError, match=r"asked\.parquet has a value that cannot be read"):
            read_questions(str(tmp_path / "asked.parquet"), ENGLISH)
    (tmp_path / "asked.csv.gz").write_bytes(b"\x1f\x8b\x08")
    with pytest.raises(UserError, match="not a text file"):
        read_questions(str(tmp_path / "asked.csv.gz"), ENGLISH)
    (tmp_path / "asked.csv").write_text("question\nWhy?\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no question file ''"):
        read_questions("", ENGLISH)


def test_an_ending_in_capitals_is_an_ending(tmp_path):
    for ending in ("json", "jsonl", "parquet"):
        path = Path(write_asked(tmp_path, ending, ["Why?"]))
        upper = path.rename(path.with_suffix(path.suffix.upper()))
        assert read_questions(str(upper), ENGLISH).questions == ["Why?"]


def test_the_users_column_is_asked_or_else_one_named_for_the_language(tmp_path):
    table = pd.DataFrame({"id": ["0"], "en": ["hot?"], "zh": ["热吗？"], "hi": ["गर्म?"], "tags": ["['x']"]})
    write_table(table, tmp_path / "many.csv")
    asked = [read_questions(str(tmp_path / "many.csv"), language).questions for language in (ENGLISH, CHINESE, HINDI)]
    assert asked == [["hot?"], ["热吗？"], ["गर्म?"]]
    with pytest.raises(UserError, match="Telugu"):
        read_questions(str(tmp_path / "many.csv"), TELUGU)
    write_table(table.assign(question="cold?"), tmp_path / "many.csv")
    assert [read_questions(str(tmp_path / "many.csv"), each).questions for each in (HINDI, TELUGU)] == [
        ["गर्म?"],
        ["cold?"],
    ]
    assert read_questions(str(tmp_path / "many.csv"), ENGLISH, column="tags").questions == ["['x']"]
    with pytest.raises(UserError, match="'text'"):
        read_questions(str(tmp_path / "many.csv"), ENGLISH, column="text")


def test_rows_of_other_languages_are_skipped_by_name_or_code(tmp_path):
    for language in LANGUAGES:
        spoken = [language.code, language.name, language.code.upper(), language.name.lower(), "xx"]
        table = pd.DataFrame({"question": list("abcde"), "lang": spoken, "category": list("vwxyz")})
        write_table(table, tmp_path / "a.csv")
        found = read_questions(str(tmp_path / "a.csv"), language)
        assert (found.questions, found.categories) == (list("abcd"), list("vwxy"))
    with pytest.raises(UserError, match=rf"Telugu.*'lang'.*{LANGUAGES[-1].name}"):
        read_questions(str(tmp_path / "a.csv"), TELUGU)


def test_a_languages_own_column_goes_first_and_every_row_left_out_is_counted_aloud(tmp_path, caplog):
    write_table(pd.DataFrame({"question": ["hot?"], "hi": ["गर्म?"]}), tmp_path / "both.csv")
    assert read_questions(str(tmp_path / "both.csv"), HINDI).questions == ["गर्म?"]
    spoken = [
        "en-US",
        "en",
        "eng",
        "eng_Latn",
        "English (US)",
        "zh-Hans",
        "Chinese (Simplified)",
        "zh-Hant",
        "xx",
        "xx",
    ]
    write_table(pd.DataFrame({"question": list("abcdefghij"), "language": spoken}), tmp_path / "loc.csv")
    assert read_questions(str(tmp_path / "loc.csv"), CHINESE).questions == list("fg")
    caplog.clear()
    assert read_questions(str(tmp_path / "loc.csv"), ENGLISH).questions == list("abcde")
    assert "5 of 10 rows are in English" in caplog.text
    assert "2 × 'xx', 1 × 'zh-Hans', 1 × 'Chinese (Simplified)', 1 × 'zh-Hant'" in caplog.text
    for other in ("hi-Latn", "Hindi (Romanized)", "zh-TW", "en, hi", "English to Hindi", "", "(en)"):
        with pytest.raises(UserError, match="unknown language"):
            find_language(other)


def test_a_set_is_found_by_path_and_by_name_with_or_without_its_ending(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "DATA", tmp_path)
    (tmp_path / "prompts").mkdir()
    Path(write_asked(tmp_path, "csv", ["cold?"])).rename(tmp_path / "prompts" / "asked_Hindi.csv")
    Path(write_asked(tmp_path, "jsonl", ["hot?"])).rename(tmp_path / "prompts" / "set.jsonl")
    monkeypatch.chdir(tmp_path)
    for name in ("set", "set.jsonl", "prompts/set.jsonl", "asked_Hindi", "asked_Hindi.csv"):
        assert read_questions(name, ENGLISH).questions == ["hot?" if "set" in name else "cold?"]
        assert dataset_slug(name) == ("set" if "set" in name else "asked_Hindi")
    assert dataset_slug("lab/questions") == "lab_questions"
    (tmp_path / "benign").mkdir()
    harmless = Path(write_asked(tmp_path, "csv", ["ok?"])).rename(tmp_path / "benign" / "everyday_Hindi.csv")
    assert benign_set("everyday", HINDI) == str(harmless)
    assert benign_set(str(tmp_path / "own.csv"), HINDI) == str(tmp_path / "own.csv")


# Hub datasets, as local folders of the same layout


@pytest.fixture
def save(monkeypatch, tmp_path):
    """`save(file, rows, readme)` adds a Parquet file to a folder, and returns the folder's name."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def add(name: str, rows: dict[str, list], readme: str = "") -> str:
        path = tmp_path / "set" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pd.DataFrame(rows).to_parquet(path)
        if readme:
            (tmp_path / "set" / "README.md").write_text(f"---\nconfigs:\n{readme}---\n")
        return str(tmp_path / "set")

    return add


def test_a_dataset_with_a_column_per_language_is_read_as_multijail_is(save):
    rows = {"id": [1, 2], "en": ["hot?", "cold?"], "ar": ["حار؟", "بارد؟"], "tags": [["x"], ["y"]]}
    found = read_questions(save("data/train-00000-of-00001.parquet", rows), find_language("Arabic"))
    assert (found.name, found.questions) == ("set", rows["ar"])


def test_a_dataset_with_a_language_column_and_splits_is_read_by_split(save):
    for split, word in (("train", "hot"), ("test", "cold")):
        rows = {"question": [f"{word}?", f"{word} गर्म?"], "language": ["English", "Hindi"], "category": ["a", "b"]}
        folder = save(f"data/{split}-00000-of-00001.parquet", rows)
    found = read_questions(folder, HINDI, split="test")
    assert (found.questions, found.categories) == (["cold गर्म?"], ["b"])
    assert read_questions(folder, HINDI).questions == ["hot गर्म?"]
    with pytest.raises(UserError, match=r"'validation'.*train, test"):
        read_questions(folder, HINDI, split="validation")


def test_a_dataset_with_a_subset_or_a_split_per_language_gives_the_languages_own(save):
    configs = "".join(f"- config_name: {code}\n  data_files: {code}.parquet\n" for code in ("en", "zh"))
    for code, word in (("en", "hot?"), ("zh", "热吗？")):
        folder = save(f"{code}.parquet", {"prompt": [word]}, configs)
    assert read_questions(folder, CHINESE).questions == ["热吗？"]
    with pytest.raises(UserError, match=r"Hindi.*en, zh"):
        read_questions(folder, HINDI)
    splits = "".join(f"  - split: {name}\n    path: {name}.parquet\n" for name in ("English", "Hindi"))
    for name, word in (("English", "hot?"), ("Hindi", "गर्म?")):
        folder = save(f"{name}.parquet", {"question": [word]}, f"- config_name: default\n  data_files:\n{splits}")
    assert read_questions(folder, HINDI).questions == ["गर्म?"]


def test_a_folder_that_is_not_a_dataset_is_refused(tmp_path):
    (tmp_path / "set").mkdir()
    with pytest.raises(UserError, match="set"):
        read_questions(str(tmp_path / "set"), HINDI)
