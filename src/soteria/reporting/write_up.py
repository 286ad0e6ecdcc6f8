"""Step 4 for a grid: its tables and figures as files, and the report that holds them all.

Knows which tables the paper has, what they are called and where their files go; the numbers are `grid_tables`', the
pictures `grid_figures`'.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from soteria.errors import UserError
from soteria.grid.cells import grid_cells
from soteria.grid.comparison import METHOD as TOP
from soteria.grid.grid_file import Grid, Pair
from soteria.judging.refusal import RefusalJudge
from soteria.reporting import figures, fonts, grid_tables, report
from soteria.reporting.grid_figures import DRAWINGS, ModelNumbers
from soteria.reporting.grid_tables import BASE, Cells
from soteria.storage import files, paths
from soteria.storage.paths import model_failure
from soteria.storage.table_formats import to_latex, to_markdown

# Whatever a table counts as its number; where that is blank, the cell was not run.
ASR, SHARE, UTILITY = "asr", "share_of_parameters", "safe"
GROUPS = ["model", "prompts", "judge"]  # what a table's rows are told apart by first


@dataclass
class Table:
    """One of the paper's tables: its name in files, a title, all its numbers, and what of them people read."""

    name: str
    title: str
    text: str
    tidy: pd.DataFrame
    readable: pd.DataFrame
    number: str  # the column of `tidy` that is blank where a cell was not run

    @property
    def blank(self) -> int:
        return int(self.tidy[self.number].isna().sum())

    @property
    def counted(self) -> str:
        """How many of its numbers there are."""
        n = len(self.tidy)
        return f"All {n} numbers were measured." if not self.blank else f"{self.blank} of {n} numbers: not run, blank."


@dataclass
class Picture:
    """A figure: its name in files, a title, a sentence, and where its numbers lie."""

    name: str
    title: str
    text: str
    figure: Figure
    numbers: tuple[str, ...]


@dataclass
class WriteUp:
    """Everything that a grid's cells say."""

    grid: Grid
    results: Path
    tables: list[Table] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)  # pictures that could not be drawn, and why

    @property
    def judged_by(self) -> str:
        """The judges, the offline one called what it is."""
        names = [RefusalJudge.description if judge == "refusal" else judge for judge in self.grid.judges]
        return ", ".join(names)

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
        judged = f"Judge: {self.judged_by}. " if table.number == ASR else ""
        return f"{table.title}. {judged}{table.counted}"


def compose(grid: Grid, results: Path) -> WriteUp:
    """All tables and pictures of a grid, from what its cells' files hold."""
    every = [Cells(grid, pair, results) for pair in grid.models]
    found = WriteUp(grid, results)
    prompts = ", ".join(each.name for each in grid.prompt_sets)
    method = f"top {grid.heads:.0%} of the heads, λ = {grid.scaling_factor:g}"

    def add(name: str, title: str, text: str, rows, readable, number: str = ASR) -> None:
        tidy = pd.concat([rows(cells) for cells in every], ignore_index=True)
        if len(tidy):
            found.tables.append(Table(name, title, text, tidy, readable(tidy), number))

    add(
        "main",
        f"ASR of the base and of steered models on {prompts} ({method})",
        "Attack success rate with its 95 % interval: Wilson's of a language, a bootstrap over questions where "
        "languages are pooled, in which translations of a question are drawn together. Differences are paired, in "
        "points.",
        grid_tables.main_rows,
        grid_tables.readable_main,
    )
    add(
        "heads",
        "Which heads are steered, and how many",
        "Over all languages: the language's own best heads, as many at random (draws pooled), as many from the bottom "
        "of the ranking, all, and heads that languages share. Refusals of benign questions are the refusal judge's, a "
        "proxy; changed are benign answers that are not the base's letter for letter.",
        lambda cells: grid_tables.ablation_rows(cells, grid_tables.head_conditions(cells)),
        grid_tables.readable_ablation,
    )
    add(
        "scaling",
        "How hard is steered (λ)",
        f"The language's own best {grid.heads:.0%} of heads. A λ is to be chosen on other questions than these: "
        "src/tune.py does.",
        lambda cells: grid_tables.ablation_rows(cells, grid_tables.scaling_conditions(cells)),
        grid_tables.readable_ablation,
    )
    add(
        "transfer",
        "Heads of language A (down), prompts in language B (across): ASR",
        "Where the two are one language, the heads are its own.",
        grid_tables.transfer_rows,
        grid_tables.readable_transfer,
    )
    add(
        "utility",
        f"Utility by lm-eval, base against steered ({method})",
        "Differences are of the steered model from the base, with standard errors that take the two as independent.",
        grid_tables.utility_rows,
        grid_tables.readable_utility,
        UTILITY,
    )
    add(
        "parameters",
        "Share of the parameters that steering changes",
        "Over the languages; every other parameter is the base's, bit for bit.",
        grid_tables.parameter_rows,
        grid_tables.readable_parameters,
        SHARE,
    )
    tidy = {table.name: table.tidy for table in found.tables}
    for pair in grid.models:
        _draw(found, ModelNumbers(grid, pair.slug, paths.scores_folder(results, pair.slug), tidy))
    return found


def _draw(found: WriteUp, numbers: ModelNumbers) -> None:
    """Add a model's pictures. One whose numbers do not suffice is left out, and said to be."""
    several, slug = len(found.grid.models) > 1, numbers.slug
    for name, drawing in DRAWINGS.items():
        try:
            figure = drawing.draw(numbers)
        except UserError as error:
            found.left_out.append(f"picture {name} of {slug}: {error}")
            continue
        places = tuple(f"tables/{found.path(table, 'csv').name}" for table in drawing.tables)
        title = f"{slug}: {drawing.title}" if several else drawing.title
        named = f"{name}_{slug}" if several else name
        found.pictures.append(Picture(named, title, drawing.text, figure, places or (f"indirect_effect/{slug}",)))


def not_run(grid: Grid, results: Path) -> list[str]:
    """Why cells have no numbers: those that failed with their sentences, and how many were just not run yet."""
    lines, missing = [], 0
    for pair in grid.models:
        if (failure := model_failure(results, pair.slug)).exists():
            lines.append(f"{pair.slug}: {_sentence(failure)}")
        for cell in grid_cells(grid, pair):
            failures = sorted(cell.files(results).folder.glob(cell.files(results).failure("*").name))
            judged = [cell.files(results).verdicts(name, judge) for name in cell.sets for judge in grid.judges]
            lines += [f"{cell.name}: {_sentence(failure)}" for failure in failures]
            missing += not failures and not all(path.exists() for path in judged)
    return [*lines, *([f"{missing} cells were not run yet"] if missing else [])]


def _sentence(failure: Path) -> str:
    return failure.read_text(encoding="utf-8").strip()


def write(found: WriteUp, grid_file: Path) -> list[Path]:
    """Write every table (Markdown, CSV, LaTeX), every picture (PNG, PDF) and the report; gives what was written."""
    written = []
    for table in found.tables:
        caption = found.caption(table)
        texts = {
            "md": f"{caption}\n\n{to_markdown(table.readable)}",
            "csv": table.tidy.to_csv(index=False, lineterminator="\n"),
            "tex": to_latex(table.readable, caption),
        }
        for ending, text in texts.items():
            files.write_text(found.path(table.name, ending), text)
            written.append(found.path(table.name, ending))
    for picture in found.pictures:
        written += figures.save(picture.figure, found.path(picture.name, "png"))
    page = paths.report_file(found.results)
    files.write_text(page, _page(found, grid_file))
    return [*written, page]


def stamp(grid: Grid, results: Path) -> Path:
    """Where it is noted what a grid's tables were made from, and what was written."""
    return paths.tables_stamp(results, grid.name)


def made_from(grid: Grid, grid_file: Path, results: Path) -> str:
    """A hash of all that the tables, pictures and report are made from: numbers, grid, code, versions, fonts."""
    digest = hashlib.sha256(json.dumps([report.environment_facts(), fonts.families()]).encode())
    code = [path for path in (paths.ROOT / "src").rglob("*") if path.suffix in (".py", ".jinja")]
    numbers = [path for pair in grid.models for path in _numbers(grid, pair, results)]
    for path in (grid_file, *sorted(code), *sorted(numbers)):
        digest.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _numbers(grid: Grid, pair: Pair, results: Path) -> Iterator[Path]:
    """Every file that a model's numbers come from."""
    for cell in grid_cells(grid, pair):
        yield from (path for path in cell.files(results).folder.glob("*") if path.is_file())
    scores = paths.scores_folder(results, pair.slug).glob("*/*_indirect_effect.pt")
    yield from (*scores, *(path for path in [paths.durations_file(results, pair.slug)] if path.exists()))


def written_before(grid: Grid, results: Path, inputs: str) -> list[Path] | None:
    """What an earlier call wrote, if it was made from the same inputs and is still there as it was; else None."""
    noted = files.read_facts(stamp(grid, results))
    if noted.get("made_from") != inputs:
        return None
    paths = {results / name: sha256 for name, sha256 in noted["files"].items()}
    sound = all(path.exists() and _sha256(path) == sha256 for path, sha256 in paths.items())
    return list(paths) if sound else None


def note_written(grid: Grid, results: Path, inputs: str, written: list[Path]) -> None:
    """Note what was written and from which inputs, so that the next call can leave it as it is."""
    known = {path.relative_to(results).as_posix(): _sha256(path) for path in written}
    files.write_json(stamp(grid, results), {"made_from": inputs, "files": known})


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _page(found: WriteUp, grid_file: Path) -> str:
    """The report: summary, tables with their pictures, and what they were made with."""
    grid = found.grid
    sections = []
    for table in found.tables:
        places = tuple(f"tables/{found.path(table.name, ending).name}" for ending in ("csv", "md", "tex"))
        sections.append(report.Section(table.title, table.text, table.readable, found.caption(table), files=places))
    for picture in found.pictures:
        place = found.path(picture.name, "png")
        sections.append(
            report.Section(picture.title, picture.text, picture=place, alt=picture.title, files=picture.numbers)
        )
    models = ", ".join(pair.slug for pair in grid.models)
    return report.render_report(
        f"Soteria: {grid.name}",
        [
            f"Models: {models}. Languages: {', '.join(grid.languages)}.",
            f"Functional heads: the best {grid.heads:.0%}; λ = {grid.scaling_factor:g}.",
            f"Judge: {found.judged_by}.",
            *verdicts(found),
        ],
        sections,
        report.environment_facts() | devices(found),
        grid_file.read_text(encoding="utf-8"),
        [f"bash scripts/reproduce.sh {shown_path(grid_file)}"],
        [
            *not_run(grid, found.results),
            *found.left_out,
            *([message] if (message := fonts.missing_fonts(grid.languages)) else []),
        ],
    )


def shown_path(path: Path) -> str:
    """A path as a colleague may see it: relative to the repository, or its name alone."""
    inside = path.resolve().is_relative_to(paths.ROOT)
    return path.resolve().relative_to(paths.ROOT).as_posix() if inside else path.name


def devices(found: WriteUp) -> dict[str, str]:
    """What the cells were measured on, as they noted it."""
    seen = {}
    for pair in found.grid.models:
        path = paths.durations_file(found.results, pair.slug)
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
            seen.setdefault(json.loads(line)["device"])
    return {"measured on": ", ".join(device for device in seen if device != "none") or "unknown"}


def verdicts(found: WriteUp) -> list[str]:
    """What the numbers say about the method and its controls, in sentences that the numbers alone decide."""
    sentences = []
    for (model, prompts, judge), group in found.tidy("heads").groupby(GROUPS, sort=False):
        by_name = group.set_index(["heads", "share"])["asr"].dropna()
        rates = {name: value for (name, share), value in by_name.items() if share == found.grid.heads}
        if TOP not in rates:
            continue
        base = group[group["heads"] == BASE]["asr"].iloc[0]
        sentence = f"{model}, {prompts}, {judge}: ASR {base:.1%} → {rates[TOP]:.1%} with the top heads"
        others = [f"{value:.1%} with as many {name}" for name, value in rates.items() if name != TOP]
        sentences.append(sentence + (f", {', '.join(others)}" if others else "") + ".")
        beaten = [name for name, value in rates.items() if name != TOP and value <= rates[TOP] + 0.005]
        if beaten:
            sentences.append(f"The functional heads are no better than {' and '.join(beaten)} here.")
    return sentences + transfer_verdicts(found)


def transfer_verdicts(found: WriteUp) -> list[str]:
    """Whether a language's own heads do more for it than other languages' heads do."""
    sentences = []
    for (model, prompts, judge), group in found.tidy("transfer").groupby(GROUPS, sort=False):
        group = group[group["heads_of"].isin(found.grid.languages)]
        own = group[group["heads_of"] == group["prompts_of"]]["asr"]
        others = group[group["heads_of"] != group["prompts_of"]]["asr"]
        if len(others) and not group["asr"].isna().any():
            sentences.append(
                f"{model}, {prompts}, {judge}: mean ASR {own.mean():.1%} with a language's own heads, "
                f"{others.mean():.1%} with another's."
            )
    return sentences
