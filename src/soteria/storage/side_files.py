"""What the project notes beside its results, read back: only what has the types that were written counts.

A schema is a TypedDict under `side_file`, beside the code that writes such a file. It names the keys that are used; a
file may hold others. What does not fit its schema counts as missing, so that it is made again or refused.
"""

from functools import cache
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError, with_config

from soteria import disk
from soteria.errors import UserError
from soteria.storage import files

side_file = with_config(ConfigDict(extra="allow", strict=True, allow_inf_nan=False))


def _utf8(text: str) -> str:
    text.encode("utf-8")  # a ValueError for lone surrogates
    return text


Text = Annotated[str, AfterValidator(_utf8)]
MODEL_NAMES = ("base_model", "finetune_model")
MOST = 2**53  # that anything is counted to, as floats count
Count, PositiveCount = (Annotated[int, Field(ge=least, le=MOST)] for least in (0, 1))


@cache
def _adapter(schema: object) -> TypeAdapter:
    return TypeAdapter(schema)


def fits(value: object, schema: object) -> bool:
    """Whether a JSON value has the types of a schema."""
    try:
        _adapter(schema).validate_python(value, strict=True)
    except ValidationError:
        return False
    return True


def is_of(noted: dict, inputs: dict) -> bool:
    """Whether what was noted beside a result are these inputs.

    The models' names do not count: hashes of them are among the rest, and earlier versions noted paths as names.
    """
    return all(noted.get(name) == value for name, value in inputs.items() if name not in MODEL_NAMES)


def read_noted(path: Path, schema: object) -> dict:
    """The JSON object in a file, or an empty one if the file is missing, broken, or does not fit the schema."""
    found = files.read_json(path)
    return found if isinstance(found, dict) and fits(found, schema) else {}


def read_lines(path: Path, schema: object) -> list[dict]:
    """The JSON objects in a file of one a line, without the lines that are broken or do not fit the schema."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            value = disk.parse_json(line, str(path), strict=False)
        except UserError:
            continue
        if isinstance(value, dict) and fits(value, schema):
            found.append(value)
    return found
