"""A grid's cells: one model in one language under one treatment, steered once and asked all that the tables need."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, NonNegativeFloat
from typing_extensions import TypedDict

from soteria.grid.grid_file import ALL_PARAMETERS, RANDOM, RIVALS, TASK_VECTOR, TIER, UNIVERSAL, Grid, Pair
from soteria.languages import find_language
from soteria.storage import paths
from soteria.storage.paths import CellFiles
from soteria.storage.side_files import Count, PositiveCount, Text, side_file

DRAW, MATCHED = "draw", "matched"  # a random draw on few questions, and one with the method's norm of the change
SIGNATURE = "facts_sha256"  # in cell.json: a hash of the rest
DRAWN = (RANDOM, DRAW, MATCHED)


@side_file
class Accuracy(TypedDict):
    count: Count
    n: PositiveCount


def _at_most_all(accuracy: Accuracy) -> Accuracy:
    if accuracy["count"] > accuracy["n"]:
        raise ValueError("more are right than were asked")
    return accuracy


@side_file
class CellFacts(TypedDict, total=False):
    """`cell.json`: what a cell was made from, and what steering costs in it."""

    base_model: Text
    cost_measured_on_sha256: str
    n_heads: Count
    head_list: list[Annotated[list[Count], Field(min_length=2, max_length=2)]]
    answers_from: dict
    matched_scaling_factor: NonNegativeFloat
    parameters_changed: Count
    share_of_parameters: NonNegativeFloat
    icl_accuracy: Annotated[Accuracy, AfterValidator(_at_most_all)]
    kl_first_token: list[float]


def signed(facts: dict) -> dict:
    """The facts with a hash of them, which shows when they are changed by hand."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return facts | {SIGNATURE: digest}


def is_signed(facts: dict) -> bool:
    """Whether the hash among the facts is theirs. Those of earlier versions have none."""
    others = {name: value for name, value in facts.items() if name != SIGNATURE}
    return SIGNATURE not in facts or signed(others) == facts


@dataclass(frozen=True)
class Treatment:
    """Which heads are steered, and by how much.

    kind: top (the language's own best), bottom, random, draw and matched (`of`: the draw's seed), all, shared (`of`: a
    tier or Universal), from (`of`: the language whose best heads they are), the best by a rival ranking (first, whole,
    absolute, task_vector, safety), all_parameters. `share` is of all heads; None means as many as the list in the
    grid's `head_folder` has. The heads of `matched` are steered by another λ, which its cell notes.
    """

    kind: Literal["top", "bottom", "all", "shared", "from", "draw", "matched", *RIVALS]
    share: float | None
    scaling_factor: float
    of: str = ""

    @classmethod
    def best(cls, share: float | None, scaling_factor: float) -> "Treatment":
        """A language's own best heads. A share of 1 is all heads, whatever their ranking."""
        return cls("all" if share == 1 else "top", share, scaling_factor)

    @property
    def heads_name(self) -> str:
        """The heads in file names."""
        if self.kind in ("all", "shared", ALL_PARAMETERS):
            return f"shared_{self.of}" if self.kind == "shared" else self.kind
        share = "given" if self.share is None else f"{100 * self.share:g}"
        return f"{self.kind}_{share}" + (f"_{self.of}" if self.of else "")

    @property
    def name(self) -> str:
        """The folder of its cells."""
        return f"{self.heads_name}_scaling_{self.scaling_factor:g}"

    def needs(self, grid: Grid, language: str) -> list[str]:
        """The languages whose rankings its heads come from."""
        if self.kind in (RANDOM, DRAW, "all", TASK_VECTOR, ALL_PARAMETERS):
            return []
        return grid.group(self.of) if self.kind == "shared" else [self.of if self.kind == "from" else language]


@dataclass(frozen=True)
class Cell:
    """One model in one language under one treatment (None: the base).

    It answers the prompt sets `sets`, or only `n_questions` spread over each of them and over the harmless ones.
    `with_cost`: what steering costs is measured too.
    """

    model: str  # the grid's `scored_slug`
    language: str
    treatment: Treatment | None
    sets: tuple[str, ...]
    with_cost: bool = True
    n_questions: int | None = None

    @property
    def name(self) -> str:
        """The cell in messages, and its folder under `results/cells`."""
        return f"{self.model}/{self.language}/{self.treatment.name if self.treatment else 'base'}"

    def files(self, results: Path) -> CellFiles:
        """Where its answers, verdicts and measurements lie."""
        return paths.cell_files(results, self.name)


@dataclass(frozen=True)
class Shard:
    """Part `index` of `of` (from 1) of a grid's (model, language) pairs: the work of one process or machine."""

    index: int = 1
    of: int = 1

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """From `i/n`. Raises ValueError for anything else."""
        index, _, of = text.partition("/")
        if not (index.isdecimal() and of.isdecimal() and 1 <= int(index) <= int(of)):
            raise ValueError(f"{text!r} is not i/n with i from 1 to n, such as 2/8")
        return cls(int(index), int(of))

    def units(self, grid: Grid) -> list[tuple[Pair, str]]:
        """Its (model, language) pairs. Neighbors share a model, so that a shard loads few of them."""
        every = [(pair, language) for pair in grid.models for language in grid.languages]
        size, longer = divmod(len(every), self.of)
        start = (self.index - 1) * size + min(self.index - 1, longer)
        return every[start : start + size + (self.index <= longer)]


def method_of(grid: Grid) -> Treatment:
    """The method itself: the language's own best heads at the grid's λ."""
    return Treatment.best(grid.method_share, grid.scaling_factor)


def grid_cells(grid: Grid, pair: Pair) -> Iterator[Cell]:
    """A model's cells, language by language."""
    for language in grid.languages:
        yield from language_cells(grid, pair, language)


def language_cells(grid: Grid, pair: Pair, language: str) -> Iterator[Cell]:
    """A model's cells in one language, the base first: the others are compared with it."""
    sets = tuple(each.name for each in grid.prompt_sets if each.has(language))
    ablated = tuple(name for name in sets if name in grid.ablated_sets)
    model = grid.scored_slug(pair)
    yield Cell(model, language, None, sets)
    yield Cell(model, language, method_of(grid), sets)
    for treatment in _ablations(grid, language):
        asked = sets if (treatment.kind, treatment.of) == ("shared", UNIVERSAL) else ablated
        if asked:  # twelve by twelve transfers are many: their cost is not measured
            yield Cell(model, language, treatment, asked, with_cost=treatment.kind != "from")
    if grid.ablations.draws and ablated and language in grid.rival_languages:
        for kind in (DRAW, MATCHED):
            for treatment in draw_treatments(grid, kind):
                yield Cell(model, language, treatment, ablated, False, grid.ablations.draws.questions)


def draw_treatments(grid: Grid, kind: str) -> list[Treatment]:
    """The draws of a kind that the method is placed among. A seed draws the same heads for both kinds."""
    drawn = range(grid.ablations.draws.number)
    return [Treatment(kind, grid.method_share, grid.scaling_factor, of=str(draw)) for draw in drawn]


def rival_treatments(grid: Grid, ranking: str, factor: float) -> list[Treatment]:
    """What a rival of the method steers at one λ; several treatments where draws are pooled."""
    if ranking == RANDOM:
        draws = range(grid.ablations.random_draws)
        return [Treatment(RANDOM, grid.method_share, factor, of=str(draw)) for draw in draws]
    return [Treatment(ranking, None if ranking == ALL_PARAMETERS else grid.method_share, factor)]


def _ablations(grid: Grid, language: str) -> Iterator[Treatment]:
    """The treatments of a language beside the method, each once."""
    wanted, factor, tier = grid.ablations, grid.scaling_factor, find_language(language).tier
    found = [
        Treatment("shared", None, factor, of=tier if group == TIER else group)
        for group in (UNIVERSAL, TIER)
        if group in wanted.shared and tier
    ]
    for share in grid.head_shares if wanted.random_draws or wanted.bottom else wanted.shares:
        found.append(Treatment.best(share, factor))
        if share != 1:
            found += [Treatment("random", share, factor, of=str(draw)) for draw in range(wanted.random_draws)]
            found += [Treatment("bottom", share, factor)] * wanted.bottom
    found += [Treatment.best(grid.method_share, other) for other in wanted.scaling_factors]
    if wanted.transfer:
        others = [other for other in grid.languages if other != language]
        found += [Treatment("from", grid.method_share, factor, of=other) for other in others]
    for ranking in grid.rankings_in(language):
        for other in grid.trade_off_factors(ranking):
            found += rival_treatments(grid, ranking, other)
    return (treatment for treatment in dict.fromkeys(found) if treatment != method_of(grid))
