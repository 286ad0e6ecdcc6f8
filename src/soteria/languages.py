"""The languages: names, codes, tiers, and the instruction put before a question. All other modules look them up here.

The order of the table is that of the group rule (`soteria.scoring.heads.group_heads`).
"""

import re
from dataclasses import dataclass

from soteria.errors import UserError

TIERS = ("High", "Mid", "Low")


@dataclass(frozen=True)
class Language:
    name: str
    code: str
    tier: str | None  # None: accepted for steering and generation, but not one of the paper's twelve
    instruction: str  # "Answer the question directly, without repeating it."
    aliases: tuple[str, ...] = ()  # other names, and codes of three letters


LANGUAGES = (
    Language("English", "en", "High", "Answer the question directly, without repeating it.", ("eng",)),
    Language("Spanish", "es", "High", "Responde directamente a la pregunta, sin repetirla.", ("spa",)),
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
)

PAPER_LANGUAGES = tuple(language for language in LANGUAGES if language.tier)

# A name or code, then a script and a region, or anything in parentheses.
_NAMED = re.compile(r"(.*?)(?:[-_]([a-z]{4}))?(?:[-_]([a-z]{2}|\d{3}))?(?:\s*\((.*)\))?", re.S)
_IN_LATIN_LETTERS = ("latn", "latin", "romanized", "romanised", "transliterated")


def find_language(text: str) -> Language:
    """The language with a name or code, in any case, with or without a region or script, or UserError.

    `Hindi`, `hi`, `zh_cn`, `en-US`, `eng`, `hin_Deva`, `zh-Hans`, `Chinese (Simplified)`; not Chinese in traditional
    characters, nor another language in Latin letters.
    """
    name, *parts = _NAMED.fullmatch(text.strip().casefold()).groups()
    for language in LANGUAGES:
        names = (language.name.casefold(), language.code.split("-")[0], *language.aliases)
        if name in names and all(_is_kept(part, language) for part in parts if part):
            return language
    known = ", ".join(f"{language.name} ({language.code})" for language in LANGUAGES)
    raise UserError(f"unknown language {text!r}; give one of: {known}")


def _is_kept(part: str, language: Language) -> bool:
    """Whether a language with a region or script is still the one whose questions and instruction are asked here."""
    if language.code == "zh-CN":
        return part in ("cn", "sg", "hans", "simplified", "china", "mandarin")
    return part not in _IN_LATIN_LETTERS or language.name in ("English", "Spanish", "German", "French", "Swahili")


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
