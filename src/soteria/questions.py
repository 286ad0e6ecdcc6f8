"""The questions of step 3: how one is put to a model, and where a set of them is read from.

Knows files and text; knows nothing of models.
"""

import csv
from pathlib import Path

import pandas as pd

from soteria import files
from soteria.errors import UserError
from soteria.languages import Language

QUESTION_COLUMNS = ("question", "Question", "prompt")


def question_prompt(question: str, language: Language) -> str:
    """A question as a model without a chat template is asked it: the instruction in its language, `Q:`, `A:`."""
    return f"{language.instruction}\nQ: {question}\nA:"


def chat_message(question: str, language: Language) -> str:
    """A question as the user's message to a model with a chat template."""
    return f"{language.instruction}\n\n{question}"


def dataset_slug(dataset: str) -> str:
    """A name for files: a path's stem, or a hub id with `/` replaced by `_`."""
    return Path(dataset).stem if find_csv(dataset) else dataset.strip("/").replace("/", "_")


def find_csv(dataset: str) -> Path | None:
    """The file behind a path, or behind a name under `data/prompts/` with or without its `.csv`."""
    prompts = files.DATA / "prompts"
    for path in (Path(dataset), prompts / dataset, prompts / f"{dataset}.csv"):
        if path.is_file():
            return path
    return None


def read_table(path: Path) -> pd.DataFrame:
    """A CSV as texts, nothing turned into numbers or missing values. Raises UserError for what is no table."""
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"no file {path}") from None
    except pd.errors.EmptyDataError:
        raise UserError(f"{path} is empty; expected a CSV with a column {QUESTION_COLUMNS[0]!r}") from None
    except (pd.errors.ParserError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path} is no UTF-8 CSV ({str(error).strip()})") from None
    if not isinstance(table.index, pd.RangeIndex):  # pandas takes a surplus field for the row's name
        raise UserError(f"{path} has rows with more fields than its header; put texts with commas in quotes")
    return table


def write_table(table: pd.DataFrame, path: Path) -> None:
    """Write a CSV that `read_table` reads back text for text, whole or not at all."""
    # A lone carriage return ends a row unless it is in quotes, and minimal quoting gives it none.
    has_return = table.map(lambda text: "\r" in str(text)).any(axis=None)
    quoting = csv.QUOTE_ALL if has_return else csv.QUOTE_MINIMAL
    with files.whole_file(path) as sibling:
        table.to_csv(sibling, index=False, lineterminator="\n", quoting=quoting)


def read_questions(dataset: str) -> pd.DataFrame:
    """The rows of a question set, its question column named `question`.

    `dataset` is a CSV's path, a name under `data/prompts/`, or a hub dataset id. Raises UserError for a set that cannot
    be found, has no question column, no rows, or an empty question.
    """
    path = find_csv(dataset)
    table = read_table(path) if path else _load_from_hub(dataset)
    column = next((name for name in QUESTION_COLUMNS if name in table.columns), None)
    if column is None:
        raise UserError(f"{dataset} has no column {' or '.join(QUESTION_COLUMNS)}, but {', '.join(table.columns)}")
    table = table.rename(columns={column: "question"})
    if table.empty:
        raise UserError(f"{dataset} has no rows")
    empty = [row for row, question in enumerate(table["question"]) if not str(question).strip()]
    if empty:
        raise UserError(f"{dataset}: row {empty[0]} has an empty question")
    return table


def _load_from_hub(dataset: str) -> pd.DataFrame:
    looks_local = dataset.endswith(".csv") or dataset.count("/") != 1
    if looks_local:
        raise UserError(f"no question file {dataset!r}, neither as a path nor in {files.DATA / 'prompts'}")
    from datasets import load_dataset

    try:
        splits = load_dataset(dataset)
    except Exception as error:  # the hub client raises many kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{dataset!r} is no local file and cannot be had from the hub ({reason})") from None
    return splits[next(iter(splits))].to_pandas()
