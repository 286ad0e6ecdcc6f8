"""What step 1 notes beside a dataset's scores, read back: its settings, and what first tokens tell apart."""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field
from typing_extensions import TypedDict

from soteria.errors import UserError
from soteria.scoring.prompts import FIRST, SEED, TEST_SPLIT, WHOLE
from soteria.storage import paths
from soteria.storage.side_files import Count, PositiveCount, Text, read_noted, side_file
from soteria.terminal import say_once

MOST_LAYERS = 100_000  # that a file may name: more than any model has, and few enough to make room for


@side_file
class AnswerCounts(TypedDict):
    answers: Count
    first_tokens: Count


@side_file
class ScoringNotes(TypedDict, total=False):
    """The arguments file of step 1. Files of earlier versions lack some of these."""

    dataset_name: Text
    model_name: Text
    answer: Literal[FIRST, WHOLE]
    test_split: float
    seed: Annotated[int, Field(ge=0, lt=2**32)]
    n_trials: PositiveCount
    n_harmful: PositiveCount
    max_rows: PositiveCount | None
    model_sha256: str | None
    model_dtype: Text
    query_answers: AnswerCounts
    # Where not every layer has heads alike
    n_layers: Annotated[int, Field(ge=1, le=MOST_LAYERS)]
    layers: list[Count]
    heads: list[PositiveCount]


EARLIER_SETTINGS = {"answer": FIRST}  # of scores made before there was another choice
# What the effect on a first token does where answers share it.
MIXES, CANNOT_MEAN = "mixes some answers up", "cannot mean the task"


def scored_with(root: Path, dataset: str) -> dict:
    """What is noted beside a dataset's scores under `root`. Raises UserError for a file that is broken."""
    path = paths.scoring_file(root, dataset)
    noted = read_noted(path, ScoringNotes)
    if not noted and path.exists():
        raise UserError(f"{path} is not what step 1 writes; restore it, or remove that folder and score it again")
    return EARLIER_SETTINGS | noted


def say_unsigned(root: Path) -> None:
    """Say on stderr that scores do not note which weights they are of, as earlier versions' do not."""
    say_once(f"{root} has scores without a hash of their model; they are taken for this model's")


def ambiguous_datasets(root: Path, datasets: Iterable[str]) -> dict[str, str]:
    """The datasets whose effects are on first tokens that answers share, and what that means: MIXES or CANNOT_MEAN."""
    found = {}
    for dataset in datasets:
        noted = scored_with(root, dataset)
        counts = noted.get("query_answers")  # not noted by earlier versions
        if counts and noted["answer"] == FIRST and counts["first_tokens"] < counts["answers"]:
            found[dataset] = CANNOT_MEAN if counts["first_tokens"] == 1 else MIXES
    return found


def describe_first_tokens(root: Path, datasets: Iterable[str]) -> list[str]:
    """A line per scored dataset: how many first tokens its different answers have, with a warning where it matters."""
    warnings, lines = ambiguous_datasets(root, datasets), []
    for dataset in datasets:
        if counts := scored_with(root, dataset).get("query_answers"):
            line = f"{dataset}: {counts['answers']} different answers, {counts['first_tokens']} different first tokens"
            if dataset in warnings:
                line += f"; warning: their effect {warnings[dataset]}; --answer {WHOLE} scores whole answers"
            lines.append(line)
    return lines


def scored_split(root: Path, datasets: list[str]) -> tuple[float, int]:
    """The `test_split` and `seed` that datasets under `root` were scored with, the defaults where nothing says so.

    Raises UserError where the datasets differ: then no rows are unseen by all of them.
    """
    noted = [scored_with(root, dataset) for dataset in datasets]
    found = {(each.get("test_split", TEST_SPLIT), each.get("seed", SEED)) for each in noted}
    if len(found) > 1:
        raise UserError(f"{root}: {', '.join(datasets)} were scored with different splits or seeds; score them alike")
    return found.pop()
