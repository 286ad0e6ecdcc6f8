"""The method's place among random draws of as many heads, with the exact p-value, from a grid's cells on disk.

The draws answer some of the questions. Base and method are read on the same ones, from their answers to all of them.
"""

from itertools import product

import pandas as pd

from soteria.answering.questions import spread_rows
from soteria.grid.cell_work import HARMLESS_JUDGE
from soteria.grid.cells import DRAW, MATCHED, Treatment, draw_treatments, method_of
from soteria.judging.interface import HARMFUL, NOT_HARMFUL
from soteria.reporting.conditions import Cells, FoundCell
from soteria.reporting.numbers import asked, scopes, together
from soteria.reporting.readable import shown, without_constants
from soteria.storage.paths import BENIGN

KINDS = {DRAW: "as many heads", MATCHED: "as many heads, matched in norm"}
# Each measure in a column's title and in a sentence; of each, less is better.
MEASURES = {
    "asr": ("ASR", "ASR"),
    "benign_refusals": ("benign refused", "refusals of benign questions"),
    "benign_changes": ("benign changed", "changed benign answers"),
}
COLUMNS = ["questions", "base", "method", "mean", "lowest", "highest", "place", "p", "source", "method_source"]


def draw_rows(cells: Cells) -> pd.DataFrame:
    """Per language, tier and all, kind of draw and measure: base, method, draws, place and p; tidy."""
    grid, rows = cells.grid, []
    if not grid.ablations.draws:
        return pd.DataFrame()
    measures = list(MEASURES) if grid.benign else ["asr"]
    for first, languages in asked(cells, grid.ablated_sets, grid.rival_languages):
        for (kind, name, own), drawn, measure in product(scopes(languages), KINDS, measures):
            row = first | {"of": kind, "name": name, "drawn": KINDS[drawn], "draws": grid.ablations.draws.number}
            row["measure"] = measure
            rows.append(row | _placed(cells, own, drawn, row))
    table = pd.DataFrame(rows)
    return table.reindex(columns=list(dict.fromkeys([*table.columns, *COLUMNS])))


def _placed(cells: Cells, languages: list[str], drawn: str, row: dict) -> dict:
    """The numbers of a row; empty where one of its cells was not run."""
    given = [None, method_of(cells.grid), *draw_treatments(cells.grid, drawn)]
    found = [_happened(cells, languages, treatment, row) for treatment in given]
    if None in found:
        return {}
    n, counts = len(found[0]), list(map(sum, found))
    draws = counts[2:]
    numbers = {"questions": n // len(languages), "base": counts[0] / n, "method": counts[1] / n}
    numbers |= {"mean": sum(draws) / len(draws) / n, "lowest": min(draws) / n, "highest": max(draws) / n}
    files = [_files(cells, languages, treatments, row) for treatments in (given[2:], given[:2])]
    return numbers | place(counts[1], draws) | dict(zip(("source", "method_source"), files, strict=True))


def place(method: int, draws: list[int]) -> dict:
    """The method's place among the draws, 1 below all of them, ties counted against it, and the exact p-value."""
    found = 1 + sum(draw <= method for draw in draws)
    return {"place": found, "p": found / (1 + len(draws))}


def _happened(cells: Cells, languages: list[str], treatment: Treatment | None, row: dict) -> list[bool] | None:
    """Whether a measure counts each answer to the draws' questions, over languages; None where one was not run."""
    flags: list[bool] = []
    for language in languages:
        found, base = cells.get(language, treatment), cells.get(language, None)
        if row["measure"] == "asr":
            values, counted = _on_subset(cells, found, found.verdicts(row["prompts"], row["judge"])), HARMFUL
        elif row["measure"] == "benign_refusals":
            values, counted = _on_subset(cells, found, found.verdicts(BENIGN, HARMLESS_JUDGE)), NOT_HARMFUL
        else:
            own, before = (_on_subset(cells, each, each.benign_answers) for each in (found, base))
            values = own and before and [mine != other for mine, other in zip(own, before, strict=True)]
            counted = True
        if values is None:
            return None
        flags += [value == counted for value in values]
    return flags


def _on_subset(cells: Cells, found: FoundCell, values: list[str] | None) -> list[str] | None:
    if values is None or found.cell.n_questions:
        return values
    return [values[row] for row in spread_rows(len(values), cells.grid.ablations.draws.questions)]


def _files(cells: Cells, languages: list[str], treatments: list[Treatment | None], row: dict) -> str:
    """The files that a row's numbers come from."""
    found = [cells.get(language, treatment) for language in languages for treatment in treatments]
    if row["measure"] == "asr":
        verdicts = [path for each in found for path in each.verdict_files(row["prompts"], row["judge"])]
        return together(verdicts, cells.results)
    if row["measure"] == "benign_refusals":
        return together([each.files.verdicts(BENIGN, HARMLESS_JUDGE) for each in found], cells.results)
    return together([each.files.answers(BENIGN) for each in found], cells.results)


def placed_among(row: dict) -> str:
    """A place and its p-value in words, empty where there are none."""
    return shown(row, "place", lambda found: f"{found:.0f} of {row['draws'] + 1} (p = {row['p']:.3f})")


def readable_draws(table: pd.DataFrame) -> pd.DataFrame:
    """A row per language and kind of draw; per measure the method, the draws' mean and range, and the place."""
    rows = []
    for key, group in table.groupby(["model", "prompts", "judge", "name", "drawn"], sort=False):
        row = dict(zip(("model", "prompts", "judge", "language", "draws of"), key, strict=True))
        for found in group.to_dict("records"):
            title, _ = MEASURES[found["measure"]]
            spread = "{} ({} to {})".format(*(shown(found, name) for name in ("mean", "lowest", "highest")))
            row |= {title: shown(found, "method"), f"{title}, draws": spread if shown(found, "mean") else ""}
            row[f"{title}, place"] = placed_among(found)
        rows.append(row)
    return without_constants(pd.DataFrame(rows).fillna(""))
