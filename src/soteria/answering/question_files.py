"""The tables that questions are read from: CSV, JSON, JSONL and Parquet files, and hub datasets or folders like them.

In: where the set is and a language. Out: a `Table`. A set that keeps languages apart, in subsets or splits, is read in
the language asked for or refused.
"""

import logging
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from soteria import disk
from soteria.errors import UserError
from soteria.languages import Language, find_language, names_a_language
from soteria.storage import paths
from soteria.storage.csv_files import CsvFile

FILE_ENDINGS = (".csv", ".json", ".jsonl", ".parquet")
HARMLESS_SPLITS = ("benign", "harmless", "safe")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Table:
    """Rows under column names; for a hub dataset, the subset and split that were taken.

    `is_told`: whether the subset, the split or the user says which language this is.
    """

    columns: list[str]
    rows: Iterator[dict]
    subset: str | None = None
    split: str | None = None
    is_told: bool = False


def find_local(dataset: str) -> Path | None:
    """The file, or else the folder, of a path or of a name under `data/prompts/` with or without its ending."""
    if not dataset:  # which as a path would be the folder that the command is started from
        return None
    prompts = paths.DATA / "prompts"
    places = [Path(dataset), prompts / dataset, *(prompts / f"{dataset}{ending}" for ending in FILE_ENDINGS)]
    return next((path for path in places if path.is_file()), next((path for path in places if path.is_dir()), None))


def may_be_on_hub(dataset: str) -> bool:
    """Whether the name of what is not a local set has the form of a hub id."""
    return dataset.count("/") == 1 and not dataset.endswith(FILE_ENDINGS)


def open_table(dataset: str, language: Language, split: str | None, subset: str | None, names: list[str]) -> Table:
    """A set's table. `names` are columns that it may have, by which the delimiter of a CSV is found.

    Raises UserError if the set cannot be found or read or lacks the subset or split, or has none in the language.
    """
    path = find_local(dataset)
    if path is None or path.is_dir():
        return _from_hub(str(path or dataset), language, split, subset)
    for kind, value in (("split", split), ("subset", subset)):
        if value is not None:
            raise UserError(f"{path} is a single file without {kind}s; leave out the {kind} {value!r}")
    if path.suffix.lower() == ".parquet":
        return _from_parquet(path)
    if path.suffix.lower() in (".json", ".jsonl"):
        return _from_json(path)
    return _from_csv(path, names)


def language_names(language: Language) -> list[str]:
    """The names that a language's column, subset or split may have, the likeliest first."""
    names = [language.name, language.code, language.code.split("-")[0], language.code.replace("-", "_")]
    return [form for name in (*names, *language.aliases) for form in (name, name.lower(), name.upper())]


def is_in(value: object, language: Language) -> bool:
    """Whether a value names the language."""
    with suppress(UserError):
        return find_language(str(value)) == language
    return False


def first_of(columns: Iterable[str], names: Iterable[str]) -> str | None:
    """The first of the names that is a column."""
    return next((name for name in names if name in columns), None)


def card_languages(dataset: str) -> list[str]:
    """The languages that the card of a hub dataset or folder lists; none for a file or without a card."""
    path = find_local(dataset)
    if path and path.is_file():
        return []
    from huggingface_hub import DatasetCard

    with suppress(Exception):  # no card, no network: the hub client raises many kinds, and nothing is then known
        listed = DatasetCard.load(str(path / "README.md") if path else dataset).data.language
        return [str(each) for each in ([listed] if isinstance(listed, str) else listed or [])]
    return []


def _from_csv(path: Path, names: list[str]) -> Table:
    table = CsvFile.open(path, names)
    return Table(table.columns, (dict(zip(table.columns, fields, strict=True)) for fields in table.rows()))


def _from_json(path: Path) -> Table:
    """A list of objects, or one object per line. Raises UserError for anything else, naming the row."""
    text = disk.read_text(path)
    try:
        values = disk.parse_json(text, str(path), plain=False)
    except UserError:
        lines = [line for line in text.split("\n") if line.strip()]
        if path.suffix == ".json" and len(lines) < 2:
            raise
        values = [disk.parse_json(line, f"{path}: row {row}", plain=False) for row, line in enumerate(lines)]
    rows = values if isinstance(values, list) else [values]
    for row, value in enumerate(rows):
        if not isinstance(value, dict):
            raise UserError(f"{path}: row {row} is not a JSON object such as {{'question': …}}, on one line in a JSONL")
    return Table(list(dict.fromkeys(name for row in rows for name in row)), iter(rows))


def _from_parquet(path: Path) -> Table:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(disk.regular_file(path))
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} is not a Parquet file ({str(error).strip().splitlines()[0]})") from None
    try:
        rows = table.to_pylist()
    except (pyarrow.ArrowException, ValueError, OverflowError) as error:
        raise UserError(f"{path} has a value that cannot be read ({error}); write its questions as text") from None
    return Table(table.column_names, iter(rows))


def _from_hub(dataset: str, language: Language, split: str | None, subset: str | None) -> Table:
    """A dataset by hub id or folder: the subset and split given, or else the language's own, or else the default."""
    if not dataset or not (Path(dataset).is_dir() or may_be_on_hub(dataset)):
        raise UserError(f"no question file {dataset!r}, neither as a path nor in {paths.DATA / 'prompts'}")
    import datasets

    from soteria.models.sources import hub_answers

    if not Path(dataset).is_dir() and not hub_answers():
        datasets.config.HF_HUB_OFFLINE = True  # its cache still serves
    try:
        subsets = datasets.get_dataset_config_names(dataset)
        own_subset = _own(subsets, language)
        named = subset or own_subset
        is_apart = any(map(names_a_language, subsets))
        is_unclear = named is None and (is_apart or (len(subsets) > 1 and "default" not in subsets))
        is_unknown = subset is not None and subset not in subsets
        splits = {} if is_unclear or is_unknown else datasets.load_dataset(dataset, named)
    except Exception as error:  # the hub client and the file readers raise many kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        what = "could not be read as a dataset" if Path(dataset).is_dir() else "could not be downloaded from the hub"
        raise UserError(f"{dataset!r} is not a question file and {what} ({reason})") from None
    if is_unclear or is_unknown:
        which = repr(subset) if subset else f"for {language.name}"
        raise UserError(f"{dataset!r} has no subset {which}; its subsets are {', '.join(subsets)}")
    taken = _split(dataset, list(splits), language, split)
    is_told = bool(own_subset and named == own_subset) or is_in(taken, language)
    return Table(splits[taken].column_names, iter(splits[taken]), named, taken, is_told)


def _split(dataset: str, splits: list[str], language: Language, given: str | None) -> str:
    """The split to read. Raises UserError where it would be in another language or might be the harmless half."""
    has = f"its splits are {', '.join(splits)}"
    if given is not None and given not in splits:
        raise UserError(f"{dataset!r} has no split {given!r}; {has}")
    if found := given or _own(splits, language):
        return found
    if any(map(names_a_language, splits)):
        raise UserError(f"{dataset!r} has no split for {language.name}; {has}")
    if len(splits) > 1 and any(name.casefold() in HARMLESS_SPLITS for name in splits):
        raise UserError(f"{dataset!r} keeps harmless questions in a split; choose a split: {has}")
    if len(splits) > 1:
        _log.warning("%s: reading only the split %r; %s", dataset, splits[0], has)
    return splits[0]


def _own(names: list[str], language: Language) -> str | None:
    """The subset or split that is named for a language."""
    return first_of(names, language_names(language)) or next((name for name in names if is_in(name, language)), None)
