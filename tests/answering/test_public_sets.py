"""Public question sets: each shape, with its own column, split, subset and file names, is read right or refused.

The rows are placeholders. docs/answering-and-judging.md has the table of these sets.
"""

import json
from pathlib import Path

import datasets
import pandas as pd
import pytest

from soteria.answering.questions import read_questions
from soteria.errors import UserError
from soteria.languages import LANGUAGES, find_language
from soteria.storage.csv_files import write_table

HOT = {
    "en": "hot?", "es": "¿calor?", "de": "heiß?", "fr": "chaud ?", "zh": "热吗？", "ar": "حار؟", "bg": "горещо?",
    "th": "ร้อนไหม?", "hi": "गर्म?", "bn": "গরম?", "ta": "சூடா?", "te": "వేడా?", "sw": "moto?", "it": "caldo?",
    "vi": "nóng?", "ko": "더워?", "jv": "panas?", "ja": "暑い？", "ru": "жарко?", "sr": "вруће?", "tl": "mainit?",
    "hu": "meleg?", "ms": "panas?", "cs": "horko?",
}  # fmt: skip


@pytest.fixture
def make(monkeypatch, tmp_path):
    """`make(files, card)` writes a folder like a hub dataset's, and returns its path; rows are a column -> values."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def write(files: dict[str, dict[str, list]], card: str = "") -> str:
        for name, rows in files.items():
            path, table = tmp_path / "set" / name, pd.DataFrame(rows)
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".parquet":
                table.to_parquet(path)
            elif path.suffix == ".csv":
                write_table(table, path)
            else:
                lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in table.to_dict("records")]
                path.write_text("".join(lines), encoding="utf-8")
        if card:
            (tmp_path / "set" / "README.md").write_text(f"---\n{card}---\n", encoding="utf-8")
        return str(tmp_path / "set")

    return write


def splits(names: dict[str, str]) -> str:
    """A card's part: the default subset with these splits."""
    listed = "".join(f"  - split: {split}\n    path: {path}\n" for split, path in names.items())
    return f"configs:\n- config_name: default\n  data_files:\n{listed}"


def read(folder: str, code: str, **options) -> list[str]:
    return read_questions(folder, find_language(code), **options).questions


def read_codes(folder: str, **options) -> set[str]:
    """The languages that a set is read in, each with its own question; it is refused by name in all others."""
    found = set()
    for language in LANGUAGES:
        code = language.code.split("-")[0]
        try:
            assert set(read(folder, code, **options)) == {HOT[code]}, language.name
            found.add(code)
        except UserError as error:
            assert language.name in str(error)
    return found


# MultiJail

MULTIJAIL = ("en", "zh", "it", "vi", "ar", "ko", "th", "bn", "sw", "jv")


def test_multijail_by_its_authors_has_a_column_per_language(make):
    rows = {"id": [1], "source": ["x"], **{code: [HOT[code]] for code in MULTIJAIL}, "tags": ["['a', 'b']"]}
    folder = make({"MultiJail.csv": rows})
    for place in (folder, f"{folder}/MultiJail.csv"):
        assert read_codes(place) == set(MULTIJAIL)
    assert read_questions(folder, find_language("it")).categories == ["a, b"]


def test_multijail_by_walledai_has_a_split_per_language(make):
    files = {
        f"data/{code}-00000-of-00001.parquet": {"prompt": [HOT[code]], "harms": [["a", "b"]], "source": ["x"]}
        for code in sorted(MULTIJAIL)
    }
    folder = make(files, splits({code: f"data/{code}-*" for code in sorted(MULTIJAIL)}))
    assert read_codes(folder) == set(MULTIJAIL)
    with pytest.raises(UserError, match=r"no split for Hindi; its splits are ar, bn, en, it, jv"):
        read(folder, "hi")
    found = read_questions(folder, find_language("jv"))
    assert (found.categories, found.read) == (["a, b"], {"split": "jv", "column": "prompt"})


def test_multijail_of_toxicity_prompts_has_a_language_column(make):
    rows = {"language": MULTIJAIL, "text": [HOT[code] for code in MULTIJAIL], "tags": ["['a']"] * len(MULTIJAIL)}
    assert read_codes(make({"data/test-00000-of-00001.parquet": rows})) == set(MULTIJAIL)


# Aya red-teaming

AYA = {
    "arabic": ("arb", "ar"), "english": ("eng", "en"), "filipino": ("tgl", "tl"), "french": ("fra", "fr"),
    "hindi": ("hin", "hi"), "russian": ("rus", "ru"), "serbian": ("srp", "sr"), "spanish": ("spa", "es"),
}  # fmt: skip
AYA_READ = {"ar", "en", "fr", "hi", "ru", "es"}


def aya_rows(split: str) -> dict[str, list]:
    return {
        "prompt": [HOT[AYA[split][1]]],
        "harm_category": ['["Bullying & Harassment"]'],
        "language": [split.capitalize()],
        "global_or_local": ["global"],
    }


def test_aya_by_its_authors_has_a_file_per_language(make):
    files = {f"aya_{code}.jsonl": aya_rows(split) for split, (code, _) in AYA.items()}
    folder = make(files, splits({split: f"aya_{code}.jsonl" for split, (code, _) in AYA.items()}))
    assert read_codes(folder) == AYA_READ
    assert read_codes(f"{folder}/aya_arb.jsonl") == {"ar"}
    assert read_questions(folder, find_language("ar")).categories == ["Bullying & Harassment"]


def test_aya_by_walledai_has_a_split_per_language(make):
    files = {f"data/{split}-00000-of-00001.parquet": aya_rows(split) for split in AYA}
    folder = make(files, splits({split: f"data/{split}-*" for split in AYA}))
    assert read_codes(folder) == AYA_READ
    with pytest.raises(UserError, match="no split for Telugu"):
        read(folder, "te")


# XSafety, PolyGuard, M-ALERT, LinguaSafe


def test_xsafety_of_toxicity_prompts_has_codes_of_its_own(make):
    codes = ("ar", "bn", "de", "en", "fr", "hi", "ja", "ru", "sp", "zh")
    rows = {
        "text": [HOT["es" if code == "sp" else code] for code in codes] * 2,
        "language": [*codes] * 2,
        "category": ["Insult"] * 10 + ["commonsense"] * 10,
    }
    folder = make({"data/test-00000-of-00001.parquet": rows})
    assert read_codes(folder) == {*codes, "es"} - {"sp"}
    assert read(folder, "es") == [HOT["es"]] * 2 and read(folder, "es", where=["category!=commonsense"]) == [HOT["es"]]


def test_polyguard_prompts_are_refused_unless_harmful_or_harmless_ones_are_chosen(make):
    rows = {
        "prompt": ["hot?", "cold?", "warm?", "kalt?"],
        "response": ["yes"] * 4,
        "prompt_harm_label": ["harmful", "unharmful", None, "unharmful"],
        "subcategory": ["a", "benign", "b", "c"],
        "id": [1, 2, 3, 1],
        "language": ["English", "English", "English", "German"],
        "prompt_label": ["unsafe", "safe", "unsafe", "safe"],
    }
    folder = make({"data/test-00000-of-00001.parquet": rows}, "language:\n- ar\n- en\n- de\n")
    with pytest.raises(UserError, match=r"mixes harmful and harmless.*'prompt_harm_label'.*prompt_harm_label=harmful"):
        read(folder, "en")
    assert read(folder, "en", where=["prompt_harm_label=harmful"]) == ["hot?"]
    assert read(folder, "en", where=["prompt_harm_label=harmful", "prompt_harm_label="]) == ["hot?", "warm?"]
    assert read(folder, "en", where=["prompt_label=unsafe", "subcategory!=a"]) == ["warm?"]
    assert read(folder, "de") == ["kalt?"]


def test_m_alert_has_a_column_per_language(make):
    codes = ("en", "de", "es", "fr", "it")
    folder = make(
        {"data/train-00000-of-00001.parquet": {"id": [1], "category": ["x"], **{code: [HOT[code]] for code in codes}}},
        "language:\n- es\n- de\n- en\n- fr\n- it\n",
    )
    assert read_codes(folder) == set(codes)


def test_the_harmless_level_of_linguasafe_is_left_out_or_read_by_itself(make):
    codes = ("en", "zh", "ar", "ru", "sr", "th", "ko", "vi", "cs", "hu", "bn", "ms")
    rows = {
        "id": range(24),
        "prompt": [HOT[code] for code in codes] * 2,
        "lang": [*codes] * 2,
        "type": ["x"] * 24,
        "subtype": ["y"] * 24,
        "level": [0] * 12 + [3] * 12,
        "source": ["ND"] * 24,
    }
    folder = make({"data/train-00000-of-00001.parquet": rows})
    with pytest.raises(UserError, match=r"mixes .*'level' \(1 × '0', 1 × '3'\)"):
        read(folder, "vi")
    for where in (["level!=0"], ["level=3"], ["level=0"]):
        assert read(folder, "vi", where=where) == [HOT["vi"]]
    assert read_codes(folder, where=["level!=0"]) == {"en", "zh", "ar", "ru", "th", "ko", "vi", "bn"}
    with pytest.raises(UserError, match="no row with level=4"):
        read(folder, "vi", where=["level=3", "level=4"])


# English only: harmful beside harmless

ENGLISH = "language:\n- en\n"


def test_jbb_behaviors_are_read_by_subset_and_split(make):
    columns = {"Index": [0], "Target": ["Yes"], "Behavior": ["b"], "Category": ["Fraud/Deception"], "Source": ["x"]}
    card = (
        "configs:\n- config_name: behaviors\n  data_files:\n  - split: harmful\n    path: data/harmful-behaviors.csv\n"
        "  - split: benign\n    path: data/benign-behaviors.csv\n"
        "- config_name: judge_comparison\n  data_files:\n  - split: test\n    path: data/judge-comparison.csv\n"
    )
    files = {
        "data/harmful-behaviors.csv": columns | {"Goal": ["hot?"]},
        "data/benign-behaviors.csv": columns | {"Goal": ["cold?"]},
        "data/judge-comparison.csv": {"goal": ["hot?"], "response": ["yes"]},
    }
    folder = make(files, ENGLISH + card)
    with pytest.raises(UserError, match="no subset for English; its subsets are behaviors, judge_comparison"):
        read(folder, "en")
    with pytest.raises(UserError, match="its splits are harmful, benign"):
        read(folder, "en", subset="behaviors")
    assert read(folder, "en", subset="behaviors", split="harmful") == ["hot?"]
    assert read(folder, "en", subset="behaviors", split="benign", column="Goal") == ["cold?"]
    assert read_questions(folder, find_language("en"), subset="behaviors", split="harmful").categories == [
        "Fraud/Deception"
    ]
    with pytest.raises(UserError, match="no questions in Hindi: by its card it is in en"):
        read(folder, "hi", subset="behaviors", split="harmful")


XSTEST = {
    "prompt": ["hot?", "cold?"],
    "focus": ["heat", "heat"],
    "type": ["homonyms", "contrast_homonyms"],
    "note": ["", ""],
}


@pytest.mark.parametrize(
    ("name", "rows", "where"),
    [
        ("data/train-00000-of-00001.parquet", XSTEST | {"label": ["safe", "unsafe"]}, "label=unsafe"),  # walledai
        ("xstest_prompts.csv", {"id": [1, 2]} | XSTEST | {"label": ["safe", "unsafe"]}, "label=unsafe"),  # Paul
        ("data/prompts-00000-of-00001.parquet", {"id": [1, 2]} | XSTEST, "type=contrast_homonyms"),  # natolambert
    ],
)
def test_xstest_is_refused_unless_one_half_is_chosen(make, name, rows, where):
    folder = make({name: rows}, ENGLISH)
    with pytest.raises(UserError, match=rf"mixes .*such as {where}"):
        read(folder, "en")
    assert read(folder, "en", where=[where]) == ["cold?"]
    assert read(folder, "en", where=[where.replace("=", "!=")]) == ["hot?"]


def test_or_bench_is_read_by_subset(make):
    names = ("or-bench-80k", "or-bench-hard-1k", "or-bench-toxic")
    card = "".join(f"- config_name: {name}\n  data_files:\n  - split: train\n    path: {name}.csv\n" for name in names)
    files = {f"{name}.csv": {"prompt": [name], "category": ["deception"]} for name in names}
    folder = make(files, f"{ENGLISH}configs:\n{card}")
    with pytest.raises(UserError, match=", ".join(names)):
        read(folder, "en")
    for name in names:
        assert read(folder, "en", subset=name) == [name] == read(f"{folder}/{name}.csv", "en")


# What nothing but the file's name or its letters tells


def test_a_file_of_another_language_is_warned_of_by_its_name_and_its_letters(tmp_path, caplog):
    write_table(pd.DataFrame({"question": ["hot?", "cold?", "गर्म?"]}), tmp_path / "asked_English.csv")
    path = str(tmp_path / "asked_English.csv")
    read_questions(path, find_language("en"))
    assert not caplog.text
    read_questions(path, find_language("hi"))
    assert "asked in Hindi, but named for English" in caplog.text
    assert "2 of 3 questions have no letter of the script of Hindi" in caplog.text


def test_a_condition_that_cannot_be_met_is_refused(tmp_path):
    write_table(pd.DataFrame({"question": ["a", "b"], "kind": ["x", "y"]}), tmp_path / "a.csv")
    path = str(tmp_path / "a.csv")
    for where, named in (("kind", "column=value"), ("sort=x", "id|question, kind"), ("kind=z", "1 × 'x', 1 × 'y'")):
        with pytest.raises(UserError, match=named):
            read(path, "en", where=[where])
    with pytest.raises(UserError, match="no rows with a question"):
        read(path, "en", where=["kind!=x", "kind!=y"])
    assert Path(path).exists() and read(path, "en", where=["KIND=x".lower()]) == ["a"]
