"""The grid of a reproduction: which models, languages, questions, heads and scaling factors, and the cells they make.

Knows YAML, names and counts; reads no model and measures nothing. A cell is one model in one language under one
steering: it is steered once and then asked everything that the tables need of it.
"""

from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from soteria.answering.questions import benign_set
from soteria.errors import UserError
from soteria.languages import PAPER_LANGUAGES, find_language, language_names
from soteria.scoring.prompts import TASKS
from soteria.storage import paths

UNIVERSAL, TIER = "Universal", "tier"


def _languages(given: object) -> object:
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


def _distinct(values: list) -> list:
    if len(set(map(str, values))) < len(values):
        raise ValueError("a value stands twice")
    return values


Share = Annotated[float, Field(gt=0, le=1)]
ScalingFactor = Annotated[float, Field(ge=0, lt=float("inf"))]
Languages = Annotated[list[str], BeforeValidator(_languages), Field(min_length=1)]


class Part(BaseModel):
    """A part of the grid file: a key that it does not know is an error, for it would do nothing."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Shape(Part):
    """What a bill needs to know of a model whose files are out of reach."""

    parameters: float = Field(gt=0)
    layers: int = Field(gt=0)
    heads: int = Field(gt=0)
    head_dim: int = Field(gt=0)
    vocabulary: int = Field(gt=0)


class Pair(Part):
    """A base model and its harmfully tuned twin. `shape` is for --plan alone, where the base cannot be read."""

    base: str
    tuned: str
    chat_template: bool = False
    shape: Shape | None = None

    @property
    def slug(self) -> str:
        return paths.model_slug(self.base)


class PromptSet(Part):
    """Questions to attack with. `{language}` and `{code}` in `dataset` are filled in.

    `languages` are those that the set has (default: all), `rows` how many questions, for --plan.
    """

    name: str = Field(pattern=r"^[\w.-]+$")
    dataset: str
    languages: Languages | None = None
    split: str | None = None
    column: str | None = None
    rows: int | None = Field(default=None, gt=0)

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, given: object) -> object:
        """A name alone: a set under data/prompts."""
        return {"name": given, "dataset": f"{given}_{{language}}"} if isinstance(given, str) else given

    def dataset_in(self, language: str) -> str:
        return self.dataset.replace("{language}", language).replace("{code}", find_language(language).code)

    def has(self, language: str) -> bool:
        return self.languages is None or language in self.languages


class Ablations(Part):
    """What is measured beside the method itself, on `prompt_sets` (default: the first)."""

    shares: Annotated[list[Share], AfterValidator(_distinct)] = []
    random_draws: int = Field(default=0, ge=0)
    bottom: bool = False
    scaling_factors: Annotated[list[ScalingFactor], AfterValidator(_distinct)] = []
    shared: list[Literal["tier", "Universal"]] = [UNIVERSAL]
    transfer: bool = False
    prompt_sets: list[str] | None = None


class Utility(Part):
    """Tasks of lm-eval, for the base and the method. `limit`: questions of a task."""

    tasks: list[str] = Field(min_length=1)
    languages: Languages | None = None
    limit: int | None = Field(default=None, gt=0)


class Answers(Part):
    """How answers are made. `batch_size`: memory to take, that of so many of the longest questions."""

    batch_size: int = Field(default=8, gt=0)
    max_new_tokens: int = Field(default=512, gt=0)
    questions: int | None = Field(default=None, gt=0)  # the first so many of a set, to try a grid out


class Scoring(Part):
    """Step 1. The defaults are the original's."""

    n_shots: int = Field(default=10, gt=0)
    n_trials: int = Field(default=25, gt=0)
    seed: int = Field(default=42, ge=0)


class Grid(Part):
    """A grid file. `heads` is the method's share of all heads, `scaling_factor` its λ; both are chosen elsewhere."""

    name: str = Field(pattern=r"^[\w.-]+$")
    models: list[Pair] = Field(min_length=1)
    languages: Languages
    icl: Path = paths.DATA / "icl"
    tasks: Annotated[list[str], Field(min_length=1), AfterValidator(_distinct)] = list(TASKS)
    prompt_sets: list[PromptSet] = Field(min_length=1)
    benign: str | None = None
    judges: Annotated[list[str], Field(min_length=1), AfterValidator(_distinct)] = ["refusal"]
    heads: Share = 0.5
    scaling_factor: ScalingFactor
    ablations: Ablations = Ablations()
    utility: Utility | None = None
    scoring: Scoring = Scoring()
    answers: Answers = Answers()
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"

    @model_validator(mode="after")
    def _names_agree(self) -> "Grid":
        for what, values in (
            ("model", [pair.slug for pair in self.models]),
            ("prompt set", [each.name for each in self.prompt_sets]),
        ):
            twice = next((value for value in values if values.count(value) > 1), None)
            if twice:
                raise ValueError(f"two of its {what}s are named {twice!r}, so their files would be one")
        taken = next((each.name for each in self.prompt_sets if each.name in paths.RESERVED_SETS), None)
        if taken:
            raise ValueError(f"a prompt set cannot be named {taken!r}: a file of each cell has that name")
        unknown = set(self.ablations.prompt_sets or []) - {each.name for each in self.prompt_sets}
        if unknown:
            raise ValueError(f"ablations.prompt_sets names {sorted(unknown)}, which prompt_sets does not")
        return self

    def prompt_set(self, name: str) -> PromptSet:
        return next(each for each in self.prompt_sets if each.name == name)

    @property
    def ablated_sets(self) -> list[str]:
        return self.ablations.prompt_sets or [self.prompt_sets[0].name]

    def benign_in(self, language: str) -> str | None:
        """The harmless questions of a language as `read_questions` takes them."""
        if not self.benign:
            return None
        named = self.benign.replace("{language}", language).replace("{code}", find_language(language).code)
        return benign_set(named, find_language(language))

    def group(self, name: str) -> list[str]:
        """The grid's languages of a tier, or all of them for `Universal`."""
        paper = [language for language in map(find_language, self.languages) if language.tier]
        return [language.name for language in paper if name in (UNIVERSAL, language.tier)]


def read_grid(path: Path) -> Grid:
    """A grid from its YAML file. Raises UserError naming the key and what is wrong with it."""
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no grid file {path}; configs/embedded.yaml and configs/paper.yaml are two") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path} is no YAML that can be read ({' '.join(str(error).split())})") from None
    if not isinstance(given, dict):
        raise UserError(f"{path} is no grid: it has to be keys and values, such as name: embedded")
    try:
        return Grid.model_validate({"name": path.stem} | given)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        more = f" ({error.error_count() - 1} more)" if error.error_count() > 1 else ""
        what = first["msg"].removeprefix("Value error, ")
        raise UserError(f"{path}: {where + ': ' if where else ''}{what}{more}") from None
