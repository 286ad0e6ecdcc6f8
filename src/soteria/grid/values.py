"""Types of the values in a grid file."""

from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field

from soteria import cli
from soteria.errors import UserError
from soteria.languages import PAPER_LANGUAGES, language_names

ENGINES = ("openai", "vllm")


def in_order(given: object) -> object:
    """Names of languages in the group rule's order, from names, codes or `all`."""
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        return given
    try:
        names = language_names(texts)
    except UserError as error:
        raise ValueError(str(error)) from None
    order = [language.name for language in PAPER_LANGUAGES]
    return sorted(dict.fromkeys(names), key=lambda name: order.index(name) if name in order else len(order))


def distinct(values: list) -> list:
    if len(set(map(str, values))) < len(values):
        raise ValueError("a value is listed twice")
    return values


def _engine(name: str) -> str:
    kind, _, served = name.partition(":")
    if kind not in ENGINES or (":" in name and (kind != ENGINES[0] or "{cell}" not in served)):
        raise ValueError(f"{name!r} is not vllm, openai, or openai: and a name on the server with {{cell}} in it")
    return name


Share = Annotated[float, Field(gt=0, le=1)]
ScalingFactor = Annotated[float, Field(ge=0, le=cli.MOST_SCALING)]
Count = Annotated[int, Field(gt=0, le=cli.MOST)]
Draw = Annotated[int, Field(ge=0, le=cli.MOST_DRAWS)]
Languages = Annotated[list[str], BeforeValidator(in_order), Field(min_length=1)]
EngineName = Annotated[str, AfterValidator(_engine)]
