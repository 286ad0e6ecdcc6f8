"""How long the steps of a grid took with a model: noted by its runs, and read by the plan and the report."""

import json
from pathlib import Path

from pydantic import NonNegativeFloat
from typing_extensions import TypedDict

from soteria import disk
from soteria.storage import files, paths
from soteria.storage.journal import open_to_append
from soteria.storage.side_files import PositiveCount, Text, read_lines, side_file


@side_file
class Duration(TypedDict):
    """A line of the file. A unit is a dataset, an answer, a cell, ...; `device` is "none" without a model."""

    step: Text
    units: PositiveCount
    seconds: NonNegativeFloat
    device: Text


def note(results: Path, slug: str, duration: Duration) -> None:
    """Add a duration. A line is one write, so processes may share the file."""
    path = paths.durations_file(results, slug)
    with files.made(disk.check_output(path).parent), open_to_append(path) as file:
        file.write((json.dumps(duration) + "\n").encode())


def noted(results: Path, slug: str) -> list[Duration]:
    """The durations that a model's runs noted; lines that a killed run cut are left out."""
    return read_lines(paths.durations_file(results, slug), Duration)
