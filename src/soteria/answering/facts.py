"""The JSON beside a CSV of answers, which says how each column was made, and whether it is about those answers."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

from pydantic import NonNegativeFloat
from typing_extensions import TypedDict

from soteria.answering.thinking import split_thinking
from soteria.errors import UserError
from soteria.storage import files
from soteria.storage.paths import ANSWER_COLUMNS, BASE_ANSWER, facts_file, names_another
from soteria.storage.side_files import Count, Text, fits, side_file


@side_file
class SteeredNote(TypedDict, total=False):
    base_model: Text
    base_weights: str
    scaling_factor: NonNegativeFloat


@side_file
class MadeColumn(TypedDict, total=False):
    """How a column was made. Those of earlier versions have no `answers_sha256`."""

    model: Text
    model_sha256: str
    weights: str
    steered: SteeredNote | None
    answers_sha256: str


@side_file
class AnswerFacts(TypedDict, total=False):
    """The JSON beside a CSV of answers."""

    language: Text
    dataset: Text
    rows: Count
    categories: list[Text]
    columns: dict[str, MadeColumn]


def read_answer_facts(answers: Path) -> dict:
    """The JSON beside a CSV of answers; an empty one where there is none or it is some other JSON.

    Raises UserError for one that is broken.
    """
    path = facts_file(answers)
    found = files.read_json(path)
    if found is None and not path.exists():
        return {}
    if isinstance(found, dict) and "inputs_sha256" in found:  # of verdicts, which name what was judged
        found = {key: found[key] for key in ("language", "dataset") if found.get(key)}
    if isinstance(found, dict) and not found.keys() & {"columns", "dataset", "language", "categories"}:
        return {}
    if not fits(found, AnswerFacts):
        raise UserError(f"{path} is not what generate.py writes; remove it, or write the answers again")
    return found


def hashed(question: str, answer: str) -> bytes:
    """What the hash of a column of answers takes of a row: what a model thought before it answered does not count."""
    return "".join(f"{len(text)} {text}" for text in (question, split_thinking(answer)[1])).encode()


def column_digest(table: Mapping, column: str) -> str:
    """The hash of a column of answers with its questions."""
    rows = zip(table["Question"], table[column], strict=True)
    return hashlib.sha256(b"".join(hashed(question, answer) for question, answer in rows)).hexdigest()


def check_answers(answers: Path, facts: dict, digests: dict[str, str], n_rows: int) -> None:
    """Raise UserError where the facts beside answers are those of others. `digests` are by column."""
    path, made = facts_file(answers), facts.get("columns", {})
    noted = {column: made.get(column, {}).get("answers_sha256", digest) for column, digest in digests.items()}
    if noted != digests or facts.get("rows", n_rows) != n_rows:
        raise UserError(f"{path} is about other answers than {answers} holds; remove it, or put its answers back")


def base_of(columns: dict[str, dict], column: str) -> tuple[str | None, str | None]:
    """Name and weights of the base that a column's answers come from, None where that is not noted."""
    made = columns.get(column, {})
    if column == BASE_ANSWER:
        return made.get("model"), made.get("weights")
    steered = made.get("steered") or {}
    return steered.get("base_model"), steered.get("base_weights")


def same_base(answers: Path, columns: dict[str, dict]) -> bool:
    """Whether both columns of a file come from the same weights, as far as that is noted.

    Raises UserError if they come from different models.
    """
    (name, weights), (other, other_weights) = (base_of(columns, column) for column in ANSWER_COLUMNS)
    if name and other and names_another(name, other) and (weights is None or weights != other_weights):
        raise UserError(f"{answers} has answers of {name!r} and of {other!r}; write them to different places")
    return None in (weights, other_weights) or weights == other_weights


def check_one_base(answers: Path, columns: dict[str, dict]) -> None:
    """Raise UserError where, as far as that is noted, the columns come from different models or weights."""
    if not same_base(answers, columns):
        raise UserError(f"{answers} has answers of a base that has other weights by now; write both columns again")


def check_same_models(answers: Path, others: Path) -> None:
    """Raise UserError where two files, as far as that is noted, have the answers of different models in a column."""
    made, others_made = (read_answer_facts(path).get("columns", {}) for path in (answers, others))
    for column in made.keys() & others_made.keys():
        digests = {each[column]["model_sha256"] for each in (made, others_made) if "model_sha256" in each[column]}
        if len(digests) > 1:
            raise UserError(f"{others} has the {column} of another model than {answers}; answer its questions again")
