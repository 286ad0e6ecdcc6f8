"""CSV files as texts: nothing turned into numbers or missing values, one row in memory at a time, and back again.

Knows files; knows nothing of what the columns mean.
"""

import csv
import sys
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from soteria.errors import UserError
from soteria.storage import files

DELIMITERS = ",;\t"
csv.field_size_limit(sys.maxsize)  # an answer may be longer than the 131,072 characters that csv allows


def is_text(value: object) -> bool:
    """Whether a value is text that can be written: no number, nothing missing, no half of a surrogate pair."""
    return isinstance(value, str) and not any("\ud800" <= c <= "\udfff" for c in value)


@dataclass(frozen=True)
class CsvFile:
    """A CSV and its header. Reading it checks each row: as many fields as the header, UTF-8, quotes that end."""

    path: Path
    columns: list[str]
    delimiter: str

    @classmethod
    def open(cls, path: Path, wanted: Collection[str] = ()) -> "CsvFile":
        """`wanted` are columns that tell how the file's fields are parted: by comma, semicolon or tab.

        Raises UserError for a file that is missing, empty, no UTF-8, or names a column twice.
        """
        found = [(next(_read(path, delimiter, strict=False), (0, []))[1], delimiter) for delimiter in DELIMITERS]
        columns, delimiter = next((each for each in found if set(each[0]) & set(wanted)), found[0])
        if not columns:
            raise UserError(f"{path} is empty; expected a CSV with a header")
        if not all(map(is_text, columns)):
            raise UserError(f"{path} is no UTF-8 text; save it as UTF-8")
        twice = next((name for name in columns if columns.count(name) > 1), None)
        if twice is not None:
            raise UserError(f"{path} has two columns {twice!r}; name each once")
        return cls(path, columns, delimiter)

    def rows(self) -> Iterator[list[str]]:
        """Each row's fields; the file is read anew each time. Raises UserError for a row that is unsound, by number."""
        lines = _read(self.path, self.delimiter)
        next(lines)
        for row, (line, fields) in enumerate(lines):
            if len(fields) != len(self.columns):
                raise UserError(
                    f"{self.path}: row {row} (line {line}) has {len(fields)} fields, the header has "
                    f"{len(self.columns)}; put texts with {self.delimiter!r} in quotes"
                )
            if not all(map(is_text, fields)):
                raise UserError(f"{self.path}: row {row} (line {line}) is no UTF-8 text; save the file as UTF-8")
            yield fields


def _read(path: Path, delimiter: str, *, strict: bool = True) -> Iterator[tuple[int, list[str]]]:
    """Each record with the number of its last line. Bytes that are no UTF-8 come as lone surrogates."""
    n_read = 0
    try:
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            reader = csv.reader(file, delimiter=delimiter, strict=strict)
            for fields in reader:
                if fields:  # a blank line is no record
                    yield reader.line_num, fields
                    n_read += 1
    except FileNotFoundError:
        raise UserError(f"no file {path}") from None
    except csv.Error as error:
        what = f"row {n_read - 1}" if n_read else "the header"
        raise UserError(f"{path}: {what} (up to line {reader.line_num}) is no CSV ({error}); mend its quotes") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None


def read_table(path: Path, wanted: Collection[str] = ()) -> pd.DataFrame:
    """A whole CSV as texts. Raises UserError for what is no table."""
    table = CsvFile.open(path, wanted)
    return pd.DataFrame(list(table.rows()), columns=table.columns, dtype=object)


def write_rows(path: Path, columns: list[str], rows: Iterable[list[str]], *, quote_all: bool) -> None:
    """Write a CSV row by row, whole or not at all. A text with a lone carriage return needs `quote_all`."""
    quoting = csv.QUOTE_ALL if quote_all else csv.QUOTE_MINIMAL
    with files.whole_file(path) as sibling, sibling.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n", quoting=quoting)
        writer.writerow(columns)
        writer.writerows(rows)


def has_return(fields: list[str]) -> bool:
    """Whether a row has to be quoted throughout: minimal quoting leaves a lone carriage return bare."""
    return any("\r" in text for text in fields)


def write_table(table: pd.DataFrame, path: Path) -> None:
    """Write a CSV that `read_table` reads back text for text, whole or not at all."""
    rows = table.astype(str).to_numpy().tolist()
    write_rows(path, list(table.columns), rows, quote_all=any(map(has_return, rows)))
