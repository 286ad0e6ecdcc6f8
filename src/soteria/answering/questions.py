"""The questions of step 3: how a model is asked one, and reading a set of them.

In: a file, a name under `data/prompts/` or a hub dataset, and a language. Out: a `QuestionSet`.
"""

import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from soteria.errors import UserError
from soteria.languages import Language, find_language
from soteria.storage import paths
from soteria.storage.csv_files import CsvFile, is_text

QUESTION_COLUMNS = ("question", "Question", "prompt")
ANSWER_COLUMNS = ("answer", "Answer", "response", "output", "completion")
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

    def at(self, rows: Sequence[int]) -> "QuestionSet":
        """These rows of the set, under its name."""
        categories = [self.categories[row] for row in rows] if self.categories else None
        return QuestionSet(self.name, [self.questions[row] for row in rows], categories)


def spread_rows(n_rows: int, n_wanted: int) -> list[int]:
    """So many rows at equal distances from row 0 on, every k-th where k divides; all rows where there are no more."""
    return [row * n_rows // n_wanted for row in range(n_wanted)] if n_wanted < n_rows else list(range(n_rows))


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
    columns, rows = _open(dataset, language, split, None, _question_names(language, column))
    asked = _question_column(dataset, columns, language, column)
    filed = _first(columns, CATEGORY_COLUMNS)
    questions, categories = [], []
    for row, values in _spoken(dataset, columns, rows, language):
        questions.append(_text(dataset, row, "question", values.get(asked)))
        categories.append(str(values.get(filed)))
    return QuestionSet(dataset_slug(dataset), questions, categories if filed else None)


def read_pairs(
    dataset: str,
    languages: Sequence[Language],
    *,
    split: str | None = None,
    subset: str | None = None,
    prompt_column: str | None = None,
    answer_column: str | None = None,
) -> dict[Language, list[tuple[str, str]]]:
    """The (prompt, answer) pairs of a set in each of some languages, to tune a model on.

    `dataset`, the prompts' column and the errors raised are those of `read_questions`; a set in which nothing tells two
    of the languages apart is refused, too. The answers' column is `answer_column` or the first of ANSWER_COLUMNS.
    `subset` is one of a hub dataset (default: the language's).
    """
    wanted = [answer_column] if answer_column else list(ANSWER_COLUMNS)
    pairs: dict[Language, list[tuple[str, str]]] = {}
    for language in languages:
        columns, rows = _open(dataset, language, split, subset, [*_question_names(language, prompt_column), *wanted])
        asked, answered = _question_column(dataset, columns, language, prompt_column), _first(columns, wanted)
        if answered is None or answered == asked:
            names = "of answers beside that of the prompts" if answered else " or ".join(map(repr, wanted))
            raise UserError(f"{dataset} has no column {names}; its columns are {', '.join(map(str, columns))}")
        found = [
            (_text(dataset, row, "prompt", values.get(asked)), _text(dataset, row, "answer", values.get(answered)))
            for row, values in _spoken(dataset, columns, rows, language, languages)
        ]
        for other in (other for other, theirs in pairs.items() if theirs == found):
            alike = f"{other.name} and {language.name}"
            raise UserError(f"{dataset} has the same rows for {alike}; say which is which in a column 'language'")
        pairs[language] = found
    return pairs


def _question_names(language: Language, column: str | None) -> list[str]:
    return [column] if column else [*_names(language), *QUESTION_COLUMNS]


def _question_column(dataset: str, columns: list[str], language: Language, column: str | None) -> str:
    asked = _first(columns, _question_names(language, column))
    if asked is None:
        wanted = repr(column) if column else f"{' or '.join(QUESTION_COLUMNS)}, and none named for {language.name}"
        raise UserError(f"{dataset} has no column {wanted}; its columns are {', '.join(map(str, columns))}")
    return asked


def _open(dataset: str, language: Language, split: str | None, subset: str | None, names: list[str]) -> Table:
    """A set's table. `names` are columns that it may have, by which the delimiter of a CSV is found."""
    path = find_local(dataset)
    if path is None or path.is_dir():
        return _from_hub(str(path or dataset), language, split, subset)
    for kind, value in (("split", split), ("subset", subset)):
        if value is not None:
            raise UserError(f"{path} is a single file without {kind}s; leave out the {kind} {value!r}")
    if path.suffix == ".parquet":
        return _from_parquet(path)
    if path.suffix in (".json", ".jsonl"):
        return _from_json(path)
    return _from_csv(path, [*names, *QUESTION_COLUMNS])


def _spoken(
    dataset: str, columns: list[str], rows: Iterator[dict], language: Language, also: Sequence[Language] = ()
) -> Iterator[tuple[int, dict]]:
    """The rows in a language, with their numbers; without a column of languages, all.

    Warns of rows that are left out, with their number, but for those in the languages of `also`. Raises UserError for
    none.
    """
    spoken, others, kept = _first(columns, LANGUAGE_COLUMNS), Counter(), 0
    for row, values in enumerate(rows):
        if spoken and not _is_in(values.get(spoken), language):
            if not any(_is_in(values.get(spoken), other) for other in also):
                others[str(values.get(spoken))] += 1
            continue
        kept += 1
        yield row, values
    if not kept:
        named = ", ".join(sorted(others)[:20])
        why = f" in {language.name}; its column {spoken!r} has {named}" if others else ""
        raise UserError(f"{dataset} has no rows{why}")
    if others:
        named = ", ".join(f"{n} × {other!r}" for other, n in others.most_common(20))
        share = f"{kept} of {kept + others.total()} rows are in {language.name}"
        _log.warning("%s: %s; left out by the column %r: %s", dataset, share, spoken, named)


def _text(dataset: str, row: int, what: str, value: object) -> str:
    if not is_text(value):
        raise UserError(f"{dataset}: the {what} in row {row} is not valid text: {value!r:.80}")
    if not value.strip():
        raise UserError(f"{dataset}: row {row} has an empty {what}")
    return value


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


def _from_hub(dataset: str, language: Language, split: str | None, subset: str | None) -> Table:
    """A dataset by hub id or folder, by default the language's subset and split, else the default and the first."""
    if not Path(dataset).is_dir() and (dataset.endswith(FILE_ENDINGS) or dataset.count("/") != 1):
        raise UserError(f"no question file {dataset!r}, neither as a path nor in {paths.DATA / 'prompts'}")
    import datasets

    try:
        subsets = datasets.get_dataset_config_names(dataset)
        named = subset or _first(subsets, _names(language))
        is_ambiguous = named is None and len(subsets) > 1 and "default" not in subsets
        is_unknown = subset is not None and subset not in subsets
        splits = {} if is_ambiguous or is_unknown else datasets.load_dataset(dataset, named)
    except Exception as error:  # the hub client and the file readers raise many kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        what = "could not be read as a dataset" if Path(dataset).is_dir() else "could not be downloaded from the hub"
        raise UserError(f"{dataset!r} is not a question file and {what} ({reason})") from None
    if is_ambiguous or is_unknown:
        which = repr(subset) if subset else f"for {language.name}"
        raise UserError(f"{dataset!r} has no subset {which}; its subsets are {', '.join(subsets)}")
    if split is not None and split not in splits:
        raise UserError(f"{dataset!r} has no split {split!r}; its splits are {', '.join(splits)}")
    rows = splits[split or next((name for name in splits if name in _names(language)), next(iter(splits)))]
    return rows.column_names, iter(rows)
