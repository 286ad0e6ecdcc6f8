"""The grid file: which models, languages, questions, heads and scaling factors to run, read from YAML and checked."""

from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from soteria.answering.questions import benign_set
from soteria.errors import UserError
from soteria.languages import PAPER_LANGUAGES, find_language, language_names
from soteria.scoring.prompts import ANSWERS, FIRST, SEED, TASKS, TEST_SPLIT, WHOLE
from soteria.storage import paths

UNIVERSAL, TIER = "Universal", "tier"
# Seed of the in-context prompts that accuracy is measured on. It is not step 1's: its prompts chose the heads.
ACCURACY_SEED = 1042
ROUNDING = 1e-9  # 98.4 % - 96.4 % is more than 2 % in floating point


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
        raise ValueError("a value is listed twice")
    return values


Share = Annotated[float, Field(gt=0, le=1)]
ScalingFactor = Annotated[float, Field(ge=0, lt=float("inf"))]
Languages = Annotated[list[str], BeforeValidator(_languages), Field(min_length=1)]


class Part(BaseModel):
    """A part of the grid file. An unknown key is an error: it would silently do nothing."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Shape(Part):
    """What --plan needs to know about a model whose files are not on this machine."""

    parameters: float = Field(gt=0)
    layers: int = Field(gt=0)
    heads: int = Field(gt=0)
    head_dim: int = Field(gt=0)
    vocabulary: int = Field(gt=0)


class Pair(Part):
    """A base model and its harmfully tuned twin. `shape` is used by --plan only, where the base cannot be read."""

    base: str
    tuned: str
    chat_template: bool = False
    shape: Shape | None = None

    @property
    def slug(self) -> str:
        return paths.model_slug(self.base)


class PromptSet(Part):
    """Harmful questions. `{language}` and `{code}` in `dataset` are filled in.

    `languages`: those that the set has (default: all). `rows`: number of questions, for --plan.
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
        """A name by itself is a set under data/prompts."""
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
    """Tasks of lm-eval, for the base and the method. `limit`: questions per task."""

    tasks: list[str] = Field(min_length=1)
    languages: Languages | None = None
    limit: int | None = Field(default=None, gt=0)


class Answers(Part):
    """How answers are generated. `batch_size`: the memory to use, as that many of the longest questions take."""

    batch_size: int = Field(default=8, gt=0)
    max_new_tokens: int = Field(default=512, gt=0)
    questions: int | None = Field(default=None, gt=0)  # only the first ones of each set, for a trial run


class Scoring(Part):
    """Step 1, with the original release's defaults. The rows that it holds out are asked for in-context accuracy."""

    n_shots: int = Field(default=10, gt=0)
    n_trials: int = Field(default=25, gt=0)
    seed: int = Field(default=SEED, ge=0, lt=2**32)
    test_split: float = Field(default=TEST_SPLIT, gt=0, lt=1)
    answer: Literal[ANSWERS] = FIRST


class Limits(Part):
    """What steering may cost against the base, as shares of the rows, and the choice of a point that keeps to it."""

    max_refusals: float = Field(default=0.02, ge=0, le=1)
    max_accuracy_loss: float = Field(default=0.02, ge=0, le=1)
    max_changes: float = Field(default=0.05, ge=0, le=1)

    def keeps(self, point: dict[str, float], base: dict[str, float]) -> bool:
        """Whether a point refuses, loses and changes no more than that.

        Both hold `benign_refusals` and `icl_accuracy`, the point `benign_changes` too.
        """
        return (
            point["benign_refusals"] - base["benign_refusals"] <= self.max_refusals + ROUNDING
            and base["icl_accuracy"] - point["icl_accuracy"] <= self.max_accuracy_loss + ROUNDING
            and point["benign_changes"] <= self.max_changes + ROUNDING
        )

    def choose(self, points: list[dict[str, float]], base: dict[str, float]) -> dict[str, float] | None:
        """The point of lowest `asr` that keeps all limits, ties by lower `kl`, then by order; None without one."""
        kept = [point for point in points if self.keeps(point, base)]
        return min(kept, key=lambda point: (point["asr"], point["kl"]), default=None)


class Grid(Part):
    """A grid file.

    `heads` is the method's share of all heads, `scaling_factor` its λ; both are chosen on other questions. With
    `head_folder`, the method's heads are the lists found there and nothing is scored. `limits`: the tables name the λ
    of the ablation that these choose. `accuracy_seed`: of the in-context prompts that accuracy is measured on.
    """

    name: str = Field(pattern=r"^[\w.-]+$")
    models: list[Pair] = Field(min_length=1)
    languages: Languages
    icl: Path = paths.DATA / "icl"
    tasks: Annotated[list[str], Field(min_length=1), AfterValidator(_distinct)] = list(TASKS)
    prompt_sets: list[PromptSet] = Field(min_length=1)
    benign: str | None = None
    judges: Annotated[list[str], Field(min_length=1), AfterValidator(_distinct)] = ["refusal"]
    heads: Share = 0.5
    head_folder: str | None = None
    scaling_factor: ScalingFactor
    ablations: Ablations = Ablations()
    utility: Utility | None = None
    scoring: Scoring = Scoring()
    answers: Answers = Answers()
    accuracy_seed: int = Field(default=ACCURACY_SEED, ge=0, lt=2**32)
    limits: Limits | None = None
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"

    @model_validator(mode="after")
    def _names_agree(self) -> "Grid":
        for what, values in (
            ("model", [pair.slug for pair in self.models]),
            ("prompt set", [each.name for each in self.prompt_sets]),
        ):
            twice = next((value for value in values if values.count(value) > 1), None)
            if twice:
                raise ValueError(f"two {what}s are named {twice!r} and would share their files")
        taken = next((each.name for each in self.prompt_sets if each.name in paths.RESERVED_SETS), None)
        if taken:
            raise ValueError(f"a prompt set cannot be named {taken!r}: each cell has a file of that name")
        unknown = set(self.ablations.prompt_sets or []) - {each.name for each in self.prompt_sets}
        if unknown:
            raise ValueError(f"ablations.prompt_sets names {sorted(unknown)}, which are not among prompt_sets")
        ranked = self.ablations.bottom or {*self.ablations.shares} - {1}
        if self.head_folder and ("heads" in self.model_fields_set or ranked):
            raise ValueError(
                "head_folder gives the heads: heads has no effect, and ablations.bottom and ablations.shares below 1 "
                "need a ranking of all heads; remove them or head_folder"
            )
        return self

    def scored_slug(self, pair: Pair) -> str:
        """The folder of a model's scores, head lists and cells: whole answers never mix with first tokens."""
        return paths.scored_slug(pair.slug, whole=self.scoring.answer == WHOLE)

    def scores(self, results: Path, pair: Pair) -> Path:
        """Where step 1 writes a model's scores."""
        return paths.scores_folder(results, self.scored_slug(pair))

    def prompt_set(self, name: str) -> PromptSet:
        return next(each for each in self.prompt_sets if each.name == name)

    @property
    def method_share(self) -> float | None:
        """The method's share of all heads; None where `head_folder` gives the lists."""
        return None if self.head_folder else self.heads

    @property
    def head_shares(self) -> list[float | None]:
        """The shares that controls are run at, the method's among them."""
        return [None, *self.ablations.shares] if self.head_folder else sorted({*self.ablations.shares, self.heads})

    @property
    def ablated_sets(self) -> list[str]:
        return self.ablations.prompt_sets or [self.prompt_sets[0].name]

    def benign_in(self, language: str) -> str | None:
        """A language's harmless questions, as `read_questions` takes them; None where the grid has none."""
        if not self.benign:
            return None
        named = self.benign.replace("{language}", language).replace("{code}", find_language(language).code)
        return benign_set(named, find_language(language))

    def group(self, name: str) -> list[str]:
        """The grid's languages of a tier, or all of them for `Universal`."""
        paper = [language for language in map(find_language, self.languages) if language.tier]
        return [language.name for language in paper if name in (UNIVERSAL, language.tier)]


def read_grid(path: Path, **changes: object) -> Grid:
    """A grid from its YAML file; `changes` replace keys of it. Raises UserError naming the key and the problem."""
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no grid file {path}; see configs/ for examples") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path} is not valid YAML ({' '.join(str(error).split())})") from None
    if not isinstance(given, dict):
        raise UserError(f"{path} must hold keys and values, such as name: embedded")
    try:
        return Grid.model_validate({"name": path.stem} | given | changes)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        more = f" ({error.error_count() - 1} more)" if error.error_count() > 1 else ""
        what = first["msg"].removeprefix("Value error, ")
        raise UserError(f"{path}: {where + ': ' if where else ''}{what}{more}") from None
