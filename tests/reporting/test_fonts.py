"""Languages' own names: which font writes them, what stands there without one, and what a PDF gets of a font."""

import os
import re
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.t2CharStringPen import T2CharStringPen
from fontTools.pens.ttGlyphPen import TTGlyphPen
from fontTools.ttLib import TTFont
from matplotlib import font_manager
from matplotlib import pyplot as plt
from matplotlib.ft2font import FT2Font
from matplotlib.path import Path as MplPath
from test_figures import FIGURES, NAMES, touching

from soteria.errors import UserError
from soteria.reporting import figures, fonts

pytestmark = pytest.mark.filterwarnings("error:Glyph")  # a letter without a font

DEJAVU = font_manager.findfont("DejaVu Sans")
WRITTEN_BY_DEJAVU = ["English", "Spanish", "German", "French", "Arabic", "Bulgarian", "Swahili"]


@pytest.fixture
def installed(monkeypatch):
    """`installed(*paths)`: from now on these are the system's fonts."""
    monkeypatch.delenv("MPL_IGNORE_SYSTEM_FONTS", raising=False)  # matplotlib would not use them

    def install(*paths: str | Path) -> None:
        monkeypatch.setattr(fonts, "installed_fonts", lambda: list(map(str, paths)))
        fonts.chosen_families.cache_clear()

    yield install
    fonts.chosen_families.cache_clear()


def curve(pen) -> None:
    """A leaf of two cubic curves, 600 by 500 units."""
    pen.moveTo((100, 0))
    pen.curveTo((100, 300), (300, 500), (700, 500))
    pen.curveTo((700, 200), (500, 0), (100, 0))
    pen.closePath()


def line(pen) -> None:
    pen.moveTo((100, 0))
    for point in ((100, 500), (700, 500), (700, 0)):
        pen.lineTo(point)
    pen.closePath()


def some_font(path: Path, letters: str, family: str = "Some Sans", *, weight: int = 400, cff: bool = False) -> Path:
    """A font in which each of the letters is the same leaf (cff: PostScript's outlines) or block."""
    names = [".notdef", *(f"u{ord(letter):04X}" for letter in letters)]
    builder = FontBuilder(1000, isTTF=not cff)
    builder.setupGlyphOrder(names)
    builder.setupCharacterMap({ord(letter): name for letter, name in zip(letters, names[1:], strict=True)})
    pen = T2CharStringPen(800, None) if cff else TTGlyphPen(None)
    (curve if cff else line)(pen)
    if cff:
        letter = pen.getCharString()
        builder.setupCFF("Some", {}, dict.fromkeys(names, letter), {})
    else:
        builder.setupGlyf(dict.fromkeys(names, pen.glyph()))
    builder.setupHorizontalMetrics(dict.fromkeys(names, (800, 100)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": family, "styleName": "Regular", "psName": path.stem})
    builder.setupOS2(usWeightClass=weight)
    builder.setupPost()
    builder.save(path)
    return path


def drawn(text: str) -> plt.Figure:
    with plt.rc_context({"font.family": fonts.families()}):
        figure = plt.figure(figsize=(3, 1))
        figure.text(0.1, 0.5, text)
    plt.close(figure)
    return figure


def file_of(language: str) -> Path:
    return Path(font_manager.findfont(font_manager.FontProperties(family=[fonts.chosen_families()[language]])))


# Names and labels


def test_a_languages_own_name_is_cldrs():
    assert [fonts.own_name(name) for name in ("Hindi", "Arabic", "Chinese", "German", "Swahili")] == [
        "हिन्दी",
        "العربية",
        "中文",
        "Deutsch",
        "Kiswahili",
    ]
    with pytest.raises(UserError, match="unknown language 'Klingon'"):
        fonts.own_name("Klingon")


def test_a_label_is_the_english_name_and_the_own_name_or_one_where_they_are_the_same():
    labels = fonts.language_labels(["English", "Bulgarian", "base"])
    assert labels == {"English": "English", "Bulgarian": "Bulgarian  български", "base": "base"}
    assert fonts.language_labels(["Bulgarian"], own_names=False) == {"Bulgarian": "Bulgarian"}


# Without fonts


def test_with_dejavu_only_languages_that_it_cannot_write_stand_in_english_and_the_mend_is_named(installed):
    installed(DEJAVU)
    labels = fonts.language_labels(fonts.NAMES)
    assert [name for name in fonts.NAMES if labels[name] == name] == [
        "English", "Chinese", "Thai", "Hindi", "Bengali", "Tamil", "Telugu"
    ]  # fmt: skip
    assert list(fonts.chosen_families()) == [name for name in fonts.NAMES if name in WRITTEN_BY_DEJAVU]
    message = fonts.missing_fonts()
    assert message.startswith("no font has the letters of Chinese, Thai, Hindi, Bengali, Tamil, Telugu: ")
    assert "apt-get install fonts-noto-core fonts-noto-cjk" in message and "\n" not in message
    assert fonts.missing_fonts(["Hindi", "French"]).startswith("no font has the letters of Hindi: ")
    assert fonts.missing_fonts(["French"]) == ""


@pytest.mark.parametrize("name", ["effects of two languages", "overlaps", "ASR"])
def test_with_dejavu_only_figures_are_drawn_without_a_letter_missing(name, installed, tmp_path):
    installed(DEJAVU)
    figure = FIGURES[name]()
    assert touching(figure) == []
    figures.save(figure, tmp_path / "a.png")


def test_where_a_language_has_no_font_the_others_still_have_theirs(installed, tmp_path):
    installed(some_font(tmp_path / "a.ttf", "ไทย"))
    assert fonts.language_labels(["Thai", "Hindi"]) == {"Thai": "Thai  ไทย", "Hindi": "Hindi"}


# With fonts


def test_a_font_that_matplotlib_has_not_listed_writes_the_language(installed, tmp_path):
    path = some_font(tmp_path / "new.ttf", "ไทย")
    assert str(path) not in {entry.fname for entry in font_manager.fontManager.ttflist}
    installed(DEJAVU, path)
    assert fonts.families() == ["DejaVu Sans", fonts.chosen_families()["Thai"]]
    assert file_of("Thai") == path
    drawn(fonts.language_labels(["Thai"])["Thai"]).draw_without_rendering()


def test_a_font_that_lacks_one_letter_of_the_name_is_not_taken(installed, tmp_path):
    installed(some_font(tmp_path / "a.ttf", "ไท"), some_font(tmp_path / "b.ttf", "ไทย", "Some Serif"))
    assert file_of("Thai").name == "b.ttf"


@pytest.mark.parametrize("backwards", [False, True])
def test_sans_regular_truetype_is_taken_first_whatever_the_order_of_the_files(backwards, installed, tmp_path):
    worse = [
        some_font(tmp_path / "0.ttf", "ไทย", "Some Serif"),
        some_font(tmp_path / "1.ttf", "ไทย", weight=700),
        some_font(tmp_path / "2.otf", "ไทย", cff=True),
        some_font(tmp_path / "3.ttf", "ไทย", "Some Sans Mono"),
    ]
    best, same = some_font(tmp_path / "4.ttf", "ไทย"), some_font(tmp_path / "5.ttf", "ไทย")
    paths = [*worse, same, best]
    installed(*(paths[::-1] if backwards else paths))
    assert file_of("Thai") == best


def test_a_damaged_font_is_passed_over(installed, tmp_path):
    (tmp_path / "a.ttf").write_bytes(b"\0\1\0\0 no font")
    installed(tmp_path / "a.ttf", tmp_path / "gone.ttf", some_font(tmp_path / "b.ttf", "ไทย"))
    assert file_of("Thai").name == "b.ttf"


def test_a_font_without_outlines_is_passed_over(installed, tmp_path):
    with TTFont(some_font(tmp_path / "a.ttf", "ไทย")) as font:
        for table in ("glyf", "loca"):
            del font[table]
        font.save(tmp_path / "bitmaps.ttf")
    installed(tmp_path / "bitmaps.ttf")
    assert "Thai" not in fonts.chosen_families()


def test_languages_with_one_font_share_it(installed, tmp_path):
    installed(some_font(tmp_path / "a.otf", "中文ไทย", cff=True))
    assert fonts.families() == ["DejaVu Sans", fonts.chosen_families()["Thai"]]
    drawn("中文ไทย").draw_without_rendering()


def test_fonts_are_looked_for_once(installed, monkeypatch):
    installed(DEJAVU)
    calls = []
    monkeypatch.setattr(fonts, "installed_fonts", lambda: calls.append(1) or [])
    for _ in range(3):
        fonts.families(), fonts.language_labels(NAMES), fonts.missing_fonts()
    assert calls == [1]


def test_bold_labels_are_drawn_without_complaint(installed, tmp_path, caplog):
    installed(some_font(tmp_path / "a.ttf", "ไทย"))
    with plt.rc_context({"font.family": fonts.families()}):
        figure = plt.figure()
        figure.text(0.1, 0.5, "Thai  ไทย", weight="bold")
    plt.close(figure)
    figure.draw_without_rendering()
    assert caplog.text == ""


# PDFs


def pdf_fonts(path: Path) -> list[bytes]:
    """The font files in a PDF, by their first four bytes."""
    streams = []
    for stream in re.findall(rb"stream\r?\n(.*?)\r?\nendstream", path.read_bytes(), re.DOTALL):
        try:
            streams.append(zlib.decompress(stream)[:4])
        except zlib.error:
            continue
    return [start for start in streams if start in (b"\0\1\0\0", b"OTTO", b"true")]


def test_postscript_outlines_are_made_truetype_of_the_same_shape(installed, tmp_path):
    path = some_font(tmp_path / "a.otf", "中文", cff=True)
    installed(path)
    made = file_of("Chinese")
    assert made != path and made.read_bytes()[:4] == b"\0\1\0\0"
    before, after = (shape_of(FT2Font(str(file)), "中") for file in (path, made))
    assert before == pytest.approx(after, rel=0.01)


def shape_of(font: FT2Font, letter: str) -> list[float]:
    """A letter's box and width in a font's units of a thousandth, and its inked area."""
    font.set_size(1000, 72)
    glyph = font.load_char(ord(letter))
    (outline,) = MplPath(*font.get_path()).to_polygons()
    x, y = outline.T
    area = abs(float(np.dot(x[:-1], y[1:]) - np.dot(y[:-1], x[1:]))) / 2
    return [side / 64 for side in glyph.bbox] + [glyph.linearHoriAdvance / 65536, area]


@pytest.mark.parametrize("cff", [False, True], ids=["TrueType", "PostScript outlines"])
def test_a_pdf_embeds_truetype_fonts_only_with_the_own_names_letters(cff, installed, tmp_path):
    installed(some_font(tmp_path / "a.otf", "中文ไทย", cff=cff))
    figure = drawn("\n".join(fonts.language_labels(["Chinese", "Thai"]).values()))
    _, pdf = figures.save(figure, tmp_path / "a.png")
    assert pdf_fonts(pdf) == [b"\0\1\0\0"] * 2
    assert b"/Type3" not in pdf.read_bytes()


DRAW_ELSEWHERE = """
import sys
from matplotlib import pyplot as plt
from soteria.reporting import fonts
fonts.installed_fonts = lambda: [sys.argv[1]]
with plt.rc_context({"font.family": fonts.families(), "pdf.fonttype": 42}):
    plt.figure().text(0.1, 0.5, fonts.language_labels(["Chinese"])["Chinese"])
    for kind, facts in (("png", {}), ("pdf", {"CreationDate": None})):
        plt.savefig(f"{sys.argv[2]}.{kind}", metadata=facts)
print(fonts._own_folder())
"""


def test_processes_write_the_same_bytes_and_leave_no_font_behind(tmp_path):
    font = some_font(tmp_path / "a.otf", "中文", cff=True)
    places = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "MPLBACKEND": "agg"}
    written = []
    for run in ("1", "2"):
        command = [sys.executable, "-c", DRAW_ELSEWHERE, font, tmp_path / run]
        own = {"PYTHONHASHSEED": run, "MPL_IGNORE_SYSTEM_FONTS": ""}
        done = subprocess.run(command, check=True, env=os.environ | places | own, timeout=120, capture_output=True)
        assert not Path(done.stdout.decode().strip()).exists()
        written.append([(tmp_path / f"{run}.{kind}").read_bytes() for kind in ("png", "pdf")])
    assert written[0] == written[1]


# This machine's fonts


def test_this_machines_fonts_write_every_label_and_the_picture_says_so():
    labels = fonts.language_labels(fonts.NAMES)
    missing = [name for name in fonts.NAMES if name not in fonts.chosen_families()]
    assert bool(fonts.missing_fonts()) == bool(missing)
    drawn("\n".join(labels.values())).draw_without_rendering()


def test_an_installed_font_that_needs_joining_rules_has_them():
    languages = [name for name in ("Hindi", "Bengali", "Tamil", "Telugu") if name in fonts.chosen_families()]
    if not languages:
        pytest.skip(fonts.missing_fonts())
    for name in languages:
        with TTFont(file_of(name), lazy=True) as font:
            assert "GSUB" in font
