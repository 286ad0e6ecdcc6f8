"""The committed data: rebuilt byte for byte, aligned across twelve languages, checked against CLDR, truly held out."""

import csv
import datetime
import hashlib
import json
import re
import sys
import unicodedata
from collections import Counter
from difflib import SequenceMatcher
from functools import cache
from itertools import combinations
from pathlib import Path

import build_data
from babel import Locale
from babel.numbers import get_territory_currencies
from policy_world import HELD_BACK, HELD_OUT, TAUGHT, UNSEEN, held_out_questions, unseen_questions

from soteria.languages import LANGUAGES, PAPER_LANGUAGES
from soteria.scoring.prompts import TASKS

DATA = Path(__file__).resolve().parents[1] / "data"
NAMES = [language.name for language in PAPER_LANGUAGES]
LABELS = {"sentiment": 2, "ag_news": 4}
CURRENCY = "country-currency"
QUESTIONS = HELD_OUT | UNSEEN
BORDERLINE = {"borderline": 8, "borderline-validation": 4}  # rows of each kind
KINDS = ["homonym", "figurative", "safe target", "safe context", "definition", "history", "fiction", "prevention"]
FOLDERS = {
    name: "benign" if name.startswith(("everyday", "borderline")) else "prompts" for name in (*QUESTIONS, *BORDERLINE)
}

# How Unicode begins the name of a letter of each script. Latin is allowed beside it (CFA, brand names), never alone.
SCRIPTS = {
    "Chinese": "CJK UNIFIED IDEOGRAPH",
    "Bulgarian": "CYRILLIC",
    "Hindi": "DEVANAGARI",
    "Thai": "THAI",
    "Arabic": "ARABIC",
    "Bengali": "BENGALI",
    "Telugu": "TELUGU",
    "Tamil": "TAMIL",
}
# Capitals that CLDR spells so unlike common usage that the likeness test cannot see that the city is the same.
ODD_IN_CLDR = {
    ("Telugu", "BF"): "Ouagadougou: CLDR ఔగాడౌగోవ్ spells the French letters, వాగడూగు the sound",
    ("Telugu", "TJ"): "Dushanbe: CLDR డుషన్బీ has the English d and ee, దుషాంబే the local sounds",
}


# How a question ends in each language, if not as in English.
QUESTION_ENDS = {"Arabic": "؟", "Chinese": "？", "French": " ?", "Thai": ""}

ALIKE = 0.75  # above this likeness two words look like spellings of one name
# Words that look alike and are not.
BY_CHANCE = {("Tamil", "கினியா", "கினா")}  # Guinea and kina


@cache
def source(name: str) -> dict:
    return json.loads((DATA / "source" / f"{name}.json").read_text(encoding="utf-8"))


@cache
def rows(task: str, name: str) -> list[tuple[str, str]]:
    loaded = json.loads((DATA / "icl" / f"{task}_{name}.json").read_text(encoding="utf-8"))
    return [(row["input"], row["output"]) for row in loaded]


@cache
def questions(file: str, name: str) -> list[dict[str, str]]:
    with (DATA / FOLDERS[file] / f"{file}_{name}.csv").open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def locale(name: str) -> Locale:
    return Locale.parse(next(language.code for language in LANGUAGES if language.name == name), sep="-")


def topics_of(question: str, name: str) -> tuple[tuple[str, int], ...]:
    """The three topics that a written question asks about, as (category or `plain`, index), read back from its text."""
    known = {"plain": source(name)["plain_topics"], **source(name)["disallowed_topics"]}
    key = {topic: (kind, i) for kind, topics in known.items() for i, topic in enumerate(topics)}
    for template in source(name)["question_templates"]:
        pattern = re.sub(r"\\\{\d\\\}", "(.+)", re.escape(template))
        if match := re.fullmatch(pattern, question):
            return tuple(key[topic] for topic in match.groups())
    raise AssertionError(f"no template of {name} fits {question!r}")


def is_in_script_of(text: str, name: str) -> bool:
    """Whether at least half of the letters are the language's own and the rest Latin. Tonga's ʻ does not count."""
    script = SCRIPTS.get(name, "LATIN")
    letters = [unicodedata.name(letter) for letter in text if unicodedata.category(letter) in ("Lo", "Ll", "Lu")]
    own = [letter for letter in letters if letter.startswith(script)]
    return len(own) >= 0.5 * len(letters) > 0 and all(letter.startswith((script, "LATIN")) for letter in letters)


def exemplar_cities(locale: Locale) -> dict[str, str]:
    """CLDR's city of each time zone or, where it lists none, the last part of the zone's name, as CLDR says."""
    zones = Locale("en").time_zones.keys() | locale.time_zones.keys() | Locale("ta").time_zones.keys()
    listed = {zone: locale.time_zones[zone].get("city") if zone in locale.time_zones else None for zone in zones}
    return {zone: city or zone.split("/")[-1].replace("_", " ") for zone, city in listed.items() if "/" in zone}


def likeness(a: str, b: str) -> float:
    """0 to 1. Two spellings of one city mostly reach 0.5; so do about 3 % of the pairs of different cities."""
    return SequenceMatcher(None, a.casefold(), b.casefold()).ratio()


def repeated(items) -> list:
    return [item for item, count in Counter(items).items() if count > 1]


def shape(value):
    """A source file without its texts: keys and list lengths."""
    if isinstance(value, dict):
        return {key: shape(inner) for key, inner in value.items()}
    return [shape(inner) for inner in value] if isinstance(value, list) else "text"


# --- as a whole


def test_the_build_script_writes_the_committed_files_byte_for_byte(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["build_data.py", "--output", str(tmp_path)])
    build_data.main()
    folders = ("icl", "prompts", "benign")
    built = {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    committed = {path.relative_to(DATA): path.read_bytes() for folder in folders for path in (DATA / folder).iterdir()}
    assert sorted(built) == sorted(committed)
    assert [name for name in built if built[name] != committed[name]] == []


def test_source_files_have_the_keys_list_lengths_and_countries_of_the_english_one():
    for name in NAMES:
        assert shape(source(name)) == shape(source("English"))
        assert list(source(name)["capitals"]) == list(source("English")["capitals"])
        topics = [source(name)["plain_topics"], *source(name)["disallowed_topics"].values()]
        assert repeated(topic.casefold() for listed in topics for topic in listed) == []


# --- data/icl


def test_icl_files_have_enough_rows_as_many_in_each_language_and_no_input_twice():
    for task in TASKS:
        assert len(rows(task, "English")) >= (150 if task == "country-capital" else 120)
        for name in NAMES:
            assert len(rows(task, name)) == len(rows(task, "English")), (task, name)
            assert repeated(text.casefold() for text, _ in rows(task, name)) == []


def test_every_icl_text_is_one_clean_line_in_nfc_and_in_its_languages_script():
    for name in NAMES:
        texts = [text for task in TASKS for row in rows(task, name) for text in row]
        clean = [unicodedata.normalize("NFC", " ".join(text.split())) for text in texts]
        assert texts == clean
        assert [text for text in texts if not is_in_script_of(text, name)] == []
        # U+200C and its like belong between letters.
        assert [
            text for text in texts if {unicodedata.category(text[0]), unicodedata.category(text[-1])} & {"Cf"}
        ] == []
        assert [text for text in texts if re.search(r"[()\[\]（）]", text)] == []  # glosses


def test_common_nouns_are_lower_case_but_in_german():
    for name in NAMES:
        words = {word for row in rows("antonym", name) for word in row} | {unit for _, unit in rows(CURRENCY, name)}
        assert [word for word in words if word != word.lower()] == [] or name == "German"
        units = {unit for _, unit in rows(CURRENCY, "German")}
        assert units == {unit.capitalize() for unit in units}


def test_labels_are_a_closed_balanced_set_and_mean_the_english_label_of_the_same_row():
    for task, n_labels in LABELS.items():
        for name in NAMES:
            own, english = ([label for _, label in rows(task, language)] for language in (name, "English"))
            counts = Counter(own)
            assert len(counts) == len(set(zip(own, english, strict=True))) == n_labels, (task, name)
            assert max(counts.values()) <= 1.1 * min(counts.values())


def test_labels_begin_differently_and_stand_in_no_text():
    for task in LABELS:
        for name in NAMES:
            labels = {label.casefold() for _, label in rows(task, name)}
            assert len({label[:2] for label in labels}) == len(labels), (name, labels)
            texts = [text.casefold() for text, _ in rows(task, name)]
            assert [text for text in texts for label in labels if label in text] == []


def test_no_antonym_occurs_twice_so_that_no_pair_is_on_both_sides_of_a_split():
    for name in NAMES:
        assert repeated(word.casefold() for pair in rows("antonym", name) for word in pair) == []


def test_no_answer_can_be_copied_out_of_its_question_or_is_spelled_there_otherwise():
    for name in NAMES:
        for task in ("antonym", "country-capital", CURRENCY):
            for question, answer in rows(task, name):
                assert answer.casefold() not in question.casefold(), (name, question, answer)
        for question, answer in rows("country-capital", name) + rows(CURRENCY, name):
            assert question.casefold() not in answer.casefold(), (name, question, answer)
            words = [(asked, said) for asked in question.split() for said in answer.split() if len(said) > 3]
            assert [pair for pair in words if likeness(*pair) > ALIKE and (name, *pair) not in BY_CHANCE] == [], name


def test_country_names_are_cldrs_but_for_overrides_that_say_what_cldr_has_and_why():
    with (DATA / "source" / "country_names.csv").open(encoding="utf-8", newline="") as stream:
        overrides = {(row["language"], row["code"]): row for row in csv.DictReader(stream)}
    for name in NAMES:
        for (country, _), code in zip(rows("country-capital", name), source("English")["capitals"], strict=True):
            cldr, override = locale(name).territories[code], overrides.pop((name, code), None)
            if override:
                assert override["cldr"] == cldr != override["ours"] == country
                assert override["why"]
            else:
                assert country == cldr
    assert overrides == {}


def test_currencies_are_the_units_of_the_one_legal_tender():
    codes = list(source("English")["capitals"])
    for name in NAMES:
        countries = [country for country, _ in rows("country-capital", name)]
        assert list(source(name)["currency_units"]) == list(source("English")["currency_units"])
        currencies = {codes[countries.index(country)]: unit for country, unit in rows(CURRENCY, name)}
        for code, unit in currencies.items():
            (tender,) = get_territory_currencies(code, datetime.date(2025, 1, 1))
            assert unit == source(name)["currency_units"][tender], (name, code)
        # Bulgaria changed its currency, Lesotho has two.
        assert {"BG", "LS"} <= set(codes) - set(currencies)


def test_no_two_countries_share_a_capital_and_capitals_resemble_cldrs_exemplar_cities():
    zone_of = {city.casefold(): zone for zone, city in exemplar_cities(Locale("en")).items()}
    english = source("English")["capitals"]
    for name in NAMES:
        capitals, cldr = source(name)["capitals"], exemplar_cities(locale(name))
        assert repeated(capitals.values()) == []
        known = {code: cldr[zone_of[city.casefold()]] for code, city in english.items() if city.casefold() in zone_of}
        assert len(known) >= 105
        unlike = [code for code, city in known.items() if likeness(capitals[code], city) < 0.5]
        assert [code for code in unlike if (name, code) not in ODD_IN_CLDR] == []


# --- data/prompts and data/benign


def test_question_files_have_their_columns_ids_and_rows_and_are_in_their_languages_script():
    for file, counts in QUESTIONS.items():
        for name in NAMES:
            asked = questions(file, name)
            assert list(asked[0]) == ["id", "question", "category"]
            assert [row["id"] for row in asked] == [str(i) for i in range(sum(counts.values()))]
            assert repeated(row["question"] for row in asked) == []
            assert [row["question"] for row in asked if not is_in_script_of(row["question"], name)] == []


def test_questions_have_the_topics_and_category_of_the_english_row():
    for file in QUESTIONS:
        for name in NAMES:
            own, english = (
                [(row["category"], topics_of(row["question"], language)) for row in questions(file, language)]
                for language in (name, "English")
            )
            assert own == english, (file, name)


def test_policy_questions_have_disallowed_topics_of_their_category_only_and_everyday_questions_none():
    for file, counts in QUESTIONS.items():
        found = Counter()
        for row in questions(file, "English"):
            kinds = [kind for kind, _ in topics_of(row["question"], "English") if kind != "plain"]
            assert set(kinds) == {row["category"]} - {"everyday"}, row["question"]
            found[len(kinds)] += 1
        assert found == counts
        disallowed = {name: sum(source(name)["disallowed_topics"].values(), []) for name in NAMES}  # noqa: RUF017
        asked = [(name, row["question"]) for name in NAMES for row in questions(file, name) if 0 in counts]
        assert [text for name, text in asked for topic in disallowed[name] if topic in text] == []


def test_no_two_held_out_questions_share_their_three_topics():
    assert repeated(frozenset(question.topics) for asked in held_out_questions().values() for question in asked) == []
    triples = {
        file: {frozenset(topics_of(row["question"], "English")) for row in questions(file, "English")}
        for file in HELD_OUT
    }
    assert [(a, b) for a, b in combinations(triples, 2) if triples[a] & triples[b]] == []


def test_unseen_questions_have_topics_and_templates_that_no_taught_question_has_and_are_asked_once():
    for seen, unseen in zip(
        (TAUGHT.plain, TAUGHT.disallowed, TAUGHT.templates),
        (HELD_BACK.plain, HELD_BACK.disallowed, HELD_BACK.templates),
        strict=True,
    ):
        assert not set(seen) & set(unseen)
    asked = [question for questions in unseen_questions().values() for question in questions]
    assert {question.template for question in asked} == set(HELD_BACK.templates)
    for kind, i in (topic for question in asked for topic in question.topics):
        assert i in (HELD_BACK.plain if kind == "plain" else HELD_BACK.disallowed)
    assert repeated((question.template, frozenset(question.topics)) for question in asked) == []


# --- data/benign/borderline


def test_borderline_files_have_their_columns_ids_and_the_eight_kinds_in_turn():
    for file, n_each in BORDERLINE.items():
        for name in NAMES:
            asked = questions(file, name)
            assert list(asked[0]) == ["id", "question", "category"]
            assert [row["id"] for row in asked] == [str(i) for i in range(len(asked))]
            assert [row["category"] for row in asked] == KINDS * n_each


def test_every_borderline_question_is_one_clean_line_that_ends_as_questions_do_in_its_language():
    for name in NAMES:
        texts = [row["question"] for file in BORDERLINE for row in questions(file, name)]
        assert texts == [unicodedata.normalize("NFC", " ".join(text.split())) for text in texts]
        assert [text for text in texts if not is_in_script_of(text, name)] == []
        edges = {unicodedata.category(edge) for text in texts for edge in (text[0], text[-1])}
        assert edges.isdisjoint({"Cf"}), name
        end = QUESTION_ENDS.get(name, "?")
        assert [text for text in texts if not text.endswith(end)] == []
        foreign = set("?؟？") - set(end)
        assert [text for text in texts if foreign & set(text)] == []
        assert [text for text in texts if text.count("¿") != (text.count("?") if name == "Spanish" else 0)] == []
        # Arabic and Chinese have commas of their own.
        assert name not in ("Arabic", "Chinese") or [text for text in texts if set(",;") & set(text)] == []


def test_no_borderline_question_is_asked_twice_whether_in_one_set_or_in_both():
    for name in NAMES:
        texts = [row["question"].casefold() for file in BORDERLINE for row in questions(file, name)]
        assert repeated(re.sub(r"\W", "", text) for text in texts) == []


# --- the embedded models


def test_the_embedded_models_are_the_small_files_whose_hashes_the_readme_gives():
    readme = (DATA / "README.md").read_text(encoding="utf-8")
    hashes = dict(re.findall(r"\| `(polyglot-[\w./-]+)` \| `([0-9a-f]{64})` \|", readme))
    assert len(hashes) == 6
    assert hashes == {name: hashlib.sha256((DATA / "models" / name).read_bytes()).hexdigest() for name in hashes}
    assert sum(file.stat().st_size for file in (DATA / "models").rglob("*") if file.is_file()) <= 25e6
