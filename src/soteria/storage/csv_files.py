"""CSV files as text: nothing becomes a number or a missing value, and large files are read and written row by row."""

import csv
import stat
import sys
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from soteria import disk
from soteria.errors import UserError
from soteria.storage import files

DELIMITERS = ",;\t"
# How spreadsheets, gzip, Parquet and UTF-16 begin.
NO_TEXT = (b"PK\x03\x04", b"\xd0\xcf\x11\xe0", b"\x1f\x8b", b"PAR1", b"\xff\xfe", b"\xfe\xff")
csv.field_size_limit(sys.maxsize)  # answers can be longer than csv's default limit of 131,072 characters


def is_text(value: object) -> bool:
    """Whether a value is text that UTF-8 can encode: a string without lone surrogates."""
    return isinstance(value, str) and not any("\ud800" <= c <= "\udfff" for c in value)


@dataclass(frozen=True)
class CsvFile:
    """A CSV file and its header. Reading checks that each row is UTF-8 and has as many fields as the header."""

    path: Path
    columns: list[str]
    delimiter: str

    @classmethod
    def open(cls, path: Path, wanted: Collection[str] = ()) -> "CsvFile":
        """The delimiter (comma, semicolon or tab) is the first that gives one of the `wanted` columns, or a comma.

        Raises UserError if the file is missing, empty, not UTF-8, or names a column twice.
        """
        _check_text(path)
        found = [(next(_records(path, delimiter, strict=False), (0, []))[1], delimiter) for delimiter in DELIMITERS]
        columns, delimiter = next((each for each in found if set(each[0]) & set(wanted)), found[0])
        if not columns:
            raise UserError(f"{path} is empty; expected a CSV with a header")
        if not all(map(is_text, columns)):
            raise UserError(f"{path} is not UTF-8 text; save it as UTF-8")
        twice = next((name for name in columns if columns.count(name) > 1), None)
        if twice is not None:
            raise UserError(f"{path} has two columns named {twice!r}; rename one")
        return cls(path, columns, delimiter)

    def rows(self) -> Iterator[list[str]]:
        """Each row's fields, read from the file anew on each call. Raises UserError, naming the row, for a bad one."""
        records = _records(self.path, self.delimiter)
        next(records)
        for row, (line, fields) in enumerate(records):
            where = f"{self.path}: row {row} (line {line})"
            if len(fields) != len(self.columns):
                raise UserError(
                    f"{where} has {len(fields)} fields but the header has {len(self.columns)}; "
                    f"put text that contains {self.delimiter!r} in quotes"
                )
            if not all(map(is_text, fields)):
                raise UserError(f"{where} is not UTF-8 text; save the file as UTF-8")
            yield fields


def _check_text(path: Path) -> None:
    """Raise UserError for a file that begins as no text does, or as one in UTF-16."""
    with disk.open_file(path, f"{path} does not exist; give the path of a CSV file") as file:
        if file.read(4).startswith(NO_TEXT):
            raise UserError(f"{path} is not a text file; save it as CSV in UTF-8")


def _records(path: Path, delimiter: str, *, strict: bool = True) -> Iterator[tuple[int, list[str]]]:
    """Each record that is not blank, with the number of its last line. Bytes that are not UTF-8 become surrogates."""
    n_read = 0
    try:
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            reader = csv.reader(file, delimiter=delimiter, strict=strict)
            for fields in filter(None, reader):
                yield reader.line_num, fields
                n_read += 1
    except csv.Error as error:
        what = f"row {n_read - 1}" if n_read else "the header"
        raise UserError(f"{path}: {what} (up to line {reader.line_num}) is not CSV ({error}); fix its quotes") from None
    except OSError as error:
        raise UserError(f"{path} could not be read ({error.strerror}); give another file") from None


def read_table(path: Path, wanted: Collection[str] = ()) -> pd.DataFrame:
    """A whole CSV as strings. `wanted` and the errors raised are those of `CsvFile.open` and `rows`."""
    table = CsvFile.open(path, wanted)
    return pd.DataFrame(list(table.rows()), columns=table.columns, dtype=object)


def write_rows(
    path: Path, columns: list[str], rows: Iterable[list[str]], *, quote_all: bool, like: Path | None = None
) -> None:
    """Write a CSV row by row, whole or not at all. `quote_all` is needed if any row `has_return`.

    A new one can be read by no more people than the file that it is `like`, if one is given.
    """
    quoting = csv.QUOTE_ALL if quote_all else csv.QUOTE_MINIMAL
    with files.whole_file(path) as sibling:
        if like and not path.exists():
            sibling.chmod(stat.S_IMODE(sibling.stat().st_mode & like.stat().st_mode) | stat.S_IRUSR | stat.S_IWUSR)
        with sibling.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n", quoting=quoting)
            writer.writerow(columns)
            writer.writerows(rows)


def has_return(fields: list[str]) -> bool:
    """Whether a field contains a carriage return, which csv's minimal quoting leaves bare."""
    return any("\r" in text for text in fields)


def write_table(table: pd.DataFrame, path: Path) -> None:
    """Write a CSV that `read_table` reads back unchanged, whole or not at all."""
    rows = table.astype(str).to_numpy().tolist()
    write_rows(path, list(table.columns), rows, quote_all=any(map(has_return, rows)))
