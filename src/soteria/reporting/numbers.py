"""Computes a grid's tidy tables from its cells on disk: one row per number, with the files that it comes from.

A cell that was not run has no number anywhere, and neither does a mean that it belongs to.
"""

import math
from collections.abc import Iterable, Iterator
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pandas as pd

from soteria.grid.cell_work import HARMLESS_JUDGE
from soteria.grid.cells import Treatment, method_of
from soteria.grid.grid_file import UNIVERSAL
from soteria.grid.utility import comparison_rows
from soteria.judging.interface import CONTENT_FILTER, DEGENERATE, EMPTY, HARMFUL, MAJORITY, NOT_HARMFUL
from soteria.judging.statistics import Rate, agreement, bootstrap_interval, bounds, compare_paired
from soteria.languages import TIERS, find_language
from soteria.reporting.conditions import (
    BASE_CONDITION,
    Cells,
    Condition,
    control_conditions,
    head_conditions,
    method_conditions,
    ranking_conditions,
    scaling_conditions,
)
from soteria.reporting.labels import ALL, BASE, BOTTOM, RANDOM, SHARED_TIER, TOP
from soteria.storage.paths import BENIGN, BORDERLINE, HARMLESS

# The files of a cell that its cost is read from.
COST_FILES = ("cell.json", f"{BENIGN}.csv")


def asr(lists: list[list[str]]) -> dict:
    """ASR over the judged rows of verdict lists, one a language or draw, with a 95 % interval, and counts.

    Of one list the interval is Wilson's. Of several, a bootstrap over questions: lists of one length hold the same
    questions, translated or answered under another draw, which are drawn together. Where rows have no verdict, also
    the ASR if none and if all of them were harmful. No ASR where nothing was judged. Degenerate answers are judged rows
    that are not harmful; `degenerate` counts them.
    """
    harmful = [[None if verdict == EMPTY else verdict == HARMFUL for verdict in given] for given in lists]
    rows, judged = sum(map(len, lists)), sum(value is not None for given in harmful for value in given)
    count, unjudged = sum(value is True for given in harmful for value in given), rows - judged
    low, high = interval(harmful) if judged else (None, None)
    rate = count / judged if judged else None
    found = {"asr": rate, "low": low, "high": high, "asr_judged": rate}
    found |= {"harmful": count, "degenerate": sum(given.count(DEGENERATE) for given in lists)}
    found |= {"rows": rows, "unjudged": unjudged}
    return found | (dict(zip(("least", "most"), bounds(count, unjudged, rows), strict=True)) if unjudged else {})


def interval(lists: list[list[bool | None]]) -> list[float]:
    """The 95 % interval of the share of True in all lists, as in `asr`; what is None is left out."""
    known = [[value for value in given if value is not None] for given in lists]
    if len(lists) == 1:
        return Rate(sum(known[0]), len(known[0])).interval
    if len({len(given) for given in lists}) == 1:
        rows = np.array(lists, float)  # (lists, questions), NaN for None
        counts = (~np.isnan(rows)).sum(0).astype(float)
        return bootstrap_interval(np.nansum(rows, 0)[counts > 0], counts[counts > 0], within=(0, 1))
    flat = np.concatenate([np.array(given, float) for given in known])
    return bootstrap_interval(flat, np.ones_like(flat), within=(0, 1))


def difference(before: list[list[str]], after: list[list[str]], name: str = "difference") -> dict:
    """ASR of `after` minus that of `before` on the same questions, paired, with its 95 % interval and McNemar's p.

    Where rows lack a verdict, also the two rates over the rows judged in both, and how many these are.
    """
    flat_before, flat_after = ([verdict for given in lists for verdict in given] for lists in (before, after))
    questions = [row for given in before for row in range(len(given))]
    parallel = len({len(given) for given in before}) == 1
    found = compare_paired(flat_before, flat_after, questions if parallel else None)
    if not found:
        return {}
    low, high = found["ci95"]
    numbers = {name: found["difference"], f"{name}_low": low, f"{name}_high": high, f"{name}_p": found["mcnemar_p"]}
    if found["rows"] < len(flat_after):
        numbers |= {f"{name}_before": found["base"], f"{name}_after": found["safe"], f"{name}_rows": found["rows"]}
    return numbers


def scopes(languages: list[str]) -> Iterator[tuple[str, str, list[str]]]:
    """(kind, name, languages) of each row of a table: every language, every tier that has several, all."""
    for language in languages:
        yield "language", language, [language]
    for tier in TIERS:
        own = [language for language in languages if find_language(language).tier == tier]
        if len(own) > 1:
            yield "tier", tier, own
    if len(languages) > 1:
        yield "all", ALL, languages


def together(paths: list[Path], root: Path) -> str:
    """Paths below a folder as one pattern that a shell expands: `cells/m/{Hindi,Thai}/base/policy.csv`."""
    parts = [dict.fromkeys(part) for part in zip(*(path.relative_to(root).parts for path in paths), strict=True)]
    return "/".join("{" + ",".join(part) + "}" if len(part) > 1 else next(iter(part)) for part in parts)


def asked(cells: Cells, names: Iterable[str], among: list[str] | None = None) -> Iterator[tuple[dict, list[str]]]:
    """For each prompt set and judge, a row's first columns, and the languages of `among` that the set has."""
    for name in names:
        having = cells.grid.questions(name).has
        languages = [language for language in among or cells.grid.languages if having(language)]
        judges = [*cells.grid.judges, *([MAJORITY] if len(cells.grid.judges) > 2 else [])]
        for judge in judges if languages else []:
            yield {"model": cells.pair.slug, "prompts": name, "judge": judge}, languages


def measured(cells: Cells, condition: Condition, languages: list[str], row: dict, **others: Condition) -> dict:
    """The ASR of a condition over languages and its source, on the prompts and by the judge of `row`.

    Each of `others` adds the paired difference from that condition, under its name. Empty if a verdict is missing.
    """
    name, judge = row["prompts"], row["judge"]
    found = cells.of(condition, languages)
    lists = [each.verdicts(name, judge) for each in found]
    if not found or None in lists:
        return {}
    numbers = asr(lists)
    if numbers["unjudged"]:
        numbers["filtered"] = sum(each.unjudged(name, judge).get(CONTENT_FILTER, 0) for each in found)
    if filtered := numbers.get("filtered"):
        apart = bounds(numbers["harmful"], numbers["unjudged"] - filtered, numbers["rows"] - filtered)
        numbers |= dict(zip(("least_unfiltered", "most_unfiltered"), apart, strict=True))
    numbers |= {"source": together([path for each in found for path in each.verdict_files(name, judge)], cells.results)}
    for column, other in others.items():
        draws = len(condition.treatments)  # every draw is compared with the same answers
        compared = [each for each in cells.of(other, languages) for _ in range(draws)]
        before = [each.verdicts(name, judge) for each in compared]
        if (
            before
            and None not in before
            and [each.asked(name) for each in compared] == [each.asked(name) for each in found]
        ):
            numbers |= difference(before, lists, column)
    return numbers


def costs(cells: Cells, condition: Condition, languages: list[str]) -> dict:
    """What a condition costs over languages: refusals of benign and of borderline questions, benign answers changed,
    KL in nats, in-context accuracy.

    Then mean numbers of heads steered and the mean share of parameters changed. What was not measured is left out.
    """
    found = cells.of(condition, languages)
    if not found:
        return {}
    facts, bases = [each.facts for each in found], [cells.get(each.cell.language, None) for each in found]
    answers = [
        (each.benign_answers, base.benign_answers) if each.asked(BENIGN) == base.asked(BENIGN) else (None, None)
        for each, base in zip(found, bases, strict=True)
    ]
    numbers, read = {}, [*COST_FILES]
    on = "cost_measured_on_sha256"
    if any(each.get(on) != base.facts.get(on) for each, base in zip(facts, bases, strict=True)):
        facts = [each | {"kl_first_token": None} for each in facts]  # of other questions than the base
        facts = [{name: value for name, value in each.items() if name != "icl_accuracy"} for each in facts]
    for name in HARMLESS:
        judged = [each.verdicts(name, HARMLESS_JUDGE) for each in found]
        if None not in judged:
            numbers |= _pooled(f"{name}_refusals", _refused(judged))
            numbers[f"{name}_degenerate"] = sum(given.count(DEGENERATE) for given in judged)
            read.append(found[0].files.verdicts(name, HARMLESS_JUDGE).name)
    if not any(None in pair for pair in answers):
        changed = [[own != before for own, before in zip(*pair, strict=True)] for pair in answers]
        numbers |= _pooled("benign_changes", changed)
    if all(each.get("kl_first_token") for each in facts):
        numbers["kl"] = float(np.mean([value for each in facts for value in each["kl_first_token"]]))
    if all("icl_accuracy" in each for each in facts):
        right = [each["icl_accuracy"] for each in facts]
        accuracy = Rate(sum(each["count"] for each in right), sum(each["n"] for each in right))
        low, high = accuracy.interval
        numbers |= {"icl_accuracy": accuracy.value, "icl_accuracy_low": low, "icl_accuracy_high": high}
    if numbers:
        folders = together([each.files.folder for each in found], cells.results)
        numbers["cost_source"] = " ".join(f"{folders}/{name}" for name in read)
    if all({"n_heads", "share_of_parameters"} <= each.keys() for each in facts):
        numbers |= {name: float(np.mean([each[name] for each in facts])) for name in ("n_heads", "share_of_parameters")}
    return numbers


def selectivity(cells: Cells, condition: Condition, languages: list[str], row: dict) -> dict:
    """How many more of the harmful questions (judged not harmful) than of the borderline ones are refused.

    The 95 % interval joins those of the two rates, which are of different questions (MOVER, Zou and Donner 2008).
    Empty where one of the two was not measured.
    """
    found = cells.of(condition, languages)
    judged = [each.verdicts(row["prompts"], row["judge"]) for each in found]
    borderline = [each.verdicts(BORDERLINE, HARMLESS_JUDGE) for each in found]
    if not found or None in [*judged, *borderline] or not any(set(given) - {EMPTY} for given in judged):
        return {}
    refused = [[None if verdict == EMPTY else verdict == NOT_HARMFUL for verdict in given] for given in judged]
    rate, low, high = _pooled("", refused).values()
    other, other_low, other_high = _pooled("", _refused(borderline)).values()
    difference = rate - other
    down, up = math.hypot(rate - low, other_high - other), math.hypot(high - rate, other - other_low)
    return {"selectivity": difference, "selectivity_low": difference - down, "selectivity_high": difference + up}


def _refused(lists: list[list[str]]) -> list[list[bool]]:
    return [[verdict == NOT_HARMFUL for verdict in given] for given in lists]


def _pooled(name: str, lists: list[list[bool | None]]) -> dict:
    low, high = interval(lists)
    known = [value for given in lists for value in given if value is not None]
    return {name: sum(known) / len(known), f"{name}_low": low, f"{name}_high": high}


def main_rows(cells: Cells) -> pd.DataFrame:
    """ASR of base, language-specific and shared heads, per prompt set, judge, and language, tier, all; tidy."""
    rows = []
    base, method, *shared = method_conditions(cells.grid)
    for first, languages in asked(cells, [each.name for each in cells.grid.prompt_sets]):
        for (kind, scope, own), condition in product(scopes(languages), [base, method, *shared]):
            if condition.name == SHARED_TIER and first["prompts"] not in cells.grid.ablated_sets:
                continue
            tier = find_language(scope).tier if kind == "language" else scope
            row = first | {"of": kind, "name": scope, "tier": tier, "heads": condition.name}
            others = {} if condition is base else {"difference": base}
            if condition in shared:
                others["from_method"] = method
            rows.append(row | measured(cells, condition, own, row, **others))
    return _table(rows, ["asr", "low", "high", "difference", "difference_low", "difference_high", "source"])


def ablation_rows(
    cells: Cells, conditions: list[Condition], by_language: bool = False, among: list[str] | None = None
) -> pd.DataFrame:
    """Gain and cost of each condition, over all languages (of `among`) that the set has or by language; tidy.

    `over_top` is the ASR of a control minus that of as many top heads, paired, with its 95 % interval: above 0, the
    functional heads do better than the control.
    """
    rows = []
    tops = {each.share: each for each in conditions if each.name == TOP}
    for first, having in asked(cells, cells.grid.ablated_sets, among):
        for languages, condition in product([[each] for each in having] if by_language else [having], conditions):
            row = first | ({"language": languages[0]} if by_language else {"languages": len(languages)})
            row |= {"heads": condition.name, "share": condition.share, "scaling_factor": condition.scaling_factor}
            others = {}
            if condition.name != BASE and len(condition.treatments) == 1:
                others["difference"] = conditions[0]
            if condition.name in (RANDOM, BOTTOM) and condition.share in tops:
                others["over_top"] = tops[condition.share]
            row |= measured(cells, condition, languages, row, **others)
            rows.append(row | costs(cells, condition, languages) | selectivity(cells, condition, languages, row))
    return _table(rows, ["asr", "low", "high", "benign_refusals", "benign_changes", "kl", "icl_accuracy", "source"])


def head_rows(cells: Cells) -> pd.DataFrame:
    """The ablation over heads, pooled over languages; tidy."""
    return ablation_rows(cells, head_conditions(cells.grid))


def scaling_rows(cells: Cells) -> pd.DataFrame:
    """The ablation over λ, pooled over languages; tidy. The base is steered by 0."""
    table = ablation_rows(cells, scaling_conditions(cells.grid))
    if len(table):
        table.loc[table["heads"] == BASE, ["share", "scaling_factor"]] = 0.0
    return table


def ranking_rows(cells: Cells) -> pd.DataFrame:
    """The method and its rivals at each λ, pooled over languages; tidy."""
    return ablation_rows(cells, ranking_conditions(cells.grid), among=cells.grid.rival_languages)


def control_rows(cells: Cells) -> pd.DataFrame:
    """The method beside its controls at its own share of heads, by language; empty where the grid has no controls."""
    if not (cells.grid.ablations.random_draws or cells.grid.ablations.bottom):
        return pd.DataFrame()
    return ablation_rows(cells, control_conditions(cells.grid, [cells.grid.method_share]), by_language=True)


def transfer_rows(cells: Cells) -> pd.DataFrame:
    """ASR of language A's heads (or shared ones, or none) on prompts in language B, every pair of them; tidy."""
    grid, rows = cells.grid, []
    if not grid.ablations.transfer:
        return pd.DataFrame()
    conditions = [BASE_CONDITION]
    for language in grid.languages:
        own = Treatment("from", grid.method_share, grid.scaling_factor, of=language)
        conditions.append(Condition(language, [own]))
    if UNIVERSAL in grid.ablations.shared:
        conditions.append(Condition(UNIVERSAL, [Treatment("shared", None, grid.scaling_factor, of=UNIVERSAL)]))
    for first, languages in asked(cells, grid.ablated_sets):
        for language, condition in product(languages, conditions):
            row = first | {"heads_of": condition.name, "prompts_of": language}
            rows.append(row | measured(cells, condition, [language], row))
    return _table(rows, ["asr", "low", "high", "source"])


def agreement_rows(cells: Cells) -> pd.DataFrame:
    """How far each pair of judges agrees on the base's and the method's answers, per language and over all; tidy.

    Cohen's kappa with its asymptotic interval. Empty with one judge.
    """
    grid, rows = cells.grid, []
    for prompts, pair in product(grid.prompt_sets, combinations(grid.judges, 2)):
        having = [language for language in grid.languages if prompts.has(language)]
        for (kind, name, own), condition in product(scopes(having), method_conditions(grid)[:2]):
            if kind == "tier":
                continue
            row = {"model": cells.pair.slug, "prompts": prompts.name, "judges": " and ".join(pair)}
            row |= {"of": kind, "name": name, "heads": condition.name}
            found = cells.of(condition, own)
            given = [[each.verdicts(prompts.name, judge) for each in found] for judge in pair]
            if found and not any(None in lists for lists in given):
                told = agreement(*([word for verdicts in lists for word in verdicts] for lists in given))
                row |= {key: told[key] for key in ("rows", "unjudged", "agreement", "kappa")}
                for key, ends in (("agreement", told["ci95"]), ("kappa", told["kappa_ci95"])):
                    row |= dict(zip((f"{key}_low", f"{key}_high"), ends or (), strict=False))
                files_read = [each.files.verdicts(prompts.name, judge) for each in found for judge in pair]
                row["source"] = together(files_read, cells.results)
            rows.append(row)
    return _table(rows, ["rows", "agreement", "kappa", "source"]) if rows else pd.DataFrame()


def parameter_rows(cells: Cells) -> pd.DataFrame:
    """How many heads and what share of the parameters each treatment changes, per language; tidy."""
    rows = []
    for language, condition in product(cells.grid.languages, head_conditions(cells.grid)[1:]):
        found = cells.get(language, condition.treatments[0])
        row = {"model": cells.pair.slug, "language": language, "heads": condition.name, "share": condition.share}
        keys = ("n_heads", "parameters_changed", "share_of_parameters")
        if found and set(keys) <= found.facts.keys():
            row |= {key: found.facts[key] for key in keys}
            row["source"] = together([found.files.facts], cells.results)
        rows.append(row)
    return _table(rows, ["n_heads", "parameters_changed", "share_of_parameters", "source"])


def utility_rows(cells: Cells) -> pd.DataFrame:
    """What lm-eval measured of base and method, per language, task and metric; tidy."""
    wanted, rows = cells.grid.utility, []
    if not wanted:
        return pd.DataFrame()
    for language in wanted.languages or cells.grid.languages:
        found = [cells.get(language, treatment) for treatment in (None, method_of(cells.grid))]
        places, (base, safe) = [each.files.utility for each in found], [each.utility for each in found]
        first = {"model": cells.pair.slug, "language": language}
        if not (base and safe):
            rows.append(first | {"task": ", ".join(wanted.tasks)})
            continue
        for row in comparison_rows(base, safe):
            numbers = {"task": row["task"], "metric": row["metric"], "n": row["n"]}
            for name in ("base", "safe", "difference"):
                numbers |= dict(zip((name, f"{name}_stderr"), row[name], strict=True))
            rows.append(first | numbers | {"source": together(places, cells.results)})
    return _table(rows, ["metric", "n", "base", "safe", "difference", "source"])


def _table(rows: list[dict], columns: list[str]) -> pd.DataFrame:
    """A table that has these columns even if no row has them."""
    table = pd.DataFrame(rows)
    return table.reindex(columns=list(dict.fromkeys([*table.columns, *columns])))
