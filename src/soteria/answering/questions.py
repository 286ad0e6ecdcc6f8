"""The questions of step 3: how a model is asked one, and reading a set of them.

In: a file, a name under `data/prompts/` or a hub dataset, and a language. Out: a `QuestionSet`.
"""

import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from soteria.errors import UserError
from soteria.languages import Language, find_language
from soteria.storage import paths
from soteria.storage.csv_files import CsvFile, is_text

QUESTION_COLUMNS = ("question", "Question", "prompt")
CATEGORY_COLUMNS = ("category", "Category")
LANGUAGE_COLUMNS = ("language", "Language", "lang")
FILE_ENDINGS = (".csv", ".json", ".jsonl", ".parquet")

_log = logging.getLogger(__name__)

Table = tuple[list[str], Iterator[dict]]  # column names, rows


def question_prompt(question: str, language: Language) -> str:
    """The prompt for a model without a chat template: the instruction in the question's language, `Q:`, `A:`."""
    return f"{language.instruction}\nQ: {question}\nA:"


@dataclass(frozen=True)
class QuestionSet:
    """Questions in one language, with a category for each if the data has them. `name` is used in file names."""

    name: str
    questions: list[str]
    categories: list[str] | None = None


def dataset_slug(dataset: str) -> str:
    """A name for files: a file's stem, a folder's name, or a hub id with `/` replaced by `_`."""
    path = find_local(dataset)
    if path is None:
        return dataset.strip("/").replace("/", "_")
    return path.stem if path.is_file() else path.resolve().name


def find_local(dataset: str) -> Path | None:
    """The file, or else the folder, of a path or of a name under `data/prompts/` with or without its ending."""
    prompts = paths.DATA / "prompts"
    places = [Path(dataset), prompts / dataset, *(prompts / f"{dataset}{ending}" for ending in FILE_ENDINGS)]
    return next((path for path in places if path.is_file()), next((path for path in places if path.is_dir()), None))


def benign_set(name: str, language: Language) -> str:
    """A set of harmless questions as `read_questions` takes it; `name` may also be a name under `data/benign`."""
    path = paths.DATA / "benign" / f"{name}_{language.name}.csv"
    return str(path) if path.is_file() else name


def read_questions(
    dataset: str, language: Language, *, split: str | None = None, column: str | None = None
) -> QuestionSet:
    """The questions of a set that are in a language.

    `dataset` is the path of a CSV, JSON, JSONL or Parquet file, a name under `data/prompts/`, a hub dataset id, or a
    folder laid out like a hub dataset. The question column is `column` or, by default, one named after the language
    (`hi`, `Hindi`), `question`, `Question` or `prompt`. If there is a column `language`, rows of other languages are
    left out, and said to be.

    Raises UserError if the set cannot be found or read or lacks the column, the split or rows, and, naming the row, if
    a question is empty or not text.
    """
    path = find_local(dataset)
    names = [column] if column else [*_names(language), *QUESTION_COLUMNS]
    if path is None or path.is_dir():
        columns, rows = _from_hub(str(path or dataset), language, split)
    elif split is not None:
        raise UserError(f"{path} is a single file without splits; leave out the split {split!r}")
    elif path.suffix == ".parquet":
        columns, rows = _from_parquet(path)
    elif path.suffix in (".json", ".jsonl"):
        columns, rows = _from_json(path)
    else:
        columns, rows = _from_csv(path, [*names, *QUESTION_COLUMNS])
    asked = _first(columns, names)
    if asked is None:
        wanted = repr(column) if column else f"{' or '.join(QUESTION_COLUMNS)}, and none named for {language.name}"
        raise UserError(f"{dataset} has no column {wanted}; its columns are {', '.join(map(str, columns))}")
    spoken, filed = _first(columns, LANGUAGE_COLUMNS), _first(columns, CATEGORY_COLUMNS)
    questions, categories, others = [], [], Counter()
    for row, values in enumerate(rows):
        if spoken and not _is_in(values.get(spoken), language):
            others[str(values.get(spoken))] += 1
            continue
        question = values.get(asked)
        if not is_text(question):
            raise UserError(f"{dataset}: the question in row {row} is not valid text: {question!r:.80}")
        if not question.strip():
            raise UserError(f"{dataset}: row {row} has an empty question")
        questions.append(question)
        categories.append(str(values.get(filed)))
    if not questions:
        found = ", ".join(sorted(others)[:20])
        why = f" in {language.name}; its column {spoken!r} has {found}" if others else ""
        raise UserError(f"{dataset} has no rows{why}")
    if others:
        named = ", ".join(f"{n} × {other!r}" for other, n in others.most_common(20))
        kept = f"{len(questions)} of {len(questions) + others.total()} rows are in {language.name}"
        _log.warning("%s: %s; left out by the column %r: %s", dataset, kept, spoken, named)
    return QuestionSet(dataset_slug(dataset), questions, categories if filed else None)


def _names(language: Language) -> list[str]:
    """The names that a language's column, subset or split may have."""
    names = [language.name, language.code, language.code.split("-")[0], language.code.replace("-", "_")]
    return [form for name in names for form in (name, name.lower(), name.upper())]


def _is_in(value: object, language: Language) -> bool:
    with suppress(UserError):
        return find_language(str(value)) == language
    return False


def _first(columns: Iterable[str], names: Iterable[str]) -> str | None:
    return next((name for name in names if name in columns), None)


def _from_csv(path: Path, names: list[str]) -> Table:
    table = CsvFile.open(path, names)
    return table.columns, (dict(zip(table.columns, fields, strict=True)) for fields in table.rows())


def _from_json(path: Path) -> Table:
    """A list of objects, or one object per line. Raises UserError for anything else, naming the row."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason}); save it as UTF-8") from None
    values = _parsed(text)
    if values is None:
        values = [_parsed(line) for line in text.split("\n") if line.strip()]
    rows = values if isinstance(values, list) else [values]
    for row, value in enumerate(rows):
        if not isinstance(value, dict):
            raise UserError(f"{path}: row {row} is not a JSON object such as {{'question': …}}, on one line in a JSONL")
    return list(dict.fromkeys(name for row in rows for name in row)), iter(rows)


def _parsed(text: str) -> object | None:
    with suppress(ValueError):
        return json.loads(text)
    return None


def _from_parquet(path: Path) -> Table:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} is not a Parquet file ({str(error).strip().splitlines()[0]})") from None
    return table.column_names, iter(table.to_pylist())


def _from_hub(dataset: str, language: Language, split: str | None) -> Table:
    """A dataset by hub id or folder: the language's subset and split if it has them, else the default and the first."""
    if not Path(dataset).is_dir() and (dataset.endswith(FILE_ENDINGS) or dataset.count("/") != 1):
        raise UserError(f"no question file {dataset!r}, neither as a path nor in {paths.DATA / 'prompts'}")
    import datasets

    try:
        subsets = datasets.get_dataset_config_names(dataset)
        named = _first(subsets, _names(language))
        is_ambiguous = named is None and len(subsets) > 1 and "default" not in subsets
        splits = {} if is_ambiguous else datasets.load_dataset(dataset, named)
    except Exception as error:  # the hub client and the file readers raise many kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        what = "could not be read as a dataset" if Path(dataset).is_dir() else "could not be downloaded from the hub"
        raise UserError(f"{dataset!r} is not a question file and {what} ({reason})") from None
    if is_ambiguous:
        raise UserError(f"{dataset!r} has no subset for {language.name}; its subsets are {', '.join(subsets)}")
    if split is not None and split not in splits:
        raise UserError(f"{dataset!r} has no split {split!r}; its splits are {', '.join(splits)}")
    rows = splits[split or next((name for name in splits if name in _names(language)), next(iter(splits)))]
    return rows.column_names, iter(rows)
