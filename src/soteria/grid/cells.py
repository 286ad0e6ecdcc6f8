"""A grid's cells: one model in one language under one steering, steered once and asked all that the tables need."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from soteria.grid.grid_file import TIER, UNIVERSAL, Grid, Pair
from soteria.languages import find_language
from soteria.storage import paths
from soteria.storage.paths import CellFiles


@dataclass(frozen=True)
class Steering:
    """Which heads are steered, and how hard. `share` is of all heads.

    kind: top (the language's own best), bottom, random (`of`: the draw's seed), all, shared (`of`: a tier or
    Universal), from (`of`: the language whose best heads they are).
    """

    kind: Literal["top", "bottom", "random", "all", "shared", "from"]
    share: float | None
    scaling_factor: float
    of: str = ""

    @classmethod
    def best(cls, share: float, scaling_factor: float) -> "Steering":
        """A language's own best heads: a share of 1 is all of them, whoever ranks them."""
        return cls("all" if share == 1 else "top", share, scaling_factor)

    @property
    def heads_name(self) -> str:
        """The heads in file names."""
        if self.kind in ("all", "shared"):
            return "all" if self.kind == "all" else f"shared_{self.of}"
        percent = f"{100 * self.share:g}"
        return f"{self.kind}_{percent}" + (f"_{self.of}" if self.of else "")

    @property
    def name(self) -> str:
        """The folder of its cells."""
        return f"{self.heads_name}_scaling_{self.scaling_factor:g}"

    def needs(self, grid: Grid, language: str) -> list[str]:
        """The languages whose scores its heads come from."""
        if self.kind in ("random", "all"):
            return []
        return grid.group(self.of) if self.kind == "shared" else [self.of if self.kind == "from" else language]


@dataclass(frozen=True)
class Cell:
    """One model in one language under one steering (None: the base).

    It is asked the prompt sets `sets`, and `with_cost` what safety costs.
    """

    pair: Pair = field(hash=False)
    language: str
    steering: Steering | None
    sets: tuple[str, ...]
    with_cost: bool = True

    @property
    def name(self) -> str:
        """A cell as people read it, and its folder under `results/cells`."""
        return f"{self.pair.slug}/{self.language}/{self.steering.name if self.steering else 'base'}"

    def files(self, results: Path) -> CellFiles:
        """Where its answers, verdicts and measurements lie."""
        return paths.cell_files(results, self.name)


@dataclass(frozen=True)
class Shard:
    """Every `of`-th (model, language) from the `index`-th on, counted from 1: work that one process takes."""

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
        """Its (model, language)s. Neighbours are of one model, so that few models are loaded by one shard."""
        every = [(pair, language) for pair in grid.models for language in grid.languages]
        size, longer = divmod(len(every), self.of)
        start = (self.index - 1) * size + min(self.index - 1, longer)
        return every[start : start + size + (self.index <= longer)]


def method_of(grid: Grid) -> Steering:
    """The language's own best heads, at the grid's λ."""
    return Steering.best(grid.heads, grid.scaling_factor)


def grid_cells(grid: Grid, pair: Pair) -> Iterator[Cell]:
    """A model's cells, language by language, its base first: the others are compared with it."""
    for language in grid.languages:
        yield from language_cells(grid, pair, language)


def language_cells(grid: Grid, pair: Pair, language: str) -> Iterator[Cell]:
    """A model's cells in one language."""
    sets = [each.name for each in grid.prompt_sets if each.has(language)]
    ablated = [name for name in sets if name in grid.ablated_sets]
    yield Cell(pair, language, None, tuple(sets))
    yield Cell(pair, language, method_of(grid), tuple(sets))
    for steering in _ablations(grid, language):
        whole = steering.kind == "shared" and steering.of == UNIVERSAL
        asked = sets if whole else ablated
        # What a transfer costs in other things is not asked: twelve times twelve cells are many.
        if asked:
            yield Cell(pair, language, steering, tuple(asked), with_cost=steering.kind != "from")


def _ablations(grid: Grid, language: str) -> Iterator[Steering]:
    """The steerings of a language beside the method, each once."""
    wanted, factor, tier = grid.ablations, grid.scaling_factor, find_language(language).tier
    found = [Steering("shared", None, factor, of=UNIVERSAL)] if UNIVERSAL in wanted.shared and tier else []
    if TIER in wanted.shared and tier:
        found.append(Steering("shared", None, factor, of=tier))
    for share in sorted({*wanted.shares, grid.heads} if wanted.random_draws or wanted.bottom else wanted.shares):
        found.append(Steering.best(share, factor))
        if share == 1:
            continue
        found += [Steering("random", share, factor, of=str(draw)) for draw in range(wanted.random_draws)]
        found += [Steering("bottom", share, factor)] if wanted.bottom else []
    found += [Steering.best(grid.heads, other) for other in wanted.scaling_factors]
    if wanted.transfer:
        found += [Steering("from", grid.heads, factor, of=other) for other in grid.languages if other != language]
    return (steering for steering in dict.fromkeys(found) if steering != method_of(grid))
