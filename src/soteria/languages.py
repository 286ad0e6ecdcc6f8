"""Languages: names, codes, tiers, and the instruction put before a question. Every other file asks here.

Knows nothing of models or data files. The order is the one the group rule needs (`soteria.heads.group_heads`).
"""

from dataclasses import dataclass

from soteria.errors import UserError

TIERS = ("High", "Mid", "Low")


@dataclass(frozen=True)
class Language:
    name: str
    code: str
    tier: str | None  # None: accepted for steering and generation, not in the paper's grid of twelve
    instruction: str  # "Answer the question directly, without repeating it."


LANGUAGES = (
    Language("English", "en", "High", "Answer the question directly, without repeating it."),
    Language("Spanish", "es", "High", ""),
    Language("German", "de", "High", ""),
    Language("French", "fr", "High", ""),
    Language("Chinese", "zh-CN", "High", ""),
    Language("Arabic", "ar", "Mid", ""),
    Language("Bulgarian", "bg", "Mid", ""),
    Language("Thai", "th", "Mid", ""),
    Language("Hindi", "hi", "Mid", ""),
    Language("Bengali", "bn", "Low", ""),
    Language("Tamil", "ta", "Low", ""),
    Language("Telugu", "te", "Low", ""),
    Language("Swahili", "sw", None, "Jibu swali moja kwa moja, bila kulirudia."),
)

PAPER_LANGUAGES = tuple(language for language in LANGUAGES if language.tier)


def find_language(text: str) -> Language:
    """The language of a name or a code, in any case (`Hindi`, `hi`, `zh-CN`, `zh_cn`, `zh`).

    Raises UserError for anything else.
    """
    wanted = text.strip().casefold().replace("_", "-")
    for language in LANGUAGES:
        code = language.code.casefold()
        if wanted in (language.name.casefold(), code, code.split("-")[0]):
            return language
    known = ", ".join(f"{language.name} ({language.code})" for language in LANGUAGES)
    raise UserError(f"unknown language {text!r}; give one of: {known}")


def group_languages(group: str) -> list[str]:
    """Names of a tier's languages, or of all twelve for `Universal`, in the group rule's order.

    Raises UserError for an unknown group.
    """
    tier = group.strip().capitalize()
    if tier == "Universal":
        return [language.name for language in PAPER_LANGUAGES]
    if tier not in TIERS:
        raise UserError(f"unknown group {group!r}; give one of: {', '.join(TIERS)}, Universal")
    return [language.name for language in PAPER_LANGUAGES if language.tier == tier]
