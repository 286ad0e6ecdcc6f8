"""XSafety as one question file a language: its repository has a CSV a category, of one column and without a header.

Knows that repository's folders and file names; fetches nothing.
"""

import csv
import re
from pathlib import Path

from soteria.languages import PAPER_LANGUAGES, Language
from soteria.storage.csv_files import CsvFile, has_return, write_rows

SOURCE = "prompts/Jarviswang94_Multilingual_safety_benchmark"  # where fetch_original.py puts it
JOINED = "prompts/XSafety"
COLUMNS = ("question", "category")
OWN_CODES = {"es": "sp"}  # where its folder is not named by the language's code


def join_categories(original: Path) -> list[Path]:
    """Write `prompts/XSafety/<Language>.csv` (question, category) under `original` for each language that it has."""
    written = []
    for language in PAPER_LANGUAGES:
        paths = sorted((original / SOURCE / _folder(language)).glob("*.csv"))
        rows = [[question, _category(path)] for path in paths for question in _questions(path)]
        if not rows:
            continue
        joined = original / JOINED / f"{language.name}.csv"
        if not joined.exists() or list(CsvFile.open(joined, COLUMNS).rows()) != rows:
            write_rows(joined, list(COLUMNS), rows, quote_all=any(map(has_return, rows)))
        written.append(joined)
    return written


def _folder(language: Language) -> str:
    code = language.code.partition("-")[0]
    return OWN_CODES.get(code, code)


def _category(path: Path) -> str:
    """The category in a file's name: some end in `_n` or in a language's code."""
    return re.sub(r"_(n|[a-z]{2})$", "", path.stem)


def _questions(path: Path) -> list[str]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        # One column: a comma that stands unquoted is the question's own.
        questions = [",".join(row).strip() for row in csv.reader(file)]
    return [question for question in questions if question]
