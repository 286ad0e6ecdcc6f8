"""A run as one HTML page to send to a colleague: it loads nothing else and runs no script.

Takes a title, sections with tables and PNG pictures, and the facts of a run; `render_report` returns the page, whose
layout is `report.html.jinja`, and `environment_facts` says what the run was made with.
"""

import os
import platform
import re
import struct
import subprocess
from base64 import b64encode
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import pandas as pd
import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined

import soteria
from soteria.errors import UserError
from soteria.storage import paths

PACKAGES = ("torch", "transformers", "numpy", "pandas", "scipy", "statsmodels", "lm-eval")
UNKNOWN = "unknown"
# Text in columns of numbers: 96, 0.024, 28.1% [20%, 38%], +1.2 ± 0.3, < 0.001, 1.5e-08; a dash where none applies.
NUMBER = re.compile(r"(?:[\s\d.,:;%+\-−–—±×→/<>=≤≥~≈\[\]()*†‡]|(?<=\d)e(?=[+-]?\d))+")
INTERVAL = re.compile(r"\[[^\]]*\]")  # stays on one line
# Models' answers can hold any character. HTML has no place for these, and UTF-8 none for the last of them.
UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufffe\uffff\ud800-\udfff]")


@dataclass(frozen=True)
class Section:
    """A part of the report. Blank lines separate the paragraphs of `text`.

    A caption belongs to the table if there is one, otherwise to the picture; without one, the title is used. Floats in
    the table are shown with four decimals: give text where others are wanted. An index that is not just row numbers is
    the table's first column.
    """

    title: str
    text: str = ""
    table: pd.DataFrame | None = None
    caption: str = ""
    picture: Path | None = None  # a PNG
    alt: str = ""  # what the picture shows, for readers who cannot see it
    files: tuple[str, ...] = ()  # where the numbers are, relative to the repository

    @property
    def paragraphs(self) -> list[str]:
        return [part.strip() for part in re.split(r"\n\s*\n", self.text) if part.strip()]


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
    loader = FileSystemLoader(Path(__file__).parent)
    blocks = {"trim_blocks": True, "lstrip_blocks": True}
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, finalize=_printable, **blocks)
    parts = {"title": title, "summary": summary, "sections": sections, "facts": facts, "not_run": not_run}
    parts |= {"grid_text": grid_text.strip("\n"), "commands": "\n".join(commands), "embed": _embed, "lay_out": _lay_out}
    return environment.get_template("report.html.jinja").render(parts)


def _embed(path: Path) -> dict:
    """A PNG as a data URI, with its width and height on the page in CSS pixels."""
    data = path.read_bytes()
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        raise UserError(f"{path} is not a PNG; give a PNG picture")
    # `figures.save` writes 200 dots per inch and a screen has about 100: half the size is what its type was set for.
    width, height = (max(1, round(side / 2)) for side in struct.unpack(">II", data[16:24]))
    return {"width": width, "height": height, "uri": f"data:image/png;base64,{b64encode(data).decode('ascii')}"}


def _lay_out(table: pd.DataFrame) -> dict:
    """A table's names, rows of text, columns of numbers by position, and how many of its cells were not run.

    Those cells are empty, and no others are: they are None or NaN, or, in a column of numbers, empty text.
    """
    if not isinstance(table.index, pd.RangeIndex) or table.index.name is not None:
        table = table.rename_axis(index=[name or "" for name in table.index.names]).reset_index(allow_duplicates=True)
    names = list(map(str, table.columns))
    table = table.set_axis(range(len(names)), axis=1)  # by position: names may repeat
    texts = table.astype(object).map(lambda value: f"{value:.4f}" if pd.api.types.is_float(value) else str(value))
    texts = texts.mask(table.isna(), "")
    numeric = [column for column in texts if all(map(NUMBER.fullmatch, filter(None, texts[column])))]
    for column in numeric:
        texts[column] = texts[column].map(
            lambda text: INTERVAL.sub(lambda found: found[0].replace(" ", "\u00a0"), text)
        )
    blank = table.isna() | texts.eq("") & texts.columns.isin(numeric)
    rows = texts.where(blank | texts.ne(""), "\u00a0").to_numpy().tolist()
    return {"names": names, "rows": rows, "numeric": numeric, "missing": int(blank.to_numpy().sum())}


def _printable(value: object) -> object:
    """What a template shows, without characters that a page cannot hold."""
    return UNPRINTABLE.sub("\ufffd", value) if type(value) is str else value


def environment_facts() -> dict[str, str]:
    """What the run was made with: versions, machine, commit. Nothing in it names the user, the host or a folder."""
    facts = {"soteria": soteria.__version__, "commit": _commit(paths.ROOT), "Python": platform.python_version()}
    for package in PACKAGES:
        with suppress(metadata.PackageNotFoundError):  # lm-eval is optional
            facts[package] = metadata.version(package)
    try:
        system = platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        system = platform.system()
    information = Path("/proc/cpuinfo")
    cpu = information.read_text(encoding="utf-8", errors="replace") if information.exists() else ""
    named = re.search(r"^model name\s*:\s*(\S.*)", cpu, re.MULTILINE)
    there = os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else there
    gpus = Counter(torch.cuda.get_device_name(place) for place in range(torch.cuda.device_count()))
    return facts | {
        # Without the kernel's release, which people who build their own name after themselves.
        "system": f"{system}, {platform.machine()}",
        "processor": named[1] if named else platform.processor() or UNKNOWN,
        "cores": f"{usable}" if usable == there else f"{usable} of {there}",
        "GPUs": ", ".join(f"{count} × {name}" if count > 1 else name for name, count in gpus.items()) or "none",
    }


def _commit(root: Path) -> str:
    """The repository's commit, and whether files differ from it; unknown without git or a repository."""

    def git(*arguments: str) -> str:
        command = ["git", "--no-optional-locks", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip()

    try:
        # An unpacked archive may be inside another repository, whose commit would say nothing.
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root.resolve():
            return UNKNOWN
        return git("rev-parse", "HEAD") + " with uncommitted changes" * bool(git("status", "--porcelain"))
    except (OSError, subprocess.SubprocessError):
        return UNKNOWN
