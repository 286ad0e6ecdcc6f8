"""A run as one HTML page to send to a colleague: nothing else is loaded, no script runs. Computes nothing.

Knows HTML, PNG and tables of cells; what the numbers mean, their text says. The page is `report.html.jinja`.
"""

import os
import platform
import re
import struct
import subprocess
from base64 import b64encode
from collections import Counter
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

import soteria
from soteria.errors import UserError
from soteria.storage import paths

PACKAGES = ("torch", "transformers", "numpy", "pandas", "scipy", "statsmodels")
OPTIONAL_PACKAGES = ("lm-eval",)
UNKNOWN = "unknown"

PNG = b"\x89PNG\r\n\x1a\n"
# What tables of results hold: 96, 0.024, 28.1% [20%, 38%] → 0%, 1.5e-08, +1.2 ± 0.3, < 0.001.
NUMBER = re.compile(r"(?=\D*\d)(?:[\s\d.,:;%+\-−–±×→/<>=≤≥~≈\[\]()*†‡]|(?<=\d)e(?=[+-]?\d))+")
DASHES = ("-", "–", "—")
# Answers of models hold whatever bytes they like. HTML has no place for these, and UTF-8 none for the last of them.
UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufffe\uffff\ud800-\udfff]")

MOST_DECIMALS = 4
LONGEST_KEY = 24  # letters of a cell that still names its row, as a language or a choice of heads does
MOST_KEYS = 3
LONGEST_LINE, LONGEST_CHANGE = 40, 20  # letters; beyond them a text, or a change on a phone, is broken into lines
PRINTED_WIDTH, LARGEST_TYPE, SMALLEST_TYPE = 510, 8.5, 5.0  # points, of an A4 page's text and of what tables are set in
LETTER_WIDTH = 0.56  # of the type's size, of digits in common sans-serif fonts


@dataclass(frozen=True)
class Section:
    """A part of the report. Blank lines part the paragraphs of `text`.

    A caption belongs to the table where there is one, else to the picture; without one, the title stands there.
    Floats in the table are shown with four decimals at most, a column alike: give text where more of them matter.
    An index that is not just the rows' numbers is the table's first column.
    """

    title: str
    text: str = ""
    table: pd.DataFrame | None = None
    caption: str = ""
    picture: Path | None = None  # a PNG
    alt: str = ""  # what the picture shows, for those who do not see it
    files: tuple[str, ...] = ()  # where the numbers lie, relative to the repository


def render_report(
    title: str,
    summary: list[str],
    sections: list[Section],
    facts: dict[str, str],
    grid_text: str,
    commands: list[str],
    not_run: list[str],
) -> str:
    """The page. The same input gives the same bytes.

    Raises UserError for a picture that is not a PNG, OSError for one that cannot be read.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_printable,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    counts = Counter()
    return environment.get_template("report.html.jinja").render(
        title=title,
        summary=summary,
        sections=[_lay_out(section, counts) for section in sections],
        facts=facts,
        grid_text=grid_text.strip("\n"),
        commands="\n".join(commands),
        not_run=not_run,
    )


def environment_facts() -> dict[str, str]:
    """What the run was made with: versions, machine, commit. Nothing in it names the user, the host or a folder."""
    facts = {"soteria": soteria.__version__, "commit": _commit(paths.ROOT), "Python": platform.python_version()}
    for package in (*PACKAGES, *OPTIONAL_PACKAGES):
        try:
            facts[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            if package not in OPTIONAL_PACKAGES:
                facts[package] = "not installed"
    facts["system"] = _system()
    facts["processor"] = _processor()
    facts["cores"] = _cores()
    facts["GPUs"] = _gpus()
    return facts


# Sections


def _lay_out(section: Section, counts: Counter) -> dict:
    """What the template shows of a section; tables and pictures are counted through the report."""
    shown = {"title": section.title, "paragraphs": _paragraphs(section.text), "files": section.files}
    shown |= {"picture": None, "table": None}
    if section.picture is not None:
        counts["picture"] += 1
        own = section.caption if section.table is None else ""
        caption = own or section.title
        picture = {"number": counts["picture"], "caption": caption, "alt": section.alt or caption}
        shown["picture"] = picture | _embed(section.picture)
    if section.table is not None:
        counts["table"] += 1
        table = {"number": counts["table"], "caption": section.caption or section.title}
        shown["table"] = table | _lay_out_table(section.table)
    return shown


def _paragraphs(text: str) -> list[str]:
    return [part.strip() for part in re.split(r"\n\s*\n", text) if part.strip()]


def _embed(path: Path) -> dict:
    """A PNG as a data URI, with its width and height on the page in CSS pixels."""
    data = path.read_bytes()
    if not data.startswith(PNG):
        raise UserError(f"{path} is not a PNG; give a picture that is one")
    width, height = struct.unpack(">II", data[16:24])
    # `figures.save` writes 200 dots an inch, a screen has about 100: half the size is the one its type was set for.
    return {
        "width": max(1, round(width / 2)),
        "height": max(1, round(height / 2)),
        "uri": Markup("data:image/png;base64," + b64encode(data).decode("ascii")),
    }


# Tables


@dataclass(frozen=True)
class Column:
    name: str
    cells: list[str]
    missing: list[bool]
    numbers: bool


def _lay_out_table(table: pd.DataFrame) -> dict:
    """Rows of cells for the template, the number of cells that were not run, and the size of type that fits a page."""
    if not isinstance(table.index, pd.RangeIndex) or table.index.name is not None:
        table = table.rename_axis(index=[name or "" for name in table.index.names]).reset_index(allow_duplicates=True)
    # By place: names may repeat.
    columns = [_column(str(name), list(table.iloc[:, place])) for place, name in enumerate(table.columns)]
    keys = _keys(columns)
    # Rows of one language belong together, where it has several.
    first = columns[0].cells if columns else []
    again = [row > 0 and first[row] == first[row - 1] and bool(first[row]) for row in range(len(table))]
    grouped = any(again)
    rows = [
        {
            "cells": [_cell(column, row) for column in columns],
            "more": _joined(column.cells[row] for column in columns[1:keys]),
            "again": again[row],
            "starts": grouped and row > 0 and not again[row],
        }
        for row in range(len(table))
    ]
    return {
        "columns": columns,
        "n_keys": keys,
        "more": _joined(column.name for column in columns[1:keys]),
        "rows": rows,
        "missing": sum(sum(column.missing) for column in columns),
        "points": _type_size(columns),
    }


def _column(name: str, values: list) -> Column:
    """A column as text. A missing number is one that is None or NaN, or, where the others are numbers, no text."""
    missing = [value is None or (pd.api.types.is_scalar(value) and bool(pd.isna(value))) for value in values]
    cells = ["" if gone else text for gone, text in zip(missing, _texts(values), strict=True)]
    filled = [cell.strip() for cell in cells if cell.strip() and cell.strip() not in DASHES]
    # No number at all: nothing of the column was run. It is not a column of names: some row would have one.
    numbers = all(NUMBER.fullmatch(cell) for cell in filled)
    if numbers:
        missing = [not cell.strip() for cell in cells]
    return Column(name, cells, missing, numbers)


def _texts(values: list) -> list[str]:
    """Floats of a column with equally many decimals, as few as they need; all else as it is."""
    floats = [float(value) for value in values if isinstance(value, float | np.floating)]
    ordinary = [value for value in floats if np.isfinite(value) and not _is_tiny(value)]
    enough = [
        decimals
        for decimals in range(MOST_DECIMALS)
        if all(round(value, decimals) == round(value, MOST_DECIMALS) for value in ordinary)
    ]
    decimals = min(enough, default=MOST_DECIMALS)

    def text(value) -> str:
        if isinstance(value, float | np.floating):
            return f"{value:.1e}" if _is_tiny(value) else f"{value:.{decimals}f}"
        return str(value)

    return [text(value) for value in values]


def _is_tiny(value: float) -> bool:
    """Whether four decimals would show one digit of it, or none."""
    return 0 < abs(value) < 1e-3


def _keys(columns: list[Column]) -> int:
    """How many of the first columns name the row: short texts before the first number; one at least.

    On a phone these stand in one cell, so that a row can be told from others while its numbers are scrolled.
    """
    texts = 0
    for column in columns[: MOST_KEYS + 1]:
        if column.numbers or max(map(len, column.cells), default=0) > LONGEST_KEY:
            break
        texts += 1
    before_a_number = texts < len(columns) and columns[texts].numbers
    return texts if 0 < texts <= MOST_KEYS and before_a_number else min(1, len(columns))


def _cell(column: Column, row: int) -> dict:
    text = column.cells[row]
    look = "n" if column.numbers else "long" if len(text) > LONGEST_LINE else ""
    # A change with its intervals takes two lines on a phone.
    halves = text.split(" → ") if column.numbers and len(text) > LONGEST_CHANGE else []
    halves = [f"{halves[0]} →", halves[1]] if len(halves) == 2 else []
    return {"text": text, "missing": column.missing[row], "look": look, "halves": halves}


def _joined(texts) -> str:
    return ", ".join(text for text in texts if text)


def _type_size(columns: list[Column]) -> float:
    """Points at which the table is as wide as a printed page at most, within what can be read."""
    widths = []
    for column in columns:
        # Names of columns are broken between words, and so are long texts.
        longest = max(map(len, column.name.split()), default=0)
        widths.append(2 + max(longest, *(min(len(cell), LONGEST_LINE) for cell in [*column.cells, ""])))
    fitting = PRINTED_WIDTH / (LETTER_WIDTH * max(1, sum(widths)))
    return float(np.floor(10 * np.clip(fitting, SMALLEST_TYPE, LARGEST_TYPE)) / 10)


def _printable(value: object) -> object:
    """What a template shows, without characters that a page cannot hold."""
    return UNPRINTABLE.sub("\ufffd", value) if type(value) is str else value


# The machine


def _commit(root: Path) -> str:
    """The commit of the repository, and whether the files are other ones; unknown without git or a repository."""

    def git(*arguments: str) -> str:
        command = ["git", "--no-optional-locks", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip()

    try:
        # An unpacked archive may lie in another repository, whose commit would say nothing.
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root.resolve():
            return UNKNOWN
        commit = git("rev-parse", "HEAD")
        return commit + " with uncommitted changes" * bool(git("status", "--porcelain"))
    except (OSError, subprocess.SubprocessError):
        return UNKNOWN


def _system() -> str:
    """The system's name without its release, which those who build their own kernels name after themselves."""
    try:
        name = platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        name = platform.system()
    return f"{name}, {platform.machine()}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(iter(named), platform.processor() or UNKNOWN)


def _cores() -> str:
    """Cores that this process may use, of those that the machine has."""
    there = os.cpu_count() or 1
    ours = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else there
    return f"{ours}" if ours == there else f"{ours} of {there}"


def _gpus() -> str:
    import torch  # here: the page needs no torch

    names = Counter(torch.cuda.get_device_name(place) for place in range(torch.cuda.device_count()))
    return ", ".join(name if count == 1 else f"{count} × {name}" for name, count in names.items()) or "none"
