"""Languages' own names in figures, and the installed fonts that can write them.

Takes names of languages and looks at the installed fonts, once per process. `language_labels` gives what to write, and
`families` the list for matplotlib's `font.family`, which draws each letter with the first font that has it. Where no
font has a language's letters, its English name stands alone, and `missing_fonts` says so.
"""

from contextlib import suppress
from functools import cache

from babel import Locale
from matplotlib import font_manager
from matplotlib.ft2font import FaceFlags, FT2Font

from soteria.languages import LANGUAGES, find_language

FIRST = "DejaVu Sans"  # comes with matplotlib; has Latin, Cyrillic and Arabic letters
NAMES = [language.name for language in LANGUAGES]
FIX = "apt-get install fonts-noto-core fonts-noto-cjk, or install any other font with these letters"


@cache
def own_name(language: str) -> str:
    """A language's name in itself, from CLDR (`हिन्दी` for Hindi). Raises UserError for an unknown language."""
    return Locale.parse(find_language(language).code, sep="-").get_language_name()


def language_labels(names: list[str]) -> dict[str, str]:
    """What a figure calls languages: `Hindi  हिन्दी`, or `Hindi` where no installed font has the letters.

    A name that is the same in English, or is not a language's, appears once.
    """
    own = {name: own_name(name) for name in chosen_families()}
    return {name: f"{name}  {own[name]}" if own.get(name, name) != name else name for name in names}


def families() -> list[str]:
    """For `font.family`: DejaVu Sans, then the fonts for the letters that it lacks."""
    return list(dict.fromkeys([FIRST, *chosen_families().values()]))


def missing_fonts(names: list[str] | None = None) -> str:
    """Which of the languages (default: all) no installed font can write, and the fix; empty if there are none."""
    missing = [name for name in names or NAMES if name in NAMES and name not in chosen_families()]
    if not missing:
        return ""
    return f"no installed font can write {', '.join(missing)}: figures use their English names; to fix this, {FIX}"


@cache
def chosen_families() -> dict[str, str]:
    """Per language, the font family that writes its own name; languages that no font can write are left out."""
    listed = font_manager.fontManager
    for path in sorted(set(font_manager.findSystemFonts()) - {font.fname for font in listed.ttflist}):
        with suppress(OSError, RuntimeError, ValueError):  # damaged, or of a kind that FreeType does not know
            listed.addfont(path)  # it was installed after matplotlib stored its list
    regular = {font.name for font in listed.ttflist if (font.style, font.weight) == ("normal", 400)}
    # Last Resort, which comes with matplotlib and macOS, has a box for every letter there is.
    regular = {family for family in regular if "lastresort" not in family.replace(" ", "").casefold()}
    found: dict[str, str] = {}
    for family in [FIRST, *sorted(regular, key=_rank)]:
        lacking = [name for name in NAMES if name not in found]
        if lacking and FaceFlags.SCALABLE in _font(family).face_flags:
            found |= {name: family for name in lacking if has_letters(family, own_name(name))}
    return found


def has_letters(family: str, text: str) -> bool:
    return all(map(_font(family).get_char_index, map(ord, "".join(text.split()))))


def _font(family: str) -> FT2Font:
    """What matplotlib draws the family's regular weight with."""
    return font_manager.get_font(font_manager.findfont(font_manager.FontProperties(family=[family])))


def _rank(family: str) -> tuple:
    """Sort key: sans serif before other fonts, and for Chinese the simplified letters (`SC`) of a region's several."""
    words = family.split()
    return "Sans" not in words, "Mono" in words, "SC" not in words, family
