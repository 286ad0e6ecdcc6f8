"""All figures: their text is readable, and their files are whole and always the same."""

import os
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from figure_samples import FIGURES, touching
from matplotlib import colors
from matplotlib import pyplot as plt
from matplotlib.text import Text

from soteria.reporting import figures, steering_figures

pytestmark = pytest.mark.filterwarnings("error:Glyph")  # a letter without a font


@pytest.mark.parametrize("name", FIGURES)
def test_text_touches_nothing_and_is_not_small_and_the_figure_fits_a_page(name):
    figure = FIGURES[name]()
    assert touching(figure) == []
    assert min(text.get_fontsize() for text in figure.findobj(Text) if text.get_text().strip()) >= 7
    assert figure.get_tightbbox().width <= figures.WIDTH + 0.02  # inches
    assert plt.get_fignums() == []


def test_the_users_own_style_changes_nothing(tmp_path):
    own = {
        "axes.grid": True,
        "lines.linewidth": 9,
        "font.family": "serif",
        "savefig.facecolor": "red",
        "pdf.compression": 0,
    }
    for folder, style in (("own", own), ("none", {})):
        with plt.rc_context(style):
            figures.save(next(iter(FIGURES.values()))(), tmp_path / folder / "a.png")
    for name in ("a.png", "a.pdf"):
        assert (tmp_path / "own" / name).read_bytes() == (tmp_path / "none" / name).read_bytes()


def test_touching_texts_are_found():
    figure, axes = plt.subplots()
    plt.close(figure)
    axes.text(0.5, 0.5, "one"), axes.text(0.5, 0.5, "other")
    assert touching(figure) == [("one", "other")]


def test_marks_differ_in_shape_lines_in_dashes_bars_in_hatches_and_tiers_in_gray():
    for styles in (figures.TIER_STYLES, steering_figures.LINES, steering_figures.COSTS):
        for parts in zip(*styles.values(), strict=True):
            assert len(set(parts)) == len(parts)
    for parts in zip(*steering_figures.SHARE_LINES, strict=True):
        assert len(set(parts)) == len(parts)
    hatches = [bar.get("hatch") for bar in steering_figures.BARS.values()]
    assert len(set(hatches)) == len(hatches)
    grays = [
        np.dot(colors.to_rgb(figures.TIER_STYLES[tier][0]), (0.299, 0.587, 0.114)) for tier in ("High", "Mid", "Low")
    ]
    assert min(abs(a - b) for a, b in combinations(grays, 2)) > 0.2


SAVE_ELSEWHERE = """
import sys
from pathlib import Path
from figure_samples import FIGURES
from soteria.reporting import figures
figures.save(FIGURES["overlaps"](), Path(sys.argv[1]))
"""


def test_another_process_without_a_display_writes_the_same_bytes(tmp_path):
    kept = {
        name: value for name, value in os.environ.items() if name not in ("DISPLAY", "WAYLAND_DISPLAY", "MPLBACKEND")
    }
    places = {
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)]),
        "PYTHONHASHSEED": "7",
    }
    command = [sys.executable, "-c", SAVE_ELSEWHERE, tmp_path / "other" / "a.b.png"]
    subprocess.run(command, check=True, env=kept | places, timeout=120)
    written = figures.save(FIGURES["overlaps"](), tmp_path / "here" / "a.b.png")
    assert [path.name for path in written] == ["a.b.png", "a.b.pdf"]
    for path in written:
        assert path.read_bytes() == (tmp_path / "other" / path.name).read_bytes()
    png, pdf = (path.read_bytes() for path in written)
    assert png.startswith(b"\x89PNG") and pdf.startswith(b"%PDF")
    assert b"Date" not in pdf and b"/Type3" not in pdf


def test_a_figure_that_cannot_be_saved_as_both_leaves_neither(tmp_path, monkeypatch):
    figure = FIGURES["ASR of one"]()
    print_to = figure.savefig

    def full_disk(path, format, **options):
        print_to(path, format=format, **options)
        if format == "pdf":
            raise OSError("no space left on device")

    monkeypatch.setattr(figure, "savefig", full_disk)
    with pytest.raises(OSError, match="no space"):
        figures.save(figure, tmp_path / "a.png")
    assert not list(tmp_path.iterdir())
