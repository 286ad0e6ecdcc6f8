"""The style that all figures share, and writing them to files.

Figures are readable in print, in grayscale and without color vision: marks differ in shape, and lines in dashes, as
well as in color. A figure has its printed size, so that its type prints as large as it is set here.
"""

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import wraps
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib import patheffects
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.transforms import ScaledTranslation

from soteria.languages import find_language
from soteria.reporting import fonts
from soteria.storage import files

NO_TIER = "no tier"
# Color, marker and line of a tier: the colors are Okabe and Ito's, and differ in lightness.
TIER_STYLES = {
    "High": ("#0072B2", "o", "-"),
    "Mid": ("#E69F00", "s", "--"),
    "Low": ("#000000", "^", ":"),
    NO_TIER: ("#CC79A7", "X", "-."),
}
WIDTH = 6.3  # inches: the text of an A4 page
PRINT = {"font.size": 8, "axes.titlesize": 8, "axes.labelsize": 8, "legend.fontsize": 8, "figure.titlesize": 9}


def printed(plot: Callable[..., plt.Figure]) -> Callable[..., plt.Figure]:
    """Decorator of a plot: it is drawn in the style of print, with fonts for languages' own names, and then closed.

    A notebook shows the returned figure; one that is still open would appear twice.
    """

    @wraps(plot)
    def drawn(*arguments, **options) -> plt.Figure:
        with plt.style.context(["default", PRINT | {"font.family": fonts.families()}]):
            figure = plot(*arguments, **options)
        plt.close(figure)
        return figure

    return drawn


def save(figure: plt.Figure, path: Path) -> list[Path]:
    """Write `path`, a PNG of 200 dpi, and a PDF beside it, both or neither; returns their paths.

    The same figure gives the same bytes, whatever the user's own style: the files hold no date.
    """
    name = path.name.removesuffix(".png")
    png, pdf = (path.with_name(f"{name}.{kind}") for kind in ("png", "pdf"))
    # In the PDF, letters that DejaVu Sans lacks are shapes: Ghostscript and MuPDF leave Noto Sans CJK's blank as
    # matplotlib 3.11 embeds them. Publishers refuse fonts of type 3, matplotlib's default.
    others = [text for text in figure.findobj(Text) if not fonts.has_letters(fonts.FIRST, text.get_text())]
    with ExitStack() as written, plt.style.context(["default", {"pdf.fonttype": 42}]):
        figure.savefig(written.enter_context(files.whole_file(png)), format="png", dpi=200, bbox_inches="tight")
        for text in others:
            written.callback(text.set_path_effects, text.get_path_effects())
            text.set_path_effects(text.get_path_effects() or [patheffects.Normal()])
        sibling = written.enter_context(files.whole_file(pdf))
        figure.savefig(sibling, format="pdf", dpi=200, bbox_inches="tight", metadata={"CreationDate": None})
    return [png, pdf]


def tier_of(language: str) -> str:
    """A language's tier, for a legend. Raises UserError for an unknown language."""
    return find_language(language).tier or NO_TIER


def tier_marks(languages: Iterable[str]) -> list[Line2D]:
    """For a legend: the marks of the tiers that the languages belong to."""
    used = set(map(tier_of, languages))
    return [
        Line2D([], [], color=color, marker=marker, linestyle="", label=tier)
        for tier, (color, marker, _) in TIER_STYLES.items()
        if tier in used
    ]


def mark_tiers(axes: Axes, columns: list[str], rows: list[str]) -> None:
    """The tiers' marks of a matrix's languages, 6 points above the columns and to the right of the first rows."""
    above = axes.get_xaxis_transform() + ScaledTranslation(0, 6 / 72, axes.figure.dpi_scale_trans)
    beside = axes.get_yaxis_transform() + ScaledTranslation(6 / 72, 0, axes.figure.dpi_scale_trans)
    spots = [(language, above, i, 1) for i, language in enumerate(columns)]
    for language, place, x, y in [*spots, *((language, beside, 1, i) for i, language in enumerate(rows))]:
        color, marker, _ = TIER_STYLES[tier_of(language)]
        look = {"markersize": 4.5, "clip_on": False, "scalex": False, "scaley": False}
        axes.plot(x, y, marker, color=color, transform=place, **look)


def draw_matrix(axes: Axes, table: pd.DataFrame, texts: np.ndarray, labels: dict[str, str], top: float) -> AxesImage:
    """A table's cells in color, from 0 to `top`, with their texts; NaN is left white. `labels` name both axes."""
    image = axes.imshow(table, cmap="viridis", vmin=0, vmax=top, aspect="auto")
    columns = [labels[name] for name in table.columns]
    axes.set_xticks(range(len(columns)), columns, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(table)), [labels[name] for name in table.index])
    for (row, column), value in np.ndenumerate(table):
        if not np.isnan(value):
            color = "w" if value < 0.6 * top else "k"  # the map is dark below
            axes.text(column, row, texts[row, column], ha="center", va="center", fontsize=7, color=color)
    return image
