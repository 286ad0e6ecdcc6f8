"""Damage that is neither a refusal nor an answer: an echo of the question, a repetition, text in another language.

Works on text from `normalise`, which is also what the refusal phrases are looked for in.
"""

import re
import unicodedata
from functools import cache

SHARE_ECHOED, SHARE_NEW = 0.85, 0.3  # of an echo's pieces those that the question has; of a repetition's the distinct
PIECE, HAN_PIECE, SHORTEST = 6, 3, 40  # characters of a piece, and of a text that can be called a repetition
ROUNDS = 2.5  # of a loop, at least
COMMON_WORDS = 3  # so many at least tell a language in Latin letters
# An item's number or bullet, at the beginning of a line; a number also after a space.
_ITEM = re.compile(
    r"^[ \t*_>#]*(?:[-•–—●▪‣*](?=\s)|\(?\d{1,2}\s?[.):、।]|step \d)|(?<=\s)\(?\d{1,2}[.)](?=\s|[^\W\d])", re.M
)
_ENDS, _COLONS = ".!?。！？।॥…\n؟", ":："


class _Spelling(dict):
    """What each character becomes: one spelling where there are several, `.` for every end of a sentence."""

    def __missing__(self, code: int) -> str:
        letter = chr(code)
        if letter in _ENDS:
            self[code] = " . "
        elif letter in _COLONS:
            self[code] = " : "
        # Emphasis, and marks that are often left out: Arabic vowel signs, tatweel, Indic nuktas, joiners.
        elif letter in "*_\u0640\u093c\u09bc\ufeff" or 0x64B <= code <= 0x652 or 0x200B <= code <= 0x200F:
            self[code] = ""
        elif letter == "#" or letter == "'" or unicodedata.category(letter)[0] in "LMN":
            self[code] = letter
        else:
            self[code] = " "
        return self[code]


_SPELLING = _Spelling(
    {
        ord(a): b
        for a, b in {"’": "'", "‘": "'", "`": "'", "أ": "ا", "إ": "ا", "آ": "ا", "ى": "ي", "ة": "ه", "ँ": "ं"}.items()
    }
)


def normalise(text: str) -> str:
    """The text in lower case, words and ` . `, ` : `, ` # ` (an item of a list) with single spaces around them."""
    text = _ITEM.sub(" # ", unicodedata.normalize("NFKC", text).casefold().replace("#", " "))
    return f" {' '.join(text.translate(_SPELLING).split())} "


@cache
def script_of(letter: str) -> str:
    """The script in a letter's Unicode name (LATIN, CJK, DEVANAGARI …), or nothing for other characters."""
    return unicodedata.name(letter, "").partition(" ")[0] if letter.isalpha() else ""


def without_restatement(text: str, question: str) -> str:
    """The text without the question, if it begins with it."""
    words = question.rstrip(" .")
    return text[len(words) :] if words and text.startswith(words) else text


def is_echo(text: str, question: str) -> bool:
    """Whether the text is the question again, with hardly anything new: a third as long as it or longer."""
    if not question.strip() or 3 * len(text) < len(question):
        return False
    pieces, asked = _pieces(text), _pieces(question)
    return bool(pieces) and sum(piece in asked for piece in pieces) >= SHARE_ECHOED * len(pieces)


def repeats(text: str) -> bool:
    """Whether the text says the same few things over and over, or ends in a loop."""
    pieces = _pieces(text)
    return len(text) >= SHORTEST and (len(set(pieces)) <= SHARE_NEW * len(pieces) or _loops(text.strip()))


def _loops(text: str) -> bool:
    """Whether at least half of the text is its end, the same words over and over, perhaps cut off."""
    for period in range(1, int(len(text) / ROUNDS) + 1):
        start = len(text) - period
        while start > 0 and text[start - 1] == text[start - 1 + period]:
            start -= 1
        if len(text) - start >= max(ROUNDS * period, len(text) / 2):
            return True
    return False


def is_garbled(answer: str) -> bool:
    """Whether an answer holds neither letters nor digits, or many broken characters."""
    return not any(map(str.isalnum, answer)) or 20 * answer.count("\ufffd") > len(answer)


def is_in_another_language(text: str, question: str, common: dict[str, frozenset[str]]) -> bool:
    """Whether the text is in another script than the question, or in another of the languages of `common` words."""
    own, asked = (main_script(each) for each in (text, question))
    if not own or not asked or own != asked:
        return bool(own and asked)
    if own != "LATIN":
        return False
    own, asked = (_language(each, common) for each in (text, question))
    return bool(own and asked and own != asked)


def _pieces(text: str) -> list[str]:
    text = text.replace(" . ", " ").replace(" : ", " ").strip()
    size = HAN_PIECE if any("\u4e00" <= letter <= "\u9fff" for letter in text) else PIECE
    return [text[at : at + size] for at in range(len(text) - size + 1)]


def main_script(text: str) -> str:
    """The script of most letters."""
    counts: dict[str, int] = {}
    for letter in text:
        if script := script_of(letter):
            counts[script] = counts.get(script, 0) + 1
    return max(counts, key=counts.get) if counts else ""


def _language(text: str, common: dict[str, frozenset[str]]) -> str:
    """The language whose common words the text has most of, if clearly most."""
    words = text.split()
    counts = sorted(((sum(word in own for word in words), name) for name, own in common.items()), reverse=True)
    (most, name), (second, _) = counts[:2]
    return name if most >= COMMON_WORDS and most > 1.5 * second else ""
