"""The languages: names, codes, tiers, and the instruction put before a question. All other modules look them up here.

The order of the table is that of the group rule (`soteria.scoring.heads.group_heads`).
"""

from dataclasses import dataclass

from soteria.errors import UserError

TIERS = ("High", "Mid", "Low")


@dataclass(frozen=True)
class Language:
    name: str
    code: str
    tier: str | None  # None: accepted for steering and generation, but not one of the paper's twelve
    instruction: str  # "Answer the question directly, without repeating it."


LANGUAGES = (
    Language("English", "en", "High", "Answer the question directly, without repeating it."),
    Language("Spanish", "es", "High", "Responde directamente a la pregunta, sin repetirla."),
    Language("German", "de", "High", "Beantworte die Frage direkt, ohne sie zu wiederholen."),
    Language("French", "fr", "High", "Répondez directement à la question, sans la répéter."),
    Language("Chinese", "zh-CN", "High", "请直接回答问题，不要复述问题。"),
    Language("Arabic", "ar", "Mid", "أجب عن السؤال مباشرة دون تكراره."),
    Language("Bulgarian", "bg", "Mid", "Отговорете директно на въпроса, без да го повтаряте."),
    Language("Thai", "th", "Mid", "ตอบคำถามตรง ๆ โดยไม่ต้องทวนคำถาม"),
    Language("Hindi", "hi", "Mid", "सवाल दोहराए बिना सीधे उसका जवाब दें।"),
    Language("Bengali", "bn", "Low", "প্রশ্নটি পুনরাবৃত্তি না করে সরাসরি উত্তর দিন।"),
    Language("Tamil", "ta", "Low", "கேள்வியைத் திரும்பச் சொல்லாமல் நேரடியாகப் பதிலளிக்கவும்."),
    Language("Telugu", "te", "Low", "ప్రశ్నను మళ్లీ చెప్పకుండా నేరుగా సమాధానం ఇవ్వండి."),
    Language("Swahili", "sw", None, "Jibu swali moja kwa moja, bila kulirudia."),
)

PAPER_LANGUAGES = tuple(language for language in LANGUAGES if language.tier)


def find_language(text: str) -> Language:
    """The language with a name or code, in any case (`Hindi`, `hi`, `zh-CN`, `zh_cn`, `zh`), or UserError."""
    wanted = text.strip().casefold().replace("_", "-")
    for language in LANGUAGES:
        code = language.code.casefold()
        if wanted in (language.name.casefold(), code, code.split("-")[0]):
            return language
    known = ", ".join(f"{language.name} ({language.code})" for language in LANGUAGES)
    raise UserError(f"unknown language {text!r}; give one of: {known}")


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
