"""Languages' own names on pictures, and installed fonts with their letters. Knows fonts; draws nothing.

`language_labels` gives what to write, `families` the fonts to write it with; where no font has a language's letters,
`missing_fonts` says so and how to mend it. Fonts are looked for once a process.
"""

import atexit
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp

from babel import Locale
from fontTools import subset
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.cu2quPen import Cu2QuPen
from fontTools.pens.ttGlyphPen import TTGlyphPen
from fontTools.ttLib import TTFont, TTLibError
from matplotlib import font_manager
from matplotlib.ft2font import FT2Font, StyleFlags

from soteria.languages import LANGUAGES, find_language

FIRST = "DejaVu Sans"  # comes with matplotlib; has Latin, Cyrillic and Arabic letters
NAMES = [language.name for language in LANGUAGES]
MEND = "apt-get install fonts-noto-core fonts-noto-cjk, or any font with these letters"


@dataclass(frozen=True, order=True)
class Face:
    """One typeface of a font file; a collection (.ttc) has several."""

    path: str
    index: int

    @property
    def family(self) -> str:
        """Its name in matplotlib's list."""
        return f"{self.path}#{self.index}"


@cache
def own_name(language: str) -> str:
    """A language's name in itself, as CLDR has it (`हिन्दी` for Hindi). Raises UserError for an unknown language."""
    return Locale.parse(find_language(language).code, sep="-").get_language_name()


def language_labels(names: list[str], own_names: bool = True) -> dict[str, str]:
    """What a picture calls languages: `Hindi  हिन्दी`, or `Hindi` where no font has the letters or `own_names` is False.

    A language that calls itself what English calls it stands there once, and so does a name that is no language's.
    """
    own = {name: own_name(name) for name in chosen_families()} if own_names else {}
    return {name: f"{name}  {own[name]}" if own.get(name, name) != name else name for name in names}


def families() -> list[str]:
    """For `font.family`: DejaVu Sans, then what has the letters that it lacks."""
    return list(dict.fromkeys([FIRST, *chosen_families().values()]))


def missing_fonts(names: list[str] | None = None) -> str:
    """Which of the languages (default: all) no installed font can write, and how to mend it; empty if there is none."""
    missing = [name for name in names or NAMES if name in NAMES and name not in chosen_families()]
    if not missing:
        return ""
    return f"no font has the letters of {', '.join(missing)}: pictures name them in English only; mend: {MEND}"


@cache
def chosen_families() -> dict[str, str]:
    """Per language, the family that writes its own name; languages that no font can write are left out.

    The same fonts give the same choice. Families other than DejaVu's get names of their own in matplotlib's list: it
    was stored before a font was installed, perhaps, and of several files of one name it takes any.
    """
    first, texts = FT2Font(font_manager.findfont(FIRST)), {name: own_name(name) for name in NAMES}
    lacking = {name: text for name, text in texts.items() if not has_letters(first, text)}
    faces = best_faces(lacking)
    for face in dict.fromkeys(faces.values()):
        register(face, "".join(text for name, text in lacking.items() if faces.get(name) == face))
    covered = [name for name in NAMES if name in faces or name not in lacking]
    return {name: faces[name].family if name in faces else FIRST for name in covered}


def installed_fonts() -> list[str]:
    """Paths of the system's fonts, as they are now; none under MPL_IGNORE_SYSTEM_FONTS."""
    return font_manager.findSystemFonts()


def best_faces(texts: dict[str, str]) -> dict[str, Face]:
    """Per key, the installed typeface that suits its text best, of those with all its letters."""
    found: dict[str, list[tuple[tuple, Face]]] = {key: [] for key in texts}
    for path in installed_fonts():
        index, n_faces = 0, 1
        while index < n_faces:
            face = Face(path, index)
            try:
                font = FT2Font(path, face_index=index)
                n_faces = font.num_faces
                covered = [key for key, text in texts.items() if has_letters(font, text)]
                if covered and has_outlines(face):
                    for key in covered:
                        found[key].append((rank(font, face, "SC" if key == "Chinese" else ""), face))
            except (OSError, RuntimeError, TTLibError):  # a damaged file, or of a kind that is not known
                break
            index += 1
    return {key: min(faces)[1] for key, faces in found.items() if faces}


@cache
def tables_of(face: Face) -> frozenset[str]:
    """Names of the tables in a typeface: `glyf` holds TrueType's outlines, `CFF ` and `CFF2` PostScript's."""
    with TTFont(face.path, fontNumber=face.index, lazy=True) as font:
        return frozenset(font.keys())


def has_outlines(face: Face) -> bool:
    """Not so in fonts of bitmaps."""
    return bool({"glyf", "CFF ", "CFF2"} & tables_of(face))


def has_letters(font: FT2Font, text: str) -> bool:
    return all(font.get_char_index(ord(letter)) for letter in set(text))


def rank(font: FT2Font, face: Face, region: str) -> tuple:
    """How badly a typeface suits labels beside DejaVu Sans, lowest first; no two are equal.

    Sans, upright, regular, and with rules for joining letters, before others; `region` is a word of the family's name
    (`SC`: simplified Chinese). Of equal ones, TrueType outlines need no work.
    """
    os2 = font.get_sfnt_table("OS/2") or {"panose": bytes(10), "usWeightClass": 400}
    name = font.family_name.casefold().split()
    return (
        "GSUB" not in tables_of(face),
        "sans" not in name,
        not 11 <= os2["panose"][1] <= 15,  # Panose's classes of sans serif
        "mono" in name,
        font.style_flags != StyleFlags.NORMAL,
        abs(os2["usWeightClass"] - 400),
        bool(region) and region.casefold() not in name,
        "glyf" not in tables_of(face),
        font.family_name,
        font.style_name,
        face.path,
        face.index,
    )


def register(face: Face, text: str) -> None:
    """Make a typeface known to matplotlib, in regular and bold: one file for both is enough for a text of labels."""
    known = font_manager.fontManager.ttflist
    if any(entry.name == face.family for entry in known):
        return
    path, index = (face.path, face.index) if "glyf" in tables_of(face) else (str(as_truetype(face, text)), 0)
    known.extend(font_manager.FontEntry(path, index, face.family, weight=weight) for weight in (400, 700))


@cache
def _own_folder() -> Path:
    folder, owner = mkdtemp(prefix="soteria-fonts-"), os.getpid()
    atexit.register(lambda: os.getpid() == owner and rmtree(folder, ignore_errors=True))  # a forked child leaves it
    return Path(folder)


def as_truetype(face: Face, text: str) -> Path:
    """A TrueType file of a text's letters, from a typeface with PostScript outlines (CFF) such as Noto Sans CJK's.

    matplotlib 3.11 embeds such outlines in a PDF under TrueType's name; Ghostscript and MuPDF then leave them blank.
    """
    options = subset.Options(font_number=face.index, layout_features=["*"], notdef_outline=True)
    subsetter = subset.Subsetter(options)
    subsetter.populate(text=text)
    with subset.load_font(face.path, options) as font:
        subsetter.subset(font)
        outlines, glyphs = font.getGlyphSet(), {}
        for glyph in font.getGlyphOrder():
            pen = TTGlyphPen(None)
            # Quadratic curves within a thousandth of the letters' height; TrueType's outlines run the other way round.
            outlines[glyph].draw(Cu2QuPen(pen, font["head"].unitsPerEm / 1000, reverse_direction=True))
            glyphs[glyph] = pen.glyph()
        widths = {glyph: font["hmtx"][glyph][0] for glyph in glyphs}
        for table in {"CFF ", "CFF2", "VORG"} & set(font.keys()):
            del font[table]
        builder = FontBuilder(font=font)
        builder.isTTF, font.sfntVersion = True, "\0\1\0\0"
        builder.setupGlyf(glyphs)
        builder.setupMaxp()
        builder.setupHorizontalMetrics({glyph: (width, font["glyf"][glyph].xMin) for glyph, width in widths.items()})
        builder.setupPost()
        path = _own_folder() / f"{len(list(_own_folder().iterdir()))}.ttf"
        font.save(path)
    return path
