"""The questions of step 3: how a model is asked one, and reading a set of them.

In: a file, a name under `data/prompts/` or a hub dataset, and a language. Out: a `QuestionSet`.
"""

import logging
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from soteria.answering.question_files import (
    Table,
    card_languages,
    find_local,
    first_of,
    is_in,
    language_names,
    open_table,
)
from soteria.answering.row_filters import RowFilter, items
from soteria.errors import UserError
from soteria.languages import Language, find_language, script
from soteria.storage import paths
from soteria.storage.csv_files import is_text
from soteria.storage.paths import BASE_ANSWER, SAFE_ANSWER

MAX_NEW_TOKENS = 512  # the most new tokens of an answer
# The preset of the original release: instruction and question joined, sampling left to the model's generation config,
# and its own lengths.
RELEASE, RELEASE_TOKENS = "release", {SAFE_ANSWER: 512, BASE_ANSWER: 256}
QUESTION_COLUMNS = ("question", "Question", "prompt", "text", "Goal")
ANSWER_COLUMNS = ("answer", "Answer", "response", "output", "completion")
CATEGORY_COLUMNS = (
    "category", "Category", "harm_category", "subcategory", "tags", "harms", "type", "subtype",
)  # fmt: skip
LANGUAGE_COLUMNS = ("language", "Language", "lang")
# How the Unicode names of a script's letters begin, for the scripts that questions are checked for.
LETTERS = {
    "Latn": ("LATIN",), "Cyrl": ("CYRILLIC",), "Arab": ("ARABIC",), "Deva": ("DEVANAGARI",), "Beng": ("BENGALI",),
    "Taml": ("TAMIL",), "Telu": ("TELUGU",), "Thai": ("THAI",), "Hans": ("CJK",), "Kore": ("HANGUL",),
    "Jpan": ("CJK", "HIRAGANA", "KATAKANA"),
}  # fmt: skip

_log = logging.getLogger(__name__)


def question_prompt(question: str, language: Language) -> str:
    """The prompt for a model without a chat template: the instruction in the question's language, `Q:`, `A:`."""
    return f"{language.instruction}\nQ: {question}\nA:"


def longest_answer(column: str, preset: str | None, given: int | None = None) -> int:
    """The most new tokens of a column's answers: as many as are given, or the preset's, or MAX_NEW_TOKENS."""
    return given or (RELEASE_TOKENS[column] if preset == RELEASE else MAX_NEW_TOKENS)


@dataclass(frozen=True)
class QuestionSet:
    """Questions in one language, with a category for each if the data has them. `name` is used in file names.

    `read` says how the set was read: its subset, split, column, conditions, and rows left out.
    """

    name: str
    questions: list[str]
    categories: list[str] | None = None
    read: dict = field(default_factory=dict)

    def at(self, rows: Sequence[int]) -> "QuestionSet":
        """These rows of the set, under its name."""
        categories = [self.categories[row] for row in rows] if self.categories else None
        return QuestionSet(self.name, [self.questions[row] for row in rows], categories, self.read)


def spread_rows(n_rows: int, n_wanted: int) -> list[int]:
    """So many rows at equal distances from row 0 on, every k-th where k divides; all rows where there are no more."""
    return [row * n_rows // n_wanted for row in range(n_wanted)] if n_wanted < n_rows else list(range(n_rows))


def dataset_slug(dataset: str) -> str:
    """A name for files: a file's stem, a folder's name, or a hub id with `/` replaced by `_`."""
    path = find_local(dataset)
    if path is None:
        return dataset.strip("/").replace("/", "_")
    return path.stem if path.is_file() else path.resolve().name


def benign_set(name: str, language: Language) -> str:
    """A set of harmless questions as `read_questions` takes it; `name` may also be a name under `data/benign`."""
    path = paths.DATA / "benign" / f"{name}_{language.name}.csv"
    return str(path) if path.is_file() else name


def read_questions(
    dataset: str,
    language: Language,
    *,
    subset: str | None = None,
    split: str | None = None,
    column: str | None = None,
    where: Sequence[str] = (),
    strict: bool = False,
) -> QuestionSet:
    """The questions of a set that are in a language.

    `dataset` is the path of a CSV, JSON, JSONL or Parquet file, a name under `data/prompts/`, a hub dataset id, or a
    folder laid out like a hub dataset. The question column is `column` or, by default, one named after the language
    (`hi`, `Hindi`), or the first of QUESTION_COLUMNS. Rows of other languages, by a column `language`, and rows without
    a question are left out, and said to be; with `strict`, a row without a question is an error. `where`: as RowFilter.

    Raises UserError if the set cannot be found or read, is in other languages, or lacks the column, the subset, the
    split or rows; if harmful and harmless rows are mixed; and, naming the row, if a question is not text.
    """
    table = open_table(dataset, language, split, subset, [*_question_names(language, column), *QUESTION_COLUMNS])
    asked = _question_column(dataset, table.columns, language, column)
    if column is None:
        _check_told(dataset, table, asked, language)
    filed = first_of([name for name in table.columns if name != asked], CATEGORY_COLUMNS)
    filtered, empty = RowFilter(dataset, table.columns, where), []
    questions, categories = [], []
    for row, values in _spoken(dataset, table, language):
        if not filtered.keeps(values):
            continue
        if not strict and _is_empty(values.get(asked)):
            empty.append(row)
            continue
        questions.append(_text(dataset, row, "question", values.get(asked)))
        categories.append(", ".join(items(values.get(filed))) if filed else "")
    filtered.check()
    if empty:
        named = ", ".join(map(str, empty[:10])) + (", …" if len(empty) > 10 else "")
        count = f"{len(empty)} of {len(empty) + len(questions)} rows"
        _log.warning("%s: left out %s without a question in %r: row %s", dataset, count, asked, named)
    if not questions:
        raise UserError(
            f"{dataset} has no rows with a question in {asked!r}" + (f" where {', '.join(where)}" if where else "")
        )
    _warn_of_script(dataset, questions, language)
    read = {"subset": table.subset, "split": table.split, "column": asked, "where": [*where], "left_out": empty}
    read = {key: value for key, value in read.items() if value}
    return QuestionSet(dataset_slug(dataset), questions, categories if filed else None, read)


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
        names = [*_question_names(language, prompt_column), *wanted, *QUESTION_COLUMNS]
        table = open_table(dataset, language, split, subset, names)
        columns = table.columns
        asked, answered = _question_column(dataset, columns, language, prompt_column), first_of(columns, wanted)
        if answered is None or answered == asked:
            names = "of answers beside that of the prompts" if answered else " or ".join(map(repr, wanted))
            raise UserError(f"{dataset} has no column {names}; its columns are {', '.join(map(str, columns))}")
        found = [
            (_text(dataset, row, "prompt", values.get(asked)), _text(dataset, row, "answer", values.get(answered)))
            for row, values in _spoken(dataset, table, language, languages)
        ]
        for other in (other for other, theirs in pairs.items() if theirs == found):
            alike = f"{other.name} and {language.name}"
            raise UserError(f"{dataset} has the same rows for {alike}; say which is which in a column 'language'")
        pairs[language] = found
    return pairs


def _question_names(language: Language, column: str | None) -> list[str]:
    return [column] if column else [*language_names(language), *QUESTION_COLUMNS]


def _question_column(dataset: str, columns: list[str], language: Language, column: str | None) -> str:
    asked = first_of(columns, _question_names(language, column))
    if asked is None:
        wanted = repr(column) if column else f"{' or '.join(QUESTION_COLUMNS)}, and none named for {language.name}"
        raise UserError(f"{dataset} has no column {wanted}; its columns are {', '.join(map(str, columns))}")
    return asked


def _check_told(dataset: str, table: Table, asked: str, language: Language) -> None:
    """Where neither subset, split, column nor rows say which language this is, ask the dataset's card and file name.

    Raises UserError if the card lists other languages only; warns of a file that is named for another language.
    """
    if table.is_told or asked in language_names(language) or first_of(table.columns, LANGUAGE_COLUMNS):
        return
    listed = card_languages(dataset)
    if listed and not any(is_in(each, language) for each in listed):
        raise UserError(
            f"{dataset!r} has no questions in {language.name}: by its card it is in {', '.join(listed)}; ask it in one "
            "of these, or name the column of the questions"
        )
    last = re.split(r"[_.-]", dataset_slug(dataset))[-1]
    with suppress(UserError):
        if len(last) > 2 and find_language(last) != language:  # `en` may be a word of its language
            _log.warning("%s: asked in %s, but named for %s", dataset, language.name, find_language(last).name)


def _warn_of_script(dataset: str, questions: list[str], language: Language) -> None:
    """Warn if most questions have no letter that the language is written in: nothing else may tell what they are."""
    letters = LETTERS.get(script(language))
    if letters is None:
        return
    strange = [
        question
        for question in questions
        if any(map(str.isalpha, question)) and not any(unicodedata.name(c, "").startswith(letters) for c in question)
    ]
    if 2 * len(strange) > len(questions):
        count = f"{len(strange)} of {len(questions)} questions"
        _log.warning("%s: %s have no letter of the script of %s", dataset, count, language.name)


def _spoken(
    dataset: str, table: Table, language: Language, also: Sequence[Language] = ()
) -> Iterator[tuple[int, dict]]:
    """The rows in a language, with their numbers; without a column of languages, all.

    Warns of rows that are left out, with their number, but for those in the languages of `also`. Raises UserError for
    none.
    """
    spoken, others, kept = first_of(table.columns, LANGUAGE_COLUMNS), Counter(), 0
    for row, values in enumerate(table.rows):
        if spoken and not is_in(values.get(spoken), language):
            if not any(is_in(values.get(spoken), other) for other in also):
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


def _is_empty(value: object) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _text(dataset: str, row: int, what: str, value: object) -> str:
    if not is_text(value):
        raise UserError(f"{dataset}: the {what} in row {row} is not valid text: {value!r:.80}")
    if not value.strip():
        raise UserError(f"{dataset}: row {row} has an empty {what}")
    return value
