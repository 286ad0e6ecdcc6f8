"""Types of the values in a grid file."""

from typing import Annotated

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field

from soteria import cli
from soteria.errors import UserError
from soteria.languages import PAPER_LANGUAGES, language_names

ENGINES = ("openai", "vllm")


def no_truth_values(cls: type[BaseModel], given: object) -> object:
    """What is given for a part of the grid file. Raises ValueError where `yes` or `no` stand for anything else."""
    for name, value in given.items() if isinstance(given, dict) else ():
        field, values = cls.model_fields.get(name), value if isinstance(value, list) else [value]
        if field and "bool" not in str(field.annotation) and any(isinstance(each, bool) for each in values):
            raise ValueError(f"{name}: yes, no, true and false are truth values in YAML; give what is asked for")
    return given


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


def _short(number: float) -> float:
    if float(f"{number:g}") != number:
        raise ValueError(f"{number!r} has more than six digits, and files are named by six; round it")
    return number


def _name(text: str) -> str:
    if not text.strip() or "/" in text or not text.isprintable():
        raise ValueError(f"{text!r} is not a task's name; name files in icl, without language and ending")
    return text


Share = Annotated[float, Field(gt=0, le=1), AfterValidator(_short)]
ScalingFactor = Annotated[float, Field(ge=0, le=cli.MOST_SCALING), AfterValidator(_short)]
TaskName = Annotated[str, AfterValidator(_name)]
Count = Annotated[int, Field(gt=0, le=cli.MOST)]
Draw = Annotated[int, Field(ge=0, le=cli.MOST_DRAWS)]
Languages = Annotated[list[str], BeforeValidator(in_order), Field(min_length=1)]
EngineName = Annotated[str, AfterValidator(_engine)]
