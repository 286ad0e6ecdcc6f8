"""A table as Markdown or LaTeX text."""

import pandas as pd


def to_markdown(table: pd.DataFrame) -> str:
    """A pipe table, columns padded so that the source can be read too."""
    cells = [list(table.columns), *table.astype(str).to_numpy().tolist()]
    widths = [max(len(row[i]) for row in cells) for i in range(len(table.columns))]
    lines = [
        "| " + " | ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines) + "\n"


def to_latex(table: pd.DataFrame, caption: str) -> str:
    """A table for a paper, with the rules of booktabs and a caption."""
    latex = table.to_latex(index=False, escape=True, caption=caption.replace("%", r"\%").replace("_", r"\_"))
    return latex.replace("→", r"$\to$").replace("−", "-")
