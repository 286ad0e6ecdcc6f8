"""Languages' own names: which font writes them, and what appears without one."""

from pathlib import Path

import pytest
from figure_samples import FIGURES, touching
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager
from matplotlib import pyplot as plt
from matplotlib.text import Text

from soteria.errors import UserError
from soteria.reporting import figures, fonts

pytestmark = pytest.mark.filterwarnings("error:Glyph")  # a letter without a font


@pytest.fixture
def installed(monkeypatch):
    """`installed(*paths)`: from now on these are the system's fonts, and matplotlib's list is from before."""
    own = [font for font in font_manager.fontManager.ttflist if "mpl-data" in font.fname]

    def install(*paths: Path) -> None:
        monkeypatch.setattr(font_manager.fontManager, "ttflist", list(own))
        monkeypatch.setattr(font_manager, "findSystemFonts", lambda: list(map(str, paths)))
        fonts.chosen_families.cache_clear()

    yield install
    fonts.chosen_families.cache_clear()


def some_font(path: Path, letters: str, family: str, *, bold: bool = False) -> Path:
    """A font in which each of the letters is a block."""
    names = [".notdef", *(f"u{ord(letter):04X}" for letter in letters)]
    builder, pen = FontBuilder(1000), TTGlyphPen(None)
    builder.setupGlyphOrder(names)
    builder.setupCharacterMap({ord(letter): name for letter, name in zip(letters, names[1:], strict=True)})
    pen.moveTo((100, 0))
    for point in ((100, 500), (700, 500), (700, 0)):
        pen.lineTo(point)
    pen.closePath()
    builder.setupGlyf(dict.fromkeys(names, pen.glyph()))
    builder.setupHorizontalMetrics(dict.fromkeys(names, (800, 100)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    style = "Bold" if bold else "Regular"
    builder.setupNameTable({"familyName": family, "styleName": style, "psName": path.stem})
    builder.setupOS2(usWeightClass=700 if bold else 400)
    builder.setupPost()
    builder.save(path)
    return path


def test_an_own_name_is_cldrs_and_a_label_names_a_language_in_both_ways_or_once():
    wanted = {"Hindi": "हिन्दी", "Arabic": "العربية", "Chinese": "中文", "German": "Deutsch", "Swahili": "Kiswahili"}
    assert {name: fonts.own_name(name) for name in wanted} == wanted
    with pytest.raises(UserError, match="Klingon"):
        fonts.own_name("Klingon")
    labels = fonts.language_labels(["English", "Bulgarian", "base"])
    assert labels == {"English": "English", "Bulgarian": "Bulgarian  български", "base": "base"}


def test_without_fonts_languages_appear_in_english_and_the_fix_is_named(installed, tmp_path):
    installed()
    missing = ["Chinese", "Thai", "Hindi", "Bengali", "Tamil", "Telugu", "Korean", "Japanese"]
    labels = fonts.language_labels(fonts.NAMES)
    assert [name for name in fonts.NAMES if labels[name] == name] == ["English", *missing]
    assert fonts.families() == ["DejaVu Sans"]
    message = fonts.missing_fonts()
    assert ", ".join(missing) in message and "apt-get install fonts-noto-core fonts-noto-cjk" in message
    assert "\n" not in message
    assert "Hindi" in fonts.missing_fonts(["Hindi", "French"]) and "Tamil" not in fonts.missing_fonts(["Hindi"])
    assert fonts.missing_fonts(["French"]) == ""
    figure = FIGURES["overlaps"]()
    assert touching(figure) == []
    figures.save(figure, tmp_path / "a.png")


def test_a_font_that_matplotlib_has_not_listed_is_found_and_only_languages_without_one_are_in_english(
    installed, tmp_path, monkeypatch
):
    installed(some_font(tmp_path / "new.ttf", "ไทย", "Unlisted Sans"))
    assert fonts.language_labels(["Thai", "Hindi"]) == {"Thai": "Thai  ไทย", "Hindi": "Hindi"}
    assert fonts.families() == ["DejaVu Sans", "Unlisted Sans"]
    monkeypatch.setattr(font_manager, "findSystemFonts", None)  # they are looked up once
    figure = FIGURES["transfer of three"]()
    assert figure.axes[0].yaxis.label.get_fontfamily() == fonts.families()
    fonts.families(), fonts.missing_fonts(), fonts.language_labels(["Thai"])


def test_sans_regular_fonts_with_every_letter_are_chosen_first_and_damaged_ones_are_skipped(installed, tmp_path):
    (tmp_path / "damaged.ttf").write_bytes(b"\0\1\0\0 not a font")
    candidates = [
        some_font(tmp_path / "0.ttf", "ไท", "A Lacking Sans"),
        some_font(tmp_path / "1.ttf", "ไทย", "A Serif"),
        some_font(tmp_path / "2.ttf", "ไทย", "A Bold Sans", bold=True),
        some_font(tmp_path / "3.ttf", "ไทย", "A Sans Mono"),
        some_font(tmp_path / "4.ttf", "ไทย", "Best Sans"),
        some_font(tmp_path / "5.ttf", "中文", "Best Sans TC"),
        some_font(tmp_path / "6.ttf", "中文", "Best Sans SC"),
    ]
    for paths in (candidates, candidates[::-1]):
        installed(tmp_path / "damaged.ttf", tmp_path / "gone.ttf", *paths)
        assert (fonts.chosen_families()["Thai"], fonts.chosen_families()["Chinese"]) == ("Best Sans", "Best Sans SC")


def test_this_machines_fonts_write_every_label(tmp_path):
    labels = fonts.language_labels(fonts.NAMES).values()
    assert bool(fonts.missing_fonts()) == (len(fonts.chosen_families()) < len(fonts.NAMES))
    with plt.rc_context({"font.family": fonts.families()}):
        figure = plt.figure(figsize=(3, 3))
        for line, label in enumerate(labels):
            figure.text(0.1, 0.05 + line / 14, label)
    plt.close(figure)
    others = [text for text in figure.findobj(Text) if not fonts.has_letters("DejaVu Sans", text.get_text())]
    assert len(others) == sum(family != "DejaVu Sans" for family in fonts.chosen_families().values())
    _, pdf = figures.save(figure, tmp_path / "a.png")
    assert not any(text.get_path_effects() for text in others)
    # The other letters are shapes: of fonts, there is only DejaVu Sans.
    assert b"DejaVuSans" in pdf.read_bytes() and b"Noto" not in pdf.read_bytes() and b"/Type3" not in pdf.read_bytes()
