"""The grid file: which models, languages, questions, heads and scaling factors to run, read from YAML and checked."""

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from soteria import cli
from soteria.answering.question_files import find_local
from soteria.answering.questions import RELEASE, RELEASE_TOKENS, QuestionSet, benign_set, read_questions
from soteria.errors import UserError
from soteria.grid.judge_options import JudgeOptions
from soteria.grid.limits import Limits
from soteria.grid.values import (
    Count,
    Draw,
    EngineName,
    Languages,
    ScalingFactor,
    Share,
    TaskName,
    distinct,
    in_order,
    no_truth_values,
)
from soteria.judging.pipeline import without_phrases
from soteria.languages import find_language
from soteria.models.sizes import MOST_HEADS, MOST_LAYERS, MOST_VOCABULARY
from soteria.scoring.prompts import ANSWERS, FIRST, SEED, TASKS, TEST_SPLIT, WHOLE
from soteria.storage import paths
from soteria.storage.yaml_files import read_yaml

UNIVERSAL, TIER = "Universal", "tier"
ACCURACY_SEED = 1042  # of the in-context prompts that accuracy is measured on; those of step 1's seed chose the heads
# What heads are ranked by beside the method's own indirect effect, then what is steered in place of ranked heads.
ABSOLUTE, TASK_VECTOR, SAFETY, RANDOM, ALL_PARAMETERS = "absolute", "task_vector", "safety", "random", "all_parameters"
RIVALS = (*ANSWERS, ABSOLUTE, TASK_VECTOR, SAFETY, RANDOM, ALL_PARAMETERS)


class Part(BaseModel):
    """A part of the grid file. An unknown key is an error: it would silently do nothing."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    _no_truth_values = model_validator(mode="before")(no_truth_values)


class Shape(Part):
    """What --plan needs to know about a model whose files are not on this machine."""

    parameters: float = Field(gt=0, le=1e15)
    layers: int = Field(gt=0, le=MOST_LAYERS)
    heads: int = Field(gt=0, le=MOST_HEADS)
    head_dim: Count
    vocabulary: int = Field(gt=0, le=MOST_VOCABULARY)


class Pair(Part):
    """A base model and its harmfully tuned twin. `shape` is used by --plan only, where the base cannot be read."""

    base: str
    tuned: str
    chat_template: bool = False
    shape: Shape | None = None

    @property
    def slug(self) -> str:
        return paths.model_slug(self.base)


class Questions(Part):
    """A question set and the part of it that is asked. `{language}` and `{code}` in `dataset` are filled in.

    The other keys are those of `read_questions`.
    """

    dataset: str
    subset: str | None = None
    split: str | None = None
    column: str | None = None
    where: Annotated[list[str], BeforeValidator(lambda given: [given] if isinstance(given, str) else given)] = []
    strict: bool = False

    def dataset_in(self, language: str) -> str:
        return self.dataset.replace("{language}", language).replace("{code}", find_language(language).code)

    def read(self, language: str) -> QuestionSet:
        """The questions in a language. Raises UserError as `read_questions`."""
        options = self.model_dump(include={"subset", "split", "column", "where", "strict"})
        return read_questions(self.dataset_in(language), find_language(language), **options)


class HarmlessQuestions(Questions):
    """Harmless questions; `dataset` may also be a name under data/benign, which by itself is the short form."""

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, given: object) -> object:
        return {"dataset": given} if isinstance(given, str) else given

    def dataset_in(self, language: str) -> str:
        return benign_set(super().dataset_in(language), find_language(language))


class PromptSet(Questions):
    """Harmful questions. `languages`: those that the set has (default: all). `rows`: their number, for --plan."""

    name: str = Field(pattern=r"^[\w.-]+$", max_length=100)
    languages: Languages | None = None
    rows: int | None = Field(default=None, gt=0, le=10**9)

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, given: object) -> object:
        """A name by itself is a set under data/prompts."""
        return {"name": given, "dataset": f"{given}_{{language}}"} if isinstance(given, str) else given

    def has(self, language: str) -> bool:
        return self.languages is None or language in self.languages


class Draws(Part):
    """Random draws of as many heads as the method's, with its λ and with its norm of the change.

    They answer `questions` of each set, spread over it.
    """

    number: Draw = Field(default=30, gt=0)
    questions: Count = 48


class SafetyQuestions(Part):
    """What heads are ranked by safety on."""

    harmful: PromptSet
    harmless: HarmlessQuestions


class Ablations(Part):
    """What is measured beside the method itself, on `prompt_sets` (default: the first).

    `rival_languages`: those in which `rankings` and `draws` are run (default: all).
    """

    shares: Annotated[list[Share], AfterValidator(distinct)] = []
    random_draws: Draw = 0
    bottom: bool = False
    scaling_factors: Annotated[list[ScalingFactor], AfterValidator(distinct)] = []
    shared: list[Literal["tier", "Universal"]] = [UNIVERSAL]
    transfer: bool = False
    prompt_sets: Annotated[list[str], Field(min_length=1), AfterValidator(distinct)] | None = None
    rankings: Annotated[list[Literal[RIVALS]], AfterValidator(distinct)] = []
    all_parameters_factors: Annotated[list[ScalingFactor], AfterValidator(distinct)] = []  # default: those of heads
    draws: Draws | None = None
    rival_languages: Languages | None = None


class Utility(Part):
    """Tasks of lm-eval, for the base and the method. `limit`: questions per task."""

    tasks: list[str] = Field(min_length=1)
    languages: Languages | None = None
    limit: Count | None = None


class Answers(Part):
    """How answers are generated. `batch_size`: the memory to use, as that many of the longest questions take.

    `engine`: what answers in place of our own decoding, a server with `concurrency` calls at once.
    """

    batch_size: Count = 8
    max_new_tokens: Count = 512
    questions: Count | None = None  # only so many of each set, spread over it
    engine: EngineName | None = None
    concurrency: int = Field(default=16, gt=0, le=cli.MOST_CALLS)


class Scoring(Part):
    """Step 1, with the original release's defaults. The rows that it holds out are asked for in-context accuracy."""

    n_shots: int = Field(default=10, gt=0, le=cli.MOST_SHOTS)
    n_trials: int = Field(default=25, gt=0, le=cli.MOST_TRIALS)
    seed: int = Field(default=SEED, ge=0, lt=2**32)
    test_split: float = Field(default=TEST_SPLIT, gt=0, lt=1)
    answer: Literal[ANSWERS] = FIRST


class Grid(Part):
    """A grid file.

    `heads` is the method's share of all heads, `scaling_factor` its λ; both are chosen on other questions.
    `borderline` questions are harmless and look harmful. `judge_options`: how judges are asked, by their names. With
    `head_folder`, the method's heads are the lists found there and nothing is scored. `limits`: the tables name the λ
    of the ablation that these choose. `accuracy_seed`, `accuracy_prompts`: of the in-context prompts, so many per task,
    that accuracy is measured on. `preset`: models are asked as by the original release, and judges too where
    `judge_options` does not say otherwise.
    """

    name: str = Field(pattern=r"^[\w.-]+$", max_length=100)
    models: list[Pair] = Field(min_length=1)
    languages: Languages
    icl: Path = paths.DATA / "icl"
    tasks: Annotated[list[TaskName], Field(min_length=1), AfterValidator(distinct)] = list(TASKS)
    prompt_sets: list[PromptSet] = Field(min_length=1)
    benign: HarmlessQuestions | None = None
    borderline: HarmlessQuestions | None = None
    judges: Annotated[list[str], Field(min_length=1), AfterValidator(distinct)] = ["refusal"]
    judge_options: dict[str, JudgeOptions] = {}
    heads: Share = 0.5
    head_folder: str | None = None
    scaling_factor: ScalingFactor
    ablations: Ablations = Ablations()
    utility: Utility | None = None
    scoring: Scoring = Scoring()
    answers: Answers = Answers()
    accuracy_seed: int = Field(default=ACCURACY_SEED, ge=0, lt=2**32)
    accuracy_prompts: Count | None = None
    limits: Limits | None = None
    safety_questions: SafetyQuestions | None = None
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    preset: Literal[RELEASE] | None = None

    @model_validator(mode="after")
    def _names_agree(self) -> "Grid":
        for what, values in (
            ("model", [pair.slug for pair in self.models]),
            ("prompt set", [each.name for each in self.prompt_sets]),
            ("judge", [paths.judge_slug(name) for name in self.judges]),
        ):
            if twice := next((value for value in values if values.count(value) > 1), None):
                raise ValueError(f"two {what}s are named {twice!r} and would share their files")
        for name in (each.name for each in self.prompt_sets):
            if name in paths.RESERVED_SETS or paths.BY in name:
                raise ValueError(f"a prompt set cannot be named {name!r}: each cell has files that are named so")
        if unknown := [name for name in self.judges if not re.fullmatch(r"refusal|(openai|hf):.+", name)]:
            raise ValueError(f"judges: unknown judge {unknown[0]!r}; give refusal, openai:<model> or hf:<model>")
        if "refusal" in self.judges and (lacks := without_phrases(map(find_language, self.languages))):
            raise ValueError(f"judges: {lacks}")
        if unasked := {*self.judge_options} - ({*self.judges} - {"refusal"}):
            raise ValueError(f"judge_options names {sorted(unasked)}, which are not judges that are asked anything")
        chats = any(pair.chat_template for pair in self.models)
        if self.preset and (chats or "max_new_tokens" in self.answers.model_fields_set):
            raise ValueError("preset: release has answer lengths of its own and no chat template; remove those or it")
        if self.preset and self.answers.engine:
            raise ValueError("preset: release samples its answers, and engines answer greedily; remove answers.engine")
        if unknown := {*(self.ablations.prompt_sets or [])} - {each.name for each in self.prompt_sets}:
            raise ValueError(f"ablations.prompt_sets names {sorted(unknown)}, which are not among prompt_sets")
        ranked = self.ablations.bottom or {*self.ablations.shares} - {1}
        if self.head_folder and ("heads" in self.model_fields_set or ranked):
            raise ValueError(
                "head_folder gives the heads: heads has no effect, and ablations.bottom and ablations.shares below 1 "
                "need a ranking of all heads; remove them or head_folder"
            )
        return self

    @model_validator(mode="after")
    def _rivals_can_be_had(self) -> "Grid":
        wanted, own = {*self.ablations.rankings}, self.scoring.answer
        asked = {"ablations.rival_languages": self.ablations.rival_languages}
        asked |= {"utility.languages": self.utility and self.utility.languages}
        for key, names in asked.items():
            if unknown := {*(names or [])} - {*self.languages}:
                raise ValueError(f"{key} names {sorted(unknown)}, which are not among languages")
        if own in wanted:
            raise ValueError(f"ablations.rankings: {own} is how the method itself ranks heads; remove it")
        if self.head_folder and wanted & {*ANSWERS, ABSOLUTE}:
            raise ValueError("ablations.rankings by effect need scores, and with head_folder nothing is scored")
        if self.method_share == 1 and (wanted or self.ablations.draws):
            raise ValueError("heads: 1 steers all heads; ablations.rankings and ablations.draws need a share below 1")
        if RANDOM in wanted and not self.ablations.random_draws:
            raise ValueError("ablations.rankings: random needs ablations.random_draws")
        if ALL_PARAMETERS in wanted and self.answers.engine:
            raise ValueError(
                "ablations.rankings: all_parameters is steered in memory only; remove answers.engine or it"
            )
        if SAFETY in wanted:
            self._check_safety_questions()
        return self

    def _check_safety_questions(self) -> None:
        """Raise ValueError where they are missing or would choose heads on what the tables report."""
        asked = self.safety_questions
        if not asked:
            raise ValueError("ablations.rankings: safety needs safety_questions, with harmful and harmless")
        for language in self.rival_languages:
            reported = [each.dataset_in(language) for each in self.prompt_sets if each.has(language)]
            reported += [asked.dataset_in(language) for asked in self.harmless.values()]
            chosen = {_place(each.dataset_in(language)) for each in (asked.harmful, asked.harmless)}
            if chosen & {*map(_place, reported)}:
                raise ValueError("safety_questions are reported on as prompt_sets, benign or borderline; give others")

    def scored_slug(self, pair: Pair) -> str:
        """The folder of a model's scores, head lists and cells: whole answers never mix with first tokens."""
        return paths.scored_slug(pair.slug, whole=self.scoring.answer == WHOLE)

    def scores(self, results: Path, pair: Pair, answer: str | None = None) -> Path:
        """Where step 1 writes a model's scores, of the first or whole `answer` (default: as the method needs)."""
        answer = answer or self.scoring.answer
        return paths.scores_folder(results, paths.scored_slug(pair.slug, whole=answer == WHOLE))

    @property
    def rival_languages(self) -> list[str]:
        """The languages in which rival rankings and draws are run."""
        return self.ablations.rival_languages or self.languages

    def rankings_in(self, language: str) -> list[str]:
        """The rival rankings that are run in a language."""
        return self.ablations.rankings if language in self.rival_languages else []

    def scored_answers(self, language: str) -> list[str]:
        """What of the answers is scored: what the method needs, then what a rival ranking does."""
        return [self.scoring.answer, *(answer for answer in ANSWERS if answer in self.rankings_in(language))]

    def score_files(self, results: Path, pair: Pair, language: str) -> list[Path]:
        """All files of scores that a language's rankings are made from."""
        folders = [self.scores(results, pair, answer) for answer in self.scored_answers(language)]
        found = [paths.effect_path(folder, f"{task}_{language}") for folder in folders for task in self.tasks]
        safety = [paths.safety_path(folders[0], language)] if SAFETY in self.rankings_in(language) else []
        return found + safety

    def judge_option(self, judge: str) -> JudgeOptions:
        preset = None if judge == "refusal" else self.preset
        return self.judge_options.get(judge, JudgeOptions(preset=preset) if preset else JudgeOptions())

    def longest(self, column: str) -> int:
        """The most new tokens of a column's answers."""
        return RELEASE_TOKENS[column] if self.preset else self.answers.max_new_tokens

    @property
    def harmless(self) -> dict[str, HarmlessQuestions]:
        """The harmless questions, by the name of their set in a cell."""
        named = {paths.BENIGN: self.benign, paths.BORDERLINE: self.borderline}
        return {name: questions for name, questions in named.items() if questions}

    def questions(self, name: str) -> Questions:
        """The set of a name in a cell: one of `prompt_sets` or of `harmless`."""
        return self.harmless.get(name) or next(each for each in self.prompt_sets if each.name == name)

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

    def trade_off_factors(self, ranking: str = "") -> list[float]:
        """The scaling factors along which the method and its rivals are compared.

        Steering all parameters changes so much more that its factors are others.
        """
        own = self.ablations.all_parameters_factors if ranking == ALL_PARAMETERS else []
        return sorted(own or {*self.ablations.scaling_factors, self.scaling_factor})

    def group(self, name: str) -> list[str]:
        """The grid's languages of a tier, or all of them for `Universal`."""
        paper = [language for language in map(find_language, self.languages) if language.tier]
        return [language.name for language in paper if name in (UNIVERSAL, language.tier)]


def _place(dataset: str) -> str:
    """A question set as what it is read from: a name and a path may mean one file."""
    found = find_local(dataset)
    return str(found.resolve()) if found else dataset


def _in_languages(grid: Grid, languages: list[str]) -> dict:
    """A grid's keys in some of its languages: rivals and utility only where the grid has them."""
    given, utility = grid.ablations.model_dump(exclude_unset=True), grid.utility
    kept = [name for name in grid.ablations.rival_languages or languages if name in languages]
    given |= {"rival_languages": kept} if kept else {"rankings": [], "draws": None, "rival_languages": None}
    if utility and utility.languages:
        measured = [name for name in utility.languages if name in languages]
        utility = utility.model_copy(update={"languages": measured}) if measured else None
    return {"ablations": given, "utility": utility}


def read_grid(path: Path, **changes: object) -> Grid:
    """A grid from its YAML file; `changes` replace keys of it. Raises UserError naming the key and the problem."""
    given = read_yaml(path, f"no grid file {path}; see configs/ for examples")
    if not isinstance(given, dict):
        raise UserError(f"{path} must hold keys and values, such as name: embedded")
    try:
        grid = Grid.model_validate({"name": path.stem} | given)
        if wanted := changes.get("languages"):
            changes |= _in_languages(grid, in_order(wanted))
        return Grid.model_validate({"name": path.stem} | given | changes) if changes else grid
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        more = f" ({error.error_count() - 1} more)" if error.error_count() > 1 else ""
        what = first["msg"].removeprefix("Value error, ")
        raise UserError(f"{path}: {where + ': ' if where else ''}{what}{more}") from None
