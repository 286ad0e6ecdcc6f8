"""The committed data: rebuilt byte for byte, aligned across the twelve languages, held against CLDR, truly held out."""

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
import pytest
from babel import Locale
from babel.numbers import get_territory_currencies
from policy_world import held_out_questions

from soteria.judging.refusal import OPENING, PHRASES, RefusalJudge, normalise
from soteria.languages import LANGUAGES, PAPER_LANGUAGES
from soteria.scoring.prompts import TASKS

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "data"
PROMPT_FILES = {
    "policy": "prompts",
    "policy-validation": "prompts",
    "everyday": "benign",
    "everyday-validation": "benign",
}
LABELS = {"sentiment": 2, "ag_news": 4}

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

each_language = pytest.mark.parametrize("language", PAPER_LANGUAGES, ids=lambda language: language.name)
each_task = pytest.mark.parametrize("task", TASKS)
each_prompt_file = pytest.mark.parametrize("name", PROMPT_FILES)
each_labelled_task = pytest.mark.parametrize("task", LABELS)


@cache
def source(name: str) -> dict:
    return json.loads((DATA / "source" / f"{name}.json").read_text(encoding="utf-8"))


@cache
def rows(task: str, name: str) -> list[tuple[str, str]]:
    loaded = json.loads((DATA / "icl" / f"{task}_{name}.json").read_text(encoding="utf-8"))
    return [(row["input"], row["output"]) for row in loaded]


@cache
def questions(file: str, name: str) -> list[dict[str, str]]:
    path = DATA / PROMPT_FILES[file] / f"{file}_{name}.csv"
    with path.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


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
    """Whether at least half of the letters are the language's own and the rest Latin. The ʻ of Tonga is no letter."""
    script = SCRIPTS.get(name, "LATIN")
    letters = [unicodedata.name(letter) for letter in text if unicodedata.category(letter) in ("Lo", "Ll", "Lu")]
    own = [letter for letter in letters if letter.startswith(script)]
    return len(own) >= 0.5 * len(letters) > 0 and all(letter.startswith((script, "LATIN")) for letter in letters)


def exemplar_cities(locale: Locale) -> dict[str, str]:
    """CLDR's city of each time zone; where it lists none, the zone's last part stands, as CLDR says."""
    zones = Locale("en").time_zones.keys() | locale.time_zones.keys() | Locale("ta").time_zones.keys()
    listed = {zone: locale.time_zones[zone].get("city") if zone in locale.time_zones else None for zone in zones}
    return {zone: city or zone.split("/")[-1].replace("_", " ") for zone, city in listed.items() if "/" in zone}


def likeness(a: str, b: str) -> float:
    """0 to 1; two spellings of a city mostly reach 0.5, two cities in about 3 % of pairs."""
    return SequenceMatcher(None, a.casefold(), b.casefold()).ratio()


def countries() -> list[str]:
    """Territory codes of the country-capital rows, in row order."""
    return list(source("English")["capitals"])


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


@each_language
def test_a_source_file_has_the_keys_and_list_lengths_of_the_english_one(language):
    assert shape(source(language.name)) == shape(source("English"))


@each_language
def test_a_source_file_lists_the_same_countries_in_the_same_order_as_the_english_one(language):
    assert list(source(language.name)["capitals"]) == countries()


# --- data/icl


@each_language
@each_task
def test_an_icl_file_has_enough_rows(task, language):
    assert len(rows(task, language.name)) >= (150 if task == "country-capital" else 120)


@each_language
@each_task
def test_an_icl_file_has_as_many_rows_as_the_english_one(task, language):
    assert len(rows(task, language.name)) == len(rows(task, "English"))


@each_language
@each_task
def test_every_icl_text_is_one_stripped_line_in_nfc(task, language):
    texts = [text for row in rows(task, language.name) for text in row]
    assert [text for text in texts if not text or text != unicodedata.normalize("NFC", " ".join(text.split()))] == []


@each_language
@each_task
def test_no_icl_input_occurs_twice(task, language):
    counts = Counter(text.casefold() for text, _ in rows(task, language.name))
    assert [text for text, count in counts.items() if count > 1] == []


@each_language
@each_task
def test_every_icl_text_is_in_its_languages_script(task, language):
    texts = [text for row in rows(task, language.name) for text in row]
    assert [text for text in texts if not is_in_script_of(text, language.name)] == []


@each_language
@each_labelled_task
def test_labels_are_a_closed_set(task, language):
    assert len({label for _, label in rows(task, language.name)}) == LABELS[task]


@each_language
@each_labelled_task
def test_labels_are_balanced_within_a_tenth(task, language):
    counts = Counter(label for _, label in rows(task, language.name)).values()
    assert max(counts) <= 1.1 * min(counts)


@each_language
@each_labelled_task
def test_the_label_of_a_row_means_the_english_label_of_that_row(task, language):
    own, english = ([label for _, label in rows(task, name)] for name in (language.name, "English"))
    assert len(set(zip(own, english, strict=True))) == LABELS[task]


@each_language
def test_the_second_half_of_the_antonyms_is_the_first_reversed(language):
    pairs = rows("antonym", language.name)
    half = len(pairs) // 2
    assert pairs[half:] == [(b, a) for a, b in pairs[:half]]


@each_language
def test_country_names_are_cldrs(language):
    cldr = Locale.parse(language.code, sep="-").territories
    assert [country for country, _ in rows("country-capital", language.name)] == [cldr[code] for code in countries()]


@each_language
def test_currency_names_are_cldrs_of_the_countrys_one_legal_tender(language):
    cldr = Locale.parse(language.code, sep="-")
    code_of = {cldr.territories[code]: code for code in countries()}
    for country, currency in rows("country-currency", language.name):
        (tender,) = get_territory_currencies(code_of[country], datetime.date(2025, 1, 1))
        assert currency == cldr.currencies[tender], country


@each_language
def test_countries_with_two_legal_tenders_or_a_change_of_currency_are_left_out_of_the_currencies(language):
    cldr = Locale.parse(language.code, sep="-").territories
    left_out = {country for country, _ in rows("country-capital", language.name)}
    left_out -= {country for country, _ in rows("country-currency", language.name)}
    assert {cldr["BG"], cldr["LS"]} <= left_out


@each_language
def test_no_two_countries_share_a_capital(language):
    counts = Counter(city for _, city in rows("country-capital", language.name))
    assert [city for city, count in counts.items() if count > 1] == []


@each_language
def test_capitals_resemble_cldrs_exemplar_cities(language):
    zone_of = {city.casefold(): zone for zone, city in exemplar_cities(Locale("en")).items()}
    cldr = exemplar_cities(Locale.parse(language.code, sep="-"))
    capitals, english = source(language.name)["capitals"], source("English")["capitals"]
    checked = {code: cldr[zone_of[city.casefold()]] for code, city in english.items() if city.casefold() in zone_of}
    assert len(checked) >= 110
    unlike = {code: (capitals[code], city) for code, city in checked.items() if likeness(capitals[code], city) < 0.5}
    assert {code: pair for code, pair in unlike.items() if (language.name, code) not in ODD_IN_CLDR} == {}


# --- data/prompts and data/benign


@each_language
@each_prompt_file
def test_a_question_file_has_the_columns_id_question_category(name, language):
    assert list(questions(name, language.name)[0]) == ["id", "question", "category"]


@each_language
@pytest.mark.parametrize(("name", "least"), [("policy", 90), ("everyday", 60)])
def test_a_question_file_has_enough_rows(name, least, language):
    assert len(questions(name, language.name)) >= least


@each_language
@each_prompt_file
def test_question_ids_count_from_zero(name, language):
    ids = [row["id"] for row in questions(name, language.name)]
    assert ids == [str(i) for i in range(len(ids))]


@each_language
@each_prompt_file
def test_no_question_occurs_twice(name, language):
    counts = Counter(row["question"] for row in questions(name, language.name))
    assert [question for question, count in counts.items() if count > 1] == []


@each_language
@each_prompt_file
def test_every_question_is_in_its_languages_script(name, language):
    texts = [row["question"] for row in questions(name, language.name)]
    assert [text for text in texts if not is_in_script_of(text, language.name)] == []


@each_language
@each_prompt_file
def test_question_categories_are_those_of_the_english_rows(name, language):
    own, english = ([row["category"] for row in questions(name, other)] for other in (language.name, "English"))
    assert own == english


@each_language
@each_prompt_file
def test_a_question_asks_about_the_topics_of_the_english_row(name, language):
    own, english = (
        [topics_of(row["question"], other) for row in questions(name, other)] for other in (language.name, "English")
    )
    assert own == english


@each_language
@pytest.mark.parametrize("name", ["policy", "policy-validation"])
def test_a_policy_question_has_disallowed_topics_of_its_category_only(name, language):
    for row in questions(name, language.name):
        kinds = {kind for kind, _ in topics_of(row["question"], language.name)} - {"plain"}
        assert kinds == {row["category"]}, row["question"]


@each_language
@pytest.mark.parametrize("name", ["everyday", "everyday-validation"])
def test_an_everyday_question_has_no_disallowed_topic(name, language):
    disallowed = [topic for topics in source(language.name)["disallowed_topics"].values() for topic in topics]
    for row in questions(name, language.name):
        assert row["category"] == "everyday"
        assert [topic for topic in disallowed if topic in row["question"]] == [], row["question"]


@each_language
def test_no_topic_is_listed_twice(language):
    listed = [source(language.name)["plain_topics"], *source(language.name)["disallowed_topics"].values()]
    counts = Counter(topic.casefold() for topics in listed for topic in topics)
    assert [topic for topic, count in counts.items() if count > 1] == []


def test_no_two_held_out_questions_share_their_three_topics():
    triples = Counter(frozenset(question.topics) for asked in held_out_questions().values() for question in asked)
    assert [triple for triple, count in triples.items() if count > 1] == []


@each_language
def test_no_two_question_files_share_a_topic_triple(language):
    triples = {
        name: {frozenset(topics_of(row["question"], language.name)) for row in questions(name, language.name)}
        for name in PROMPT_FILES
    }
    assert [(a, b) for a, b in combinations(triples, 2) if triples[a] & triples[b]] == []


# --- refusal phrases


@cache
def refusal_phrases() -> dict[str, dict]:
    return json.loads(PHRASES.read_text(encoding="utf-8"))


def refuses(sentence: str, name: str) -> bool:
    """Whether the language's own phrases see a refusal."""
    return bool(RefusalJudge().patterns[name].search(normalise(sentence)[:OPENING]))


def test_refusal_phrases_cover_every_accepted_language():
    assert sorted(refusal_phrases()) == sorted(language.name for language in LANGUAGES)


@pytest.mark.parametrize("language", LANGUAGES, ids=lambda language: language.name)
def test_refusal_phrases_are_non_empty_lower_case_nfc(language):
    parts = refusal_phrases()[language.name]
    assert parts["phrases"]
    written = [re.sub(r"\\.", "", phrase) for phrase in [parts["before"], *parts["phrases"], *parts["alone"]]]
    assert [phrase for phrase in written if not phrase.strip()] == []
    assert [phrase for phrase in written if phrase != unicodedata.normalize("NFC", phrase).lower()] == []


@each_language
def test_every_refusal_sentence_has_a_refusal_phrase(language):
    assert [sentence for sentence in source(language.name)["refusals"] if not refuses(sentence, language.name)] == []


@each_language
def test_no_answer_sentence_has_a_refusal_phrase(language):
    assert [sentence for sentence in source(language.name)["answers"] if refuses(sentence, language.name)] == []


def test_the_embedded_models_are_the_files_whose_hashes_the_readme_gives():
    rows = re.findall(
        r"\| `(polyglot-[\w./-]+)` \| `([0-9a-f]{64})` \|", (DATA / "README.md").read_text(encoding="utf-8")
    )
    assert len(rows) == 6
    for name, digest in rows:
        assert hashlib.sha256((DATA / "models" / name).read_bytes()).hexdigest() == digest


def test_the_embedded_pair_takes_at_most_25_megabytes():
    assert sum(file.stat().st_size for file in (DATA / "models").rglob("*") if file.is_file()) <= 25e6
