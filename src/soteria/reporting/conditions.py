"""The cells of a grid as they are on disk, and the conditions that tables compare: ways to choose heads."""

from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from soteria.grid.cells import Cell, Treatment, grid_cells, method_of, rival_treatments
from soteria.grid.found import CellOnDisk, SubjectOnDisk
from soteria.grid.grid_file import TIER, UNIVERSAL, Grid, Pair
from soteria.judging.interface import DIVIDED, EMPTY, MAJORITY, reason_of
from soteria.judging.statistics import majority
from soteria.judging.verdicts import VerdictFacts
from soteria.languages import find_language
from soteria.reporting.labels import ALL_HEADS, BASE, GIVEN, METHOD, RANKINGS, SHARED_ALL, SHARED_TIER, TOP
from soteria.storage import paths
from soteria.storage.paths import ANSWER_COLUMNS, BENIGN
from soteria.storage.side_files import read_noted


class FoundCell:
    """What a cell's files hold, each read once; None for a file that does not exist or is not this grid's."""

    def __init__(self, subject: SubjectOnDisk, cell: Cell):
        self.cell, self.judges, self._work = cell, subject.grid.judges, CellOnDisk(subject, cell)
        self.files = self._work.files

    @property
    def facts(self) -> dict:
        return self._work.facts

    @property
    def utility(self) -> dict:
        return self._work.utility

    @property
    def others(self) -> dict[str, list[str]]:
        """The names of files that are not this grid's, by the reason why they count as missing."""
        return self._work.all_others

    @cached_property
    def _asked(self) -> dict[str, int | None]:
        return {}

    def asked(self, name: str) -> int | None:
        """What two cells that answered the same questions of a set have in common."""
        if name not in self._asked:
            answers = self._work.answers(name)
            self._asked[name] = answers and hash(tuple(answers["Question"]))
        return self._asked[name]

    def verdicts(self, name: str, judge: str) -> list[str] | None:
        """A judge's verdicts on the answers to a prompt set, or what most judges say."""
        if judge == MAJORITY:
            every = [self.verdicts(name, each) for each in self.judges]
            return None if None in every else majority(every)
        return self._work.verdicts(name, judge)

    def verdict_files(self, name: str, judge: str) -> list[Path]:
        """The files that `verdicts` reads."""
        return [self.files.verdicts(name, each) for each in (self.judges if judge == MAJORITY else [judge])]

    def unjudged(self, name: str, judge: str) -> dict[str, int]:
        """How many rows that judge gave no verdict, by its reasons."""
        if judge == MAJORITY:
            divided = (self.verdicts(name, judge) or []).count(EMPTY)
            return {DIVIDED: divided} if divided else {}
        noted = read_noted(paths.facts_file(self.files.verdicts(name, judge)), VerdictFacts)
        noted = noted.get(ANSWER_COLUMNS[self._work.answer_column][1], {}).get("unjudged")
        n = (self.verdicts(name, judge) or []).count(EMPTY)
        return (noted or {reason_of(EMPTY): n}) if n else {}

    @property
    def benign_answers(self) -> list[str] | None:
        answers = self._work.answers(BENIGN)
        return answers and answers[self._work.answer_column]


class Condition(NamedTuple):
    """A way to choose heads: its name, and the treatments that belong to it (several where draws are pooled)."""

    name: str
    treatments: list[Treatment | None]

    @property
    def share(self) -> float | None:
        return self.treatments[0] and self.treatments[0].share

    @property
    def scaling_factor(self) -> float | None:
        return self.treatments[0] and self.treatments[0].scaling_factor


BASE_CONDITION = Condition(BASE, [None])


class Cells:
    """All cells of one model of a grid, as they are on disk."""

    def __init__(self, grid: Grid, pair: Pair, results: Path):
        self.grid, self.pair, self.results = grid, pair, results
        subject = SubjectOnDisk(grid, pair, results)
        self._found = {(cell.language, cell.treatment): FoundCell(subject, cell) for cell in grid_cells(grid, pair)}

    @property
    def every(self) -> list[FoundCell]:
        return list(self._found.values())

    def get(self, language: str, treatment: Treatment | None) -> FoundCell | None:
        """A language's cell, or None. Heads shared by `tier` are its own tier's; its own heads are the method's."""
        if treatment and treatment.of == TIER:
            treatment = replace(treatment, of=find_language(language).tier)
        elif treatment and (treatment.kind, treatment.of) == ("from", language):
            treatment = method_of(self.grid)
        return self._found.get((language, treatment))

    def of(self, condition: Condition, languages: list[str]) -> list[FoundCell]:
        """A condition's cells over languages; an empty list if the grid lacks one of them."""
        found = [self.get(language, treatment) for language in languages for treatment in condition.treatments]
        return found if all(found) else []


def method_conditions(grid: Grid) -> list[Condition]:
    """Base, the language's own heads, and the shared heads that the grid asks for."""
    shared = [
        Condition(name, [Treatment("shared", None, grid.scaling_factor, of=group)])
        for name, group in ((SHARED_TIER, TIER), (SHARED_ALL, UNIVERSAL))
        if group in grid.ablations.shared
    ]
    return [BASE_CONDITION, Condition(METHOD, [method_of(grid)]), *shared]


def control_conditions(grid: Grid, shares: list[float | None]) -> list[Condition]:
    """Base, then top, random and bottom heads at each share (None: as many as the given lists have), then all heads."""
    wanted, factor = grid.ablations, grid.scaling_factor
    draws = {"top": [""], "random": [str(draw) for draw in range(wanted.random_draws)], "bottom": [""] * wanted.bottom}
    found = [
        Condition(f"{kind} heads", [Treatment(kind, share, factor, of=draw) for draw in drawn])
        for kind, drawn in draws.items()
        for share in shares
        if drawn and share != 1
    ]
    every = [Condition(ALL_HEADS, [Treatment.best(1.0, factor)])] if 1 in {*shares, *wanted.shares} else []
    return [BASE_CONDITION, *found, *every]


def head_conditions(grid: Grid) -> list[Condition]:
    """The ablation over heads: the controls at every share, then shared heads."""
    return control_conditions(grid, grid.head_shares) + method_conditions(grid)[2:]


def scaling_conditions(grid: Grid) -> list[Condition]:
    """The ablation over λ: base, then the method at each."""
    return [BASE_CONDITION, *_along_factors(grid, TOP)]


def ranking_conditions(grid: Grid) -> list[Condition]:
    """Base, then the method and each of its rivals at each λ; none where the grid asks for no rivals."""
    rivals = [
        Condition(RANKINGS[name], rival_treatments(grid, name, factor))
        for name in grid.ablations.rankings
        for factor in grid.trade_off_factors(name)
    ]
    own = GIVEN if grid.head_folder else RANKINGS[grid.scoring.answer]
    return [BASE_CONDITION, *_along_factors(grid, own), *rivals] if rivals else []


def _along_factors(grid: Grid, name: str) -> list[Condition]:
    return [Condition(name, [Treatment.best(grid.method_share, factor)]) for factor in grid.trade_off_factors()]
