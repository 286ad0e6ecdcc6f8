"""Tables as Markdown, LaTeX or CSV text, in which names mean nothing but themselves."""

import html
from collections.abc import Callable
from contextlib import suppress

import pandas as pd

from soteria.terminal import one_line

_LATEX = {"\\": r"\textbackslash{}", "^": r"\textasciicircum{}", "~": r"\textasciitilde{}"}
_LATEX |= {character: "\\" + character for character in "&%$#_{}"}
_FORMULAS = ("=", "+", "-", "@")  # a spreadsheet computes cells that begin so


def escape_markdown(text: str) -> str:
    """Text that Markdown shows as it is: no HTML, and no new cell or line."""
    return html.escape(one_line(text), quote=False).replace("|", "&#124;")


def to_markdown(table: pd.DataFrame) -> str:
    """A pipe table whose columns are padded, so that the source is readable too."""
    cells = [list(table.columns), *table.astype(str).to_numpy().tolist()]
    cells = [list(map(escape_markdown, row)) for row in cells]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [f"| {' | '.join(map(str.ljust, row, widths))} |" for row in cells]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines) + "\n"


def to_latex(table: pd.DataFrame, caption: str) -> str:
    """A table with booktabs rules and a caption."""
    caption = "".join(_LATEX.get(character, character) for character in one_line(caption))
    latex = _each_text(table, one_line).to_latex(index=False, escape=True, caption=caption)
    return latex.replace("→", r"$\to$").replace("−", "-")


def to_csv(table: pd.DataFrame) -> str:
    """Text whose cells no spreadsheet takes for formulas: those that begin like one are put after an apostrophe."""
    return _each_text(table, _no_formula).to_csv(index=False, lineterminator="\n")


def _no_formula(text: str) -> str:
    text = one_line(text)
    with suppress(ValueError):
        float(text)
        return text
    return "'" + text if text.startswith(_FORMULAS) else text


def _each_text(table: pd.DataFrame, change: Callable[[str], str]) -> pd.DataFrame:
    """The table with its texts changed, names of columns included; all else stays as it is."""
    table = table.rename(columns=lambda name: change(name) if isinstance(name, str) else name)
    for at in range(table.shape[1]):
        texts = {value: change(value) for value in table.iloc[:, at] if isinstance(value, str)}
        if any(text != value for value, text in texts.items()):
            changed = [texts.get(value, value) if isinstance(value, str) else value for value in table.iloc[:, at]]
            table.isetitem(at, pd.Series(changed, index=table.index, dtype=object))
    return table
