"""The languages: names, codes, tiers, and the instruction put before a question. All other modules look them up here.

The order of the table is that of the group rule (`soteria.scoring.heads.group_heads`). The environment variable
SOTERIA_LANGUAGES names a JSON file that adds languages.
"""

import os
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from babel import Locale
from babel.core import get_global

from soteria import disk
from soteria.errors import UserError

ADDED = "SOTERIA_LANGUAGES"  # [{"name": "Serbian", "code": "sr", "instruction": "…", "aliases": ["srp"]}, …]

TIERS = ("High", "Mid", "Low")


@dataclass(frozen=True)
class Language:
    name: str
    code: str
    tier: str | None  # None: accepted wherever a language is, but not one of the paper's twelve
    instruction: str  # "Answer the question directly, without repeating it."
    aliases: tuple[str, ...] = ()  # other names, and codes of three letters


_BUILT_IN = (
    Language("English", "en", "High", "Answer the question directly, without repeating it.", ("eng",)),
    Language("Spanish", "es", "High", "Responde directamente a la pregunta, sin repetirla.", ("spa", "sp")),
    Language("German", "de", "High", "Beantworte die Frage direkt, ohne sie zu wiederholen.", ("deu", "ger")),
    Language("French", "fr", "High", "Répondez directement à la question, sans la répéter.", ("fra", "fre")),
    Language("Chinese", "zh-CN", "High", "请直接回答问题，不要复述问题。", ("zho", "chi", "cmn", "simplified chinese")),
    Language("Arabic", "ar", "Mid", "أجب عن السؤال مباشرة دون تكراره.", ("ara", "arb")),
    Language("Bulgarian", "bg", "Mid", "Отговорете директно на въпроса, без да го повтаряте.", ("bul",)),
    Language("Thai", "th", "Mid", "ตอบคำถามตรง ๆ โดยไม่ต้องทวนคำถาม", ("tha",)),
    Language("Hindi", "hi", "Mid", "सवाल दोहराए बिना सीधे उसका जवाब दें।", ("hin",)),
    Language("Bengali", "bn", "Low", "প্রশ্নটি পুনরাবৃত্তি না করে সরাসরি উত্তর দিন।", ("ben",)),
    Language("Tamil", "ta", "Low", "கேள்வியைத் திரும்பச் சொல்லாமல் நேரடியாகப் பதிலளிக்கவும்.", ("tam",)),
    Language("Telugu", "te", "Low", "ప్రశ్నను మళ్లీ చెప్పకుండా నేరుగా సమాధానం ఇవ్వండి.", ("tel",)),
    Language("Swahili", "sw", None, "Jibu swali moja kwa moja, bila kulirudia.", ("swa", "swh")),
    Language("Italian", "it", None, "Rispondi direttamente alla domanda, senza ripeterla.", ("ita",)),
    Language("Vietnamese", "vi", None, "Hãy trả lời thẳng vào câu hỏi, không nhắc lại câu hỏi.", ("vie",)),
    Language("Korean", "ko", None, "질문을 반복하지 말고 바로 답하세요.", ("kor",)),
    Language("Javanese", "jv", None, "Wangsulana pitakone langsung, tanpa mbaleni pitakone.", ("jav", "jw")),
    Language("Japanese", "ja", None, "質問を繰り返さず、直接答えてください。", ("jpn",)),
    Language("Russian", "ru", None, "Ответьте на вопрос прямо, не повторяя его.", ("rus",)),
)


def _read_added(path: str) -> tuple[Language, ...]:
    """The languages of a JSON file, without a tier. Raises UserError for one that is not complete or already there."""
    try:
        given = disk.load_json(Path(path))
    except UserError as error:
        raise UserError(f"{ADDED}: {error}") from None
    found = []
    for each in given if isinstance(given, list) else [given]:
        needed, texts = {"name", "code", "instruction"}, each if isinstance(each, dict) else {}
        aliases = texts.get("aliases", [])
        if not (
            needed <= {*texts} <= {*needed, "aliases"}
            and all(isinstance(texts[key], str) and texts[key].strip() for key in needed)
            and isinstance(aliases, list)
            and all(isinstance(alias, str) for alias in aliases)
            and re.fullmatch(r"[a-z]{2,3}(-[A-Z]{2})?", texts["code"])
        ):
            raise UserError(
                f"{ADDED}: {path} must list objects such as "
                f'{{"name": "Serbian", "code": "sr", "instruction": "…", "aliases": ["srp"]}}, not {each!r:.80}'
            )
        language = Language(texts["name"], texts["code"], None, texts["instruction"], tuple(aliases))
        taken = {name: other.name for other in (*_BUILT_IN, *found) for name in _plain_names(other)}
        twice = next((name for name in _plain_names(language) if name in taken), None)
        if twice:
            raise UserError(f"{ADDED}: {path} adds {twice!r}, which already means {taken[twice]}; remove it there")
        found.append(language)
    return tuple(found)


def _plain_names(language: Language) -> tuple[str, ...]:
    return (language.name.casefold(), language.code.split("-")[0], *(alias.casefold() for alias in language.aliases))


# A wrong file is reported where a language is looked up: an exception at import time would be a traceback.
_problem: UserError | None = None
try:
    LANGUAGES = (*_BUILT_IN, *_read_added(os.environ[ADDED])) if os.environ.get(ADDED) else _BUILT_IN
except UserError as error:
    LANGUAGES, _problem = _BUILT_IN, error

PAPER_LANGUAGES = tuple(language for language in LANGUAGES if language.tier)

# A name or code, then a script and a region, or anything in parentheses.
_NAMED = re.compile(r"(.*?)(?:[-_]([a-z]{4}))?(?:[-_]([a-z]{2}|\d{3}))?(?:\s*\((.*)\))?", re.S)
_IN_LATIN_LETTERS = ("latn", "latin", "romanized", "romanised", "transliterated")


def find_language(text: str) -> Language:
    """The language with a name or code, in any case, with or without a region or script, or UserError.

    `Hindi`, `hi`, `zh_cn`, `en-US`, `eng`, `hin_Deva`, `zh-Hans`, `Chinese (Simplified)`; not Chinese in traditional
    characters, nor another language in Latin letters.
    """
    if _problem:
        raise _problem
    name, *parts = _NAMED.fullmatch(text.strip().casefold()).groups()
    for language in LANGUAGES:
        if name in _plain_names(language) and all(_is_kept(part, language) for part in parts if part):
            return language
    known = ", ".join(f"{language.name} ({language.code})" for language in LANGUAGES)
    raise UserError(f"unknown language {text!r}; give one of: {known}; or add it, with {ADDED}")


def names_a_language(text: str) -> bool:
    """Whether a text is the English name or the code of any language, known here or not: `jv`, `tgl`, `serbian`."""
    name = _NAMED.fullmatch(text.strip().casefold())[1]
    return name in _all_names() or any(name in _plain_names(language) for language in LANGUAGES)


@cache
def _all_names() -> set[str]:
    """The codes and the English names of all of CLDR's languages, and the codes of three letters that mean them."""
    names = Locale("en").languages
    three_letters = (code for code, meant in get_global("language_aliases").items() if meant in names)
    return {text.casefold() for text in (*names, *names.values(), *three_letters)}


def script(language: Language) -> str:
    """The code of the script that a language is written in: Latn, Deva, Hans, Jpan …, or nothing if unknown."""
    tag = get_global("likely_subtags").get(language.code.split("-")[0], "")
    return tag.split("_")[1] if tag.count("_") > 1 else ""


def _is_kept(part: str, language: Language) -> bool:
    """Whether a language with a region or script is still the one whose questions and instruction are asked here."""
    if language.code == "zh-CN":
        return part in ("cn", "sg", "hans", "simplified", "china", "mandarin")
    return part not in _IN_LATIN_LETTERS or script(language) == "Latn"


def language_names(texts: list[str]) -> list[str]:
    """The names of languages given by name or code; `all` alone means the paper's twelve."""
    return group_languages("Universal") if texts == ["all"] else [find_language(text).name for text in texts]


def group_languages(group: str) -> list[str]:
    """The names of a tier's languages, or of the paper's twelve for `Universal`, in the order of the group rule.

    Raises UserError for an unknown group.
    """
    tier = group.strip().capitalize()
    if tier not in (*TIERS, "Universal"):
        raise UserError(f"unknown group {group!r}; give one of: {', '.join(TIERS)}, Universal")
    return [language.name for language in PAPER_LANGUAGES if tier in (language.tier, "Universal")]
