"""Writes a grid's tables, figures and report, and prints the main tables."""

import re
from pathlib import Path

from soteria import disk
from soteria.grid import durations
from soteria.grid.grid_file import Grid
from soteria.reporting import figures, fonts, report
from soteria.reporting.verdicts import verdicts
from soteria.reporting.write_up import WriteUp, compose
from soteria.storage import files, paths
from soteria.storage.table_formats import escape_markdown, to_csv, to_latex, to_markdown

PRINTED = ("main", "controls")  # the tables that are printed too


def write_grid(grid: Grid, grid_file: Path, results: Path, options: str = "") -> None:
    """Write all of a grid's tables, its figures and the report; print the main tables and what is missing.

    The same cells give the same bytes. `options`: of the command that the report names.
    """
    found = compose(grid, results)
    written = _write(found, grid_file, f"bash scripts/reproduce.sh {_shown_path(grid_file)}{options}")
    for table in found.tables:
        if table.name in PRINTED:
            print(f"{found.caption(table)}\n\n{to_markdown(table.readable)}")
    for table in found.tables:
        print(f"{found.path(table.name, 'md')}: {table.counted}")
    for line in (*verdicts(found), *_left_out(found)):
        print(line)
    if lines := not_run(found):
        print("\n".join(lines[:3]))
        print(f"{len(lines) - 3} more such lines: see {paths.report_file(results)}\n" * (len(lines) > 3), end="")
    print(f"wrote {len(written)} files under {written[0].parent}, and {written[-1]}")


def _write(found: WriteUp, grid_file: Path, command: str) -> list[Path]:
    """Write every table (Markdown, CSV, LaTeX), every figure (PNG, PDF) and the report; returns the paths."""
    written = []
    for table in found.tables:
        caption = found.caption(table)
        texts = {
            "md": f"{escape_markdown(caption)}\n\n{to_markdown(table.readable)}",
            "csv": to_csv(table.tidy),
            "tex": to_latex(table.readable, caption),
        }
        for ending, text in texts.items():
            files.write_text(found.path(table.name, ending), text)
            written.append(found.path(table.name, ending))
    for picture in found.pictures:
        written += figures.save(picture.figure, found.path(picture.name, "png"))
    page = paths.report_file(found.results)
    files.write_text(page, _page(found, grid_file, command))
    return [*written, page]


def _page(found: WriteUp, grid_file: Path, command: str) -> str:
    """The report: summary, tables with their pictures, and what they were made with."""
    grid = found.grid
    sections = []
    for table in found.tables:
        places = tuple(f"tables/{found.path(table.name, ending).name}" for ending in ("csv", "md", "tex"))
        sections.append(report.Section(table.title, table.text, table.readable, found.caption(table), files=places))
    for picture in found.pictures:
        place = found.path(picture.name, "png")
        shown = {"picture": place, "alt": picture.title, "files": picture.numbers}
        sections.append(report.Section(picture.title, picture.text, **shown))
    models = ", ".join(pair.slug for pair in grid.models)
    heads = f"the lists in {grid.head_folder}" if grid.head_folder else f"the best {grid.heads:.0%}"
    return report.render_report(
        f"Soteria: {grid.name}",
        [
            f"Models: {models}. Languages: {', '.join(grid.languages)}.",
            f"Functional heads: {heads}; λ = {grid.scaling_factor:g}.",
            f"Judge: {found.judged_by}.",
            *verdicts(found),
        ],
        sections,
        report.environment_facts() | _devices(found),
        grid_file.read_text(encoding="utf-8"),
        [command],
        [*map(_without_folders, not_run(found)), *_left_out(found)],
    )


def _left_out(found: WriteUp) -> list[str]:
    """Pictures that could not be drawn, and fonts that are missing."""
    return [*found.left_out, *filter(None, [fonts.missing_fonts(found.grid.languages)])]


def _shown_path(path: Path) -> str:
    """A path without this machine's folders: relative to the repository, or its name alone."""
    inside = path.resolve().is_relative_to(paths.ROOT)
    return path.resolve().relative_to(paths.ROOT).as_posix() if inside else path.name


def _without_folders(sentence: str) -> str:
    """A sentence without this machine's folders: of an absolute path, the name alone."""
    return re.sub(r"(?<![\w/.~-])/(?:[^/\s'\"]+/)+(?=[^/\s'\"])", "", sentence)


def _devices(found: WriteUp) -> dict[str, str]:
    """What the cells were measured on, as they noted it."""
    seen = {}
    for pair in found.grid.models:
        for taken in durations.noted(found.results, pair.slug):
            seen.setdefault(taken["device"])
    return {"measured on": ", ".join(device for device in seen if device != "none") or "unknown"}


def not_run(found: WriteUp) -> list[str]:
    """Why cells have no numbers: those of other inputs and those that failed, and how many were just not run yet."""
    lines, missing, grid, results = [], 0, found.grid, found.results
    for pair, cells in zip(grid.models, found.cells, strict=True):
        if (failure := paths.model_failure(results, pair.slug)).exists():
            lines.append(f"{pair.slug}: {_sentence(failure)}")
        for each in cells.every:
            cell, own = each.cell, each.files
            for reason, names in each.others.items():
                lines.append(f"{cell.name}: left blank: {', '.join(names)}: {reason}")
            failures = sorted(own.folder.glob(own.failure("*").name))
            judged = [own.verdicts(name, judge) for name in cell.sets for judge in grid.judges]
            lines += [f"{cell.name}: {_sentence(failure)}" for failure in failures]
            missing += not failures and not all(path.exists() for path in judged)
    return [*lines, *([f"{missing} cells were not run yet"] if missing else [])]


def _sentence(failure: Path) -> str:
    return disk.read_text(failure).strip()
