"""Composes a grid's tables and figures (step 4) from its cells on disk."""

from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from soteria.errors import UserError
from soteria.grid.grid_file import Grid
from soteria.judging.refusal import RefusalJudge
from soteria.reporting import draws, numbers, readable
from soteria.reporting.conditions import Cells
from soteria.reporting.grid_figures import DRAWINGS, ModelNumbers
from soteria.scoring.prompts import WHOLE
from soteria.storage import paths

# The columns that are blank where a cell was not run; the first that a table has counts.
NUMBERS = ("asr", "safe", "share_of_parameters", "p", "agreement")
# How each table's numbers are computed, and how they are laid out for readers.
CONTENTS = {
    "main": (numbers.main_rows, readable.readable_main),
    "heads": (numbers.head_rows, readable.readable_ablation),
    "controls": (numbers.control_rows, readable.readable_ablation),
    "scaling": (numbers.scaling_rows, readable.readable_ablation),
    "rankings": (numbers.ranking_rows, readable.readable_ablation),
    "draws": (draws.draw_rows, draws.readable_draws),
    "transfer": (numbers.transfer_rows, readable.readable_transfer),
    "utility": (numbers.utility_rows, readable.readable_utility),
    "agreement": (numbers.agreement_rows, readable.readable_agreement),
    "parameters": (numbers.parameter_rows, readable.readable_parameters),
}
GROUPS = ["model", "prompts", "judge"]  # every table's first columns


@dataclass
class Table:
    """One of the paper's tables: its name in files, a title, all its numbers, and the part that people read."""

    name: str
    title: str
    text: str
    tidy: pd.DataFrame
    readable: pd.DataFrame

    @property
    def number(self) -> str:
        return next(name for name in NUMBERS if name in self.tidy)

    @property
    def counted(self) -> str:
        """How many of its numbers were measured."""
        n, blank = len(self.tidy), self.tidy[self.number].isna().sum()
        lacking = self.tidy["least"].notna() if "least" in self.tidy else pd.Series(dtype=bool)
        nothing = int((lacking & self.tidy[self.number].isna()).sum())
        blank -= nothing
        counted = f"{blank} of {n} numbers: not run, blank." if blank else f"All {n} numbers were measured."
        if lacking.any():
            is_filtered = bool(self.tidy["filtered"].sum())
            filtered = ", some of which a content filter blocked" * is_filtered
            apart = (
                "; then how many the filter blocked, and the two rates without these where others are left"
                * is_filtered
            )
            counted += (
                f" {lacking.sum()} are of rows without a verdict{filtered}: ASR is over the judged rows, and in "
                "parentheses stand the rows without one of all rows, and the ASR if none and if all of them are "
                f"harmful{apart}; after a difference, both ASRs on the rows judged in both, and their number."
            )
        if "degenerate" in self.tidy and self.tidy["degenerate"].sum():
            counted += " Degenerate answers (an echo, a repetition, another language) count as judged and not harmful."
        return counted + f" {nothing} have no judged row at all." * bool(nothing)


@dataclass
class Picture:
    """A figure: its name in files, a title, a sentence, and the files that hold its numbers."""

    name: str
    title: str
    text: str
    figure: Figure
    numbers: tuple[str, ...]


@dataclass
class WriteUp:
    """Everything that a grid's cells show."""

    grid: Grid
    results: Path
    cells: list[Cells] = field(default_factory=list)  # of each model
    tables: list[Table] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)  # pictures that could not be drawn, and why

    @property
    def judged_by(self) -> str:
        """The judges and how they are asked, the offline one called what it is."""
        return ", ".join(
            RefusalJudge.description if judge == "refusal" else judge + self.grid.judge_option(judge).settings.described
            for judge in self.grid.judges
        )

    @property
    def folder(self) -> Path:
        return self.results / "tables"

    def table(self, name: str) -> pd.DataFrame:
        """A table as people read it; an empty one where the grid does not have it."""
        return next((table.readable for table in self.tables if table.name == name), pd.DataFrame())

    def tidy(self, name: str) -> pd.DataFrame:
        """All numbers of a table; an empty one where the grid does not have it."""
        return next((table.tidy for table in self.tables if table.name == name), pd.DataFrame(columns=GROUPS))

    def picture(self, name: str, slug: str = "") -> Figure | None:
        """A picture, of the model of that slug where the grid has several; None where it could not be drawn."""
        wanted = {name, f"{name}_{slug or self.grid.models[0].slug}"}
        return next((picture.figure for picture in self.pictures if picture.name in wanted), None)

    def path(self, name: str, ending: str) -> Path:
        return paths.table_file(self.results, self.grid.name, name, ending)

    def caption(self, table: Table) -> str:
        judged = f"Judge: {self.judged_by}. " if table.number in ("asr", "p") else ""
        return f"{table.title}. {judged}{table.counted}"


def compose(grid: Grid, results: Path) -> WriteUp:
    """All tables and pictures of a grid, from what its cells' files hold."""
    found = WriteUp(grid, results, [Cells(grid, pair, results) for pair in grid.models])
    for name, (title, text) in _texts(grid).items():
        rows, read = CONTENTS[name]
        tidy = pd.concat([rows(cells) for cells in found.cells], ignore_index=True)
        if len(tidy):
            found.tables.append(Table(name, title, text, tidy, read(tidy)))
    tidy = {table.name: table.tidy for table in found.tables}
    for pair in grid.models:
        _draw(found, ModelNumbers(grid, pair.slug, grid.scores(results, pair), tidy))
    return found


def _texts(grid: Grid) -> dict[str, tuple[str, str]]:
    """The title and the text of each table, by its name."""
    prompts = ", ".join(each.name for each in grid.prompt_sets)
    heads = "the given lists" if grid.head_folder else f"top {grid.heads:.0%} of the heads"
    if grid.scoring.answer == WHOLE:
        heads += " by whole answers"
    method = f"{heads}, λ = {grid.scaling_factor:g}"
    return {
        "main": (
            f"ASR of the base and of steered models on {prompts} ({method})",
            "Attack success rate with its 95 % interval: Wilson's of a language, a bootstrap over questions where "
            "languages are pooled, in which translations of a question are drawn together. Differences are paired, in "
            "points.",
        ),
        "heads": (
            "Which heads are steered, and how many",
            "Over all languages: the language's own best heads, as many at random (draws pooled), as many from the "
            "bottom of the ranking, all, and heads that languages share. Refusals of harmless questions, and "
            "degenerate answers to them, which are no refusals, are the refusal judge's, a proxy; changed are benign "
            "answers that are not the base's letter for letter."
            + " Borderline questions are harmless and look harmful; selectivity is how many more of the harmful "
            "questions (judged not harmful) than of these are refused." * bool(grid.borderline),
        ),
        "controls": (
            f"The method beside its controls, by language ({method})",
            "As many heads drawn at random (draws pooled), as many from the bottom of the ranking, and all heads.",
        ),
        "scaling": (
            "How hard is steered (λ)",
            f"Heads: {heads}. Choose λ on other questions than those reported: configs/validation.yaml and src/tune.py "
            "do.",
        ),
        "rankings": (
            "The method and its rivals along λ",
            "As many heads by each ranking; draws of random heads are pooled; all parameters are the plain baseline of "
            "task arithmetic, which steers every weight. Over all languages.",
        ),
        "draws": (
            f"The method's place among random draws ({method})",
            "Method and draws answer the same questions, spread over the sets. Draws have as many heads, at the same λ "
            "or, matched, at a λ that changes their slices by the method's norm of the change; a draw's heads are the "
            "same in every language. Place 1 is below all draws, ties count against the method, and the exact p-value "
            "is the place divided by the number of places.",
        ),
        "transfer": (
            "Heads of language A (down), prompts in language B (across): ASR",
            "Where the two are one language, the heads are its own.",
        ),
        "utility": (
            f"Utility by lm-eval, base against steered ({method})",
            "Differences are of the steered model from the base, with standard errors that take the two as "
            "independent.",
        ),
        "agreement": (
            "How far the judges agree",
            "On the answers of the base and of the method: the share of rows with the same label, harmful or not, and "
            "Cohen's kappa; rows that one of the two did not judge are left out. With three judges or more, the tables "
            "also have what most of them say.",
        ),
        "parameters": (
            "Share of the parameters that steering changes",
            "Over the languages; every other parameter is the base's, bit for bit.",
        ),
    }


def _draw(found: WriteUp, own: ModelNumbers) -> None:
    """Add a model's pictures. One whose numbers do not suffice is left out, and said to be."""
    several, slug = len(found.grid.models) > 1, own.slug
    for name, drawing in DRAWINGS.items():
        if name == "rankings" and not found.grid.ablations.rankings:
            continue
        try:
            figure = drawing.draw(own)
        except UserError as error:
            found.left_out.append(f"picture {name} of {slug}: {error}")
            continue
        places = tuple(f"tables/{found.path(table, 'csv').name}" for table in drawing.tables)
        title = f"{slug}: {drawing.title}" if several else drawing.title
        named = f"{name}_{slug}" if several else name
        found.pictures.append(
            Picture(named, title, drawing.text, figure, places or (f"indirect_effect/{own.scores.name}",))
        )
