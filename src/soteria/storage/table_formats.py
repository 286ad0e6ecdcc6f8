"""Tables as Markdown or LaTeX text."""

import pandas as pd


def to_markdown(table: pd.DataFrame) -> str:
    """A pipe table whose columns are padded, so that the source is readable too."""
    cells = [list(table.columns), *table.astype(str).to_numpy().tolist()]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [f"| {' | '.join(map(str.ljust, row, widths))} |" for row in cells]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines) + "\n"


def to_latex(table: pd.DataFrame, caption: str) -> str:
    """A table with booktabs rules and a caption."""
    latex = table.to_latex(index=False, escape=True, caption=caption.replace("%", r"\%").replace("_", r"\_"))
    return latex.replace("→", r"$\to$").replace("−", "-")
