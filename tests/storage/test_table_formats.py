"""Tables as Markdown, LaTeX and CSV: names in them mean nothing but themselves."""

import io

import pandas as pd

from soteria.storage.table_formats import escape_markdown, to_csv, to_latex, to_markdown

NAMES = [
    "=cmd|' /C calc'!A0",
    "+1+2",
    "-2+3",
    "@SUM(A1)",
    "a|b",
    "<script>x</script>",
    "a\nb",
    "\x1b[31mred",
    "50% of $x_1$",
]
TABLE = pd.DataFrame(
    {"name": NAMES, "n": range(len(NAMES)), "rate": [-0.5] * len(NAMES), "<b>|": ["-0.25"] * len(NAMES)}
)


def test_a_markdown_table_has_one_line_a_row_and_no_html_or_control_characters():
    lines = to_markdown(TABLE).splitlines()
    assert len(lines) == 2 + len(NAMES) and {line.count("|") for line in lines} == {5}
    assert not set("<>\x1b") & set("".join(lines)) and "&lt;script&gt;" in "".join(lines)
    assert escape_markdown("λ = 2, 95 % interval; top 50% (a proxy).") == "λ = 2, 95 % interval; top 50% (a proxy)."


def test_no_cell_of_a_csv_is_a_formula_and_numbers_stay():
    read = pd.read_csv(io.StringIO(to_csv(TABLE)), dtype=str)
    assert not read["name"].str.startswith(("=", "+", "-", "@")).any()
    assert list(read["name"])[:4] == [f"'{name}" for name in NAMES[:4]]
    assert set(read["rate"]) == {"-0.5"} and set(read.iloc[:, 3]) == {"-0.25"}
    plain = pd.DataFrame(
        {"a": ["x", None, "– y"], "b": [1, None, 3], "c": [True, False, True], "d": ["-1.5", "+2", ""]}
    )
    assert to_csv(plain) == plain.to_csv(index=False, lineterminator="\n")


def test_a_latex_caption_and_its_cells_have_no_commands_of_their_own():
    caption = r"\input{/etc/passwd} 5% & $x_1$ #1 ^ ~ {a}"
    text = to_latex(TABLE, caption)
    assert r"\input" not in text and r"\textbackslash{}input\{/etc/passwd\} 5\% \& \$x\_1\$ \#1" in text
    assert r"\textasciicircum{} \textasciitilde{} \{a\}" in text
    assert "\x1b" not in text and r"50\% of \$x\_1\$" in text
