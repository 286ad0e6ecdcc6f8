"""The questions of step 3: how one is put to a model, and where a set of them is read from.

Knows files, the hub and text; knows nothing of models.
"""

import json
from collections.abc import Iterable, Iterator
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


def question_prompt(question: str, language: Language) -> str:
    """A question as a model without a chat template is asked it: the instruction in its language, `Q:`, `A:`."""
    return f"{language.instruction}\nQ: {question}\nA:"


def chat_message(question: str, language: Language) -> str:
    """A question as the user's message to a model with a chat template."""
    return f"{language.instruction}\n\n{question}"


@dataclass(frozen=True)
class QuestionSet:
    """Questions in one language. `categories` is one for each question, where the data has them."""

    name: str  # in file names
    questions: list[str]
    categories: list[str] | None = None


def dataset_slug(dataset: str) -> str:
    """A name for files: a file's stem, a folder's name, or a hub id with `/` replaced by `_`."""
    path = find_local(dataset)
    if path is None:
        return dataset.strip("/").replace("/", "_")
    return path.stem if path.is_file() else path.resolve().name


def find_local(dataset: str) -> Path | None:
    """The file or folder behind a path, or behind a name under `data/prompts/` with or without its ending."""
    prompts = paths.DATA / "prompts"
    places = [Path(dataset), prompts / dataset, *(prompts / f"{dataset}{ending}" for ending in FILE_ENDINGS)]
    return next((path for path in places if path.is_file()), next((path for path in places if path.is_dir()), None))


def benign_set(name: str, language: Language) -> str:
    """A set of harmless questions as `read_questions` takes it: a name under `data/benign` counts too."""
    path = paths.DATA / "benign" / f"{name}_{language.name}.csv"
    return str(path) if path.is_file() else name


def read_questions(
    dataset: str, language: Language, *, split: str | None = None, column: str | None = None
) -> QuestionSet:
    """The questions of a set that are in a language.

    `dataset` is the path of a CSV, JSON, JSONL or Parquet file, a name under `data/prompts/`, a hub dataset id, or a
    folder of the same shape as a hub dataset. The questions' column is `column` or else `question`, `Question`,
    `prompt`, or one that is named for the language (`hi`, `Hindi`). Where there is a column `language`, the rows of
    other languages are left out.

    Raises UserError for a set that cannot be found or read, or has no such column, split or rows; and for a question
    that is empty or no text, by its row.
    """
    path = find_local(dataset)
    if path is None or path.is_dir():
        columns, rows = _from_hub(str(path or dataset), language, split)
    elif split is not None:
        raise UserError(f"{path} is one file, without splits; leave out the split {split!r}")
    elif path.suffix == ".parquet":
        columns, rows = _from_parquet(path)
    elif path.suffix in (".json", ".jsonl"):
        columns, rows = _from_json(path)
    else:
        table = CsvFile.open(path, {*QUESTION_COLUMNS, *_names(language), *([column] if column else [])})
        columns, rows = table.columns, (dict(zip(table.columns, fields, strict=True)) for fields in table.rows())
    asked = _question_column(dataset, columns, language, column)
    spoken, filed = (_first(columns, names) for names in (LANGUAGE_COLUMNS, CATEGORY_COLUMNS))
    questions, categories, others = [], [], set()
    for row, values in enumerate(rows):
        if spoken and not _is_in(values.get(spoken), language):
            others.add(str(values.get(spoken)))
            continue
        question = values.get(asked)
        if not is_text(question):
            raise UserError(f"{dataset}: the question in row {row} is no text that can be written: {question!r:.80}")
        if not question.strip():
            raise UserError(f"{dataset}: row {row} has an empty question")
        questions.append(question)
        categories.append(str(values.get(filed)))
    if not questions and others:
        found = ", ".join(sorted(others)[:20])
        raise UserError(f"{dataset} has no rows in {language.name}; its column {spoken!r} holds {found}")
    if not questions:
        raise UserError(f"{dataset} has no rows")
    return QuestionSet(dataset_slug(dataset), questions, categories if filed else None)


def _names(language: Language) -> list[str]:
    """What a column, a subset or a split of a language may be called."""
    names = [language.name, language.code, language.code.split("-")[0], language.code.replace("-", "_")]
    return [form for name in names for form in (name, name.lower(), name.upper())]


def _is_in(value: object, language: Language) -> bool:
    try:
        return find_language(str(value)) == language
    except UserError:
        return False


def _first(columns: Iterable[str], names: Iterable[str]) -> str | None:
    return next((name for name in names if name in columns), None)


def _question_column(dataset: str, columns: list[str], language: Language, column: str | None) -> str:
    found = column if column in columns else None if column else _first(columns, [*QUESTION_COLUMNS, *_names(language)])
    if found is None:
        wanted = repr(column) if column else f"{' or '.join(QUESTION_COLUMNS)}, and none named for {language.name}"
        raise UserError(f"{dataset} has no column {wanted}, but {', '.join(map(str, columns))}")
    return found


Rows = tuple[list[str], Iterator[dict]]


def _from_json(path: Path) -> Rows:
    """A list of objects, or an object a line. Raises UserError for anything else, by its row."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no UTF-8 text ({error.reason}); save it as UTF-8") from None
    try:
        values = json.loads(text)
        rows = values if isinstance(values, list) else [values]
    except ValueError:
        rows = []
        for row, line in enumerate(line for line in text.split("\n") if line.strip()):
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise UserError(f"{path}: row {row} is no JSON ({error}); expected an object a line") from None
    wrong = next((row for row, value in enumerate(rows) if not isinstance(value, dict)), None)
    if wrong is not None:
        raise UserError(f"{path}: row {wrong} is no JSON object such as {{'question': …}}")
    return list(dict.fromkeys(name for row in rows for name in row)), iter(rows)


def _from_parquet(path: Path) -> Rows:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} is no Parquet file ({str(error).strip().splitlines()[0]})") from None
    return table.column_names, iter(table.to_pylist())


def _from_hub(dataset: str, language: Language, split: str | None) -> Rows:
    """A dataset by hub id or folder, its subset and its split those of the language where it has such ones."""
    if not Path(dataset).is_dir() and (dataset.endswith(FILE_ENDINGS) or dataset.count("/") != 1):
        raise UserError(f"no question file {dataset!r}, neither as a path nor in {paths.DATA / 'prompts'}")
    import datasets

    try:
        subsets = datasets.get_dataset_config_names(dataset)
        named = next((name for name in subsets if name in _names(language)), None)
        if named is None and len(subsets) > 1 and "default" not in subsets:
            raise UserError(f"{dataset!r} has no subset for {language.name}, but {', '.join(subsets)}")
        splits = datasets.load_dataset(dataset, named)
    except UserError:
        raise
    except Exception as error:  # the hub client and the readers of files raise many kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        what = "cannot be read as a dataset" if Path(dataset).is_dir() else "cannot be had from the hub"
        raise UserError(f"{dataset!r} is no question file and {what} ({reason})") from None
    if split is not None and split not in splits:
        raise UserError(f"{dataset!r} has no split {split!r}, but {', '.join(splits)}")
    rows = splits[split or next((name for name in splits if name in _names(language)), next(iter(splits)))]
    return rows.column_names, iter(rows)
