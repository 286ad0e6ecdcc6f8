"""Step 4 for a grid: from its cells' files to tables. Computes nothing that the files do not hold; measures nothing.

Each table is a tidy frame (numbers, a row each, with the files they come from) and a readable one made of it. A cell
that was not run has no number anywhere, and neither has a mean that it belongs to.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from soteria.grid.cell_work import BENIGN_JUDGE
from soteria.grid.cells import Cell, Steering, grid_cells, method_of
from soteria.grid.grid_file import TIER, UNIVERSAL, Grid, Pair
from soteria.grid.utility import comparison_rows
from soteria.judging.interface import EMPTY, HARMFUL, NOT_HARMFUL
from soteria.judging.statistics import Rate, bootstrap_interval, compare_paired
from soteria.languages import TIERS, find_language
from soteria.reporting.tables import percent
from soteria.storage import files
from soteria.storage.csv_files import read_table
from soteria.storage.paths import ANSWER_COLUMNS, BASE_ANSWER, BENIGN, SAFE_ANSWER

BASE, METHOD, ALL = "base", "language-specific", "all languages"
SHARED_TIER, SHARED_ALL = "shared by the tier", "universal"
NOT_APPLICABLE = "–"  # what is blank was not run
COST_FILES = ("cell.json", f"{BENIGN}.csv", f"{BENIGN}.by_{BENIGN_JUDGE}.csv")  # of a cell, what its cost is read from


@dataclass(frozen=True)
class FoundCell:
    """A cell's files as they are on disk; whatever is not there is None."""

    cell: Cell
    results: Path

    @cached_property
    def facts(self) -> dict:
        return files.read_facts(self.cell.files(self.results).facts)

    def verdicts(self, name: str, judge: str) -> list[str] | None:
        """A judge's verdicts on a set of answers."""
        path = self.verdict_file(name, judge)
        column = ANSWER_COLUMNS[SAFE_ANSWER if self.cell.steering else BASE_ANSWER][0]
        if not path.exists():
            return None
        table = read_table(path, ["Question"])
        return list(table[column]) if column in table.columns else None

    def verdict_file(self, name: str, judge: str) -> Path:
        return self.cell.files(self.results).verdicts(name, judge)

    def source(self, name: str, judge: str) -> str:
        """The verdicts' file as tables name it."""
        return self.verdict_file(name, judge).relative_to(self.results).as_posix()

    @cached_property
    def benign_answers(self) -> list[str] | None:
        path, column = self.cell.files(self.results).answers(BENIGN), SAFE_ANSWER if self.cell.steering else BASE_ANSWER
        return list(read_table(path, ["Question"])[column]) if path.exists() else None

    @cached_property
    def refusals(self) -> list[bool] | None:
        given = self.verdicts(BENIGN, BENIGN_JUDGE)
        return given and [verdict == NOT_HARMFUL for verdict in given]


class Cells:
    """All cells of one model of a grid, found on disk, each read once."""

    def __init__(self, grid: Grid, pair: Pair, results: Path):
        self.grid, self.pair, self.results = grid, pair, results
        self._found = {(cell.language, cell.steering): FoundCell(cell, results) for cell in grid_cells(grid, pair)}
        self._verdicts: dict[tuple, list[str] | None] = {}

    def get(self, language: str, steering: Steering | None) -> FoundCell | None:
        return self._found.get((language, steering))

    def verdicts(self, found: FoundCell, name: str, judge: str) -> list[str] | None:
        key = (found.cell.name, name, judge)
        if key not in self._verdicts:
            self._verdicts[key] = found.verdicts(name, judge)
        return self._verdicts[key]

    def shared(self, group: str) -> Steering:
        return Steering("shared", None, self.grid.scaling_factor, of=group)


@dataclass(frozen=True)
class Condition:
    """A way to choose heads: which of a language's steerings belong to it (several where draws are pooled)."""

    name: str
    cells: Callable[[str], list[Steering | None]]
    share: float | None = None
    scaling_factor: float | None = None


def method_conditions(cells: Cells) -> list[Condition]:
    """Base, the language's own heads, and those that its tier and all languages share, as far as the grid has them."""
    factor, shared = cells.grid.scaling_factor, cells.grid.ablations.shared
    found = [
        Condition(BASE, lambda _: [None]),
        Condition(METHOD, lambda _: [method_of(cells.grid)], cells.grid.heads, factor),
    ]
    if TIER in shared:
        found.append(Condition(SHARED_TIER, lambda name: [cells.shared(find_language(name).tier)], None, factor))
    if UNIVERSAL in shared:
        found.append(Condition(SHARED_ALL, lambda _: [cells.shared(UNIVERSAL)], None, factor))
    return found


def head_conditions(cells: Cells) -> list[Condition]:
    """The ablation over heads: base, then shares of top, random and bottom heads, then shared ones."""
    wanted, factor = cells.grid.ablations, cells.grid.scaling_factor
    shares = sorted({*wanted.shares, cells.grid.heads})
    base, *methods = method_conditions(cells)
    found = [base]
    for kind, given in (("top", True), ("random", wanted.random_draws), ("bottom", wanted.bottom)):
        for share in shares:
            if not given or share == 1:
                continue
            draws = [str(draw) for draw in range(wanted.random_draws)] if kind == "random" else [""]
            steerings = [Steering(kind, share, factor, of=draw) for draw in draws]
            found.append(Condition(f"{kind} heads", lambda _, own=steerings: own, share, factor))
    if 1 in shares:
        found.append(Condition("all heads", lambda _: [Steering.best(1.0, factor)], 1.0, factor))
    return found + [each for each in methods if each.name != METHOD]


def scaling_conditions(cells: Cells) -> list[Condition]:
    """The ablation over λ: base, then the method at each."""
    factors = sorted({*cells.grid.ablations.scaling_factors, cells.grid.scaling_factor})
    share = cells.grid.heads
    return [
        Condition(BASE, lambda _: [None], 0.0, 0.0),
        *(Condition("top heads", lambda _, f=f: [Steering.best(share, f)], share, f) for f in factors),
    ]


# Numbers


def asr(lists: list[list[str]]) -> dict:
    """ASR over all rows of verdict lists, one a language or draw, with a 95 % interval, and counts.

    Of one list the interval is Wilson's. Of several, a bootstrap over questions: lists of one length hold the same
    questions, translated or answered under another draw, which are drawn together.
    """
    harmful = [[verdict == HARMFUL for verdict in given] for given in lists]
    count, n = sum(map(sum, harmful)), sum(map(len, harmful))
    judged = n - sum(given.count(EMPTY) for given in lists)
    low, high = interval(harmful)
    return {
        "asr": count / n,
        "low": low,
        "high": high,
        "asr_judged": count / judged if judged else None,
        "harmful": count,
        "rows": n,
        "unjudged": n - judged,
    }


def interval(lists: list[list[bool]]) -> list[float]:
    """The 95 % interval of a rate over lists of what is so."""
    if len(lists) == 1:
        return Rate(sum(lists[0]), len(lists[0])).interval
    if len({len(given) for given in lists}) == 1:
        rows = np.array(lists, float)  # (lists, questions)
        return bootstrap_interval(rows.sum(0), np.full(rows.shape[1], float(len(lists))))
    flat = np.concatenate([np.array(given, float) for given in lists])
    return bootstrap_interval(flat, np.ones_like(flat))


def difference(before: list[list[str]], after: list[list[str]], name: str = "difference") -> dict:
    """ASR of `after` minus that of `before` on the same questions, paired, with its 95 % interval and McNemar's p."""
    flat_before, flat_after = ([verdict for given in lists for verdict in given] for lists in (before, after))
    questions = [row for given in before for row in range(len(given))]
    parallel = len({len(given) for given in before}) == 1
    found = compare_paired(flat_before, flat_after, questions if parallel else None)
    if not found:
        return {}
    low, high = found["ci95"]
    return {name: found["difference"], f"{name}_low": low, f"{name}_high": high, f"{name}_p": found["mcnemar_p"]}


def scopes(grid: Grid, languages: list[str]) -> Iterator[tuple[str, str, list[str]]]:
    """(kind, name, languages) of each row of a table: every language, every tier that has several, all."""
    for language in languages:
        yield "language", language, [language]
    for tier in TIERS:
        own = [language for language in languages if find_language(language).tier == tier]
        if len(own) > 1:
            yield "tier", tier, own
    if len(languages) > 1:
        yield "all", ALL, languages


def gather(cells: Cells, condition: Condition, languages: Iterable[str], name: str, judge: str) -> dict | None:
    """Verdict lists of a condition over languages, and their sources; `lists` is None where one is not there."""
    lists, sources = [], []
    for language in languages:
        for steering in condition.cells(language):
            found = cells.get(language, steering)
            given = found and cells.verdicts(found, name, judge)
            if given is None:
                return None
            lists.append(given)
            sources.append(found.source(name, judge))
    return {"lists": lists, "source": together(sources)}


def together(paths: list[str]) -> str:
    """Several paths as one that a shell expands: `cells/m/{Hindi,Thai}/base/policy.csv`."""
    parts = [dict.fromkeys(part) for part in zip(*(path.split("/") for path in paths), strict=True)]
    return "/".join("{" + ",".join(part) + "}" if len(part) > 1 else next(iter(part)) for part in parts)


def costs(cells: Cells, condition: Condition, languages: list[str]) -> dict:
    """What a condition costs, over languages: benign refusals, benign answers changed, KL in nats, accuracy in context.

    Empty for what was not measured.
    """
    refused, changed, divergences, right, folders = [], [], [], [], []
    for language in languages:
        base = cells.get(language, None)
        for steering in condition.cells(language):
            found = cells.get(language, steering)
            if not found or not found.cell.with_cost or not base:
                return {}
            refused.append(found.refusals)
            if found.benign_answers is not None and base.benign_answers is not None:
                pairs = zip(found.benign_answers, base.benign_answers, strict=True)
                changed.append([own != before for own, before in pairs])
            else:
                changed.append(None)
            divergences.append(found.facts.get("kl_first_token"))
            right.append(found.facts.get("icl_accuracy"))
            folders.append(found.cell.files(cells.results).folder.relative_to(cells.results).as_posix())
    costs = {}
    for name, lists in (("benign_refusals", refused), ("benign_changes", changed)):
        if all(given is not None for given in lists):
            low, high = interval(lists)
            costs |= {name: sum(map(sum, lists)) / sum(map(len, lists)), f"{name}_low": low, f"{name}_high": high}
    if all(divergences):
        costs["kl"] = float(np.mean([value for given in divergences for value in given]))
    if all(right):
        accuracy = Rate(sum(each["count"] for each in right), sum(each["n"] for each in right))
        costs |= {"icl_accuracy": accuracy.value}
        costs |= dict(zip(("icl_accuracy_low", "icl_accuracy_high"), accuracy.interval, strict=True))
    if costs:
        costs["cost_source"] = " ".join(f"{together(folders)}/{name}" for name in COST_FILES)
    return costs


def main_rows(cells: Cells) -> pd.DataFrame:
    """ASR of base, language-specific and shared heads, per prompt set, judge, and language, tier, all; tidy."""
    rows = []
    for asked in cells.grid.prompt_sets:
        languages = [language for language in cells.grid.languages if asked.has(language)]
        for judge in cells.grid.judges:
            for kind, scope, own in scopes(cells.grid, languages):
                base, method = (
                    gather(cells, condition, own, asked.name, judge) for condition in method_conditions(cells)[:2]
                )
                for condition in method_conditions(cells):
                    if condition.name == SHARED_TIER and asked.name not in cells.grid.ablated_sets:
                        continue
                    row = {
                        "model": cells.pair.slug,
                        "prompts": asked.name,
                        "judge": judge,
                        "of": kind,
                        "name": scope,
                        "tier": find_language(scope).tier if kind == "language" else scope,
                        "heads": condition.name,
                    }
                    found = gather(cells, condition, own, asked.name, judge)
                    if found:
                        row |= asr(found["lists"]) | {"source": found["source"]}
                        if base and condition.name != BASE:
                            row |= difference(base["lists"], found["lists"])
                        if method and condition.name not in (BASE, METHOD):
                            row |= difference(method["lists"], found["lists"], "from_method")
                    rows.append(row)
    return _with_columns(rows, ["asr", "low", "high", "difference", "difference_low", "difference_high", "source"])


def ablation_rows(cells: Cells, conditions: list[Condition]) -> pd.DataFrame:
    """Gain and cost of each condition, over all languages that the set has; tidy."""
    rows = []
    for name in cells.grid.ablated_sets:
        languages = [language for language in cells.grid.languages if cells.grid.prompt_set(name).has(language)]
        for judge in cells.grid.judges:
            base = gather(cells, conditions[0], languages, name, judge)
            for condition in conditions:
                row = {
                    "model": cells.pair.slug,
                    "prompts": name,
                    "judge": judge,
                    "languages": len(languages),
                    "heads": condition.name,
                    "share": condition.share,
                    "scaling_factor": condition.scaling_factor,
                }
                found = gather(cells, condition, languages, name, judge)
                if found:
                    row |= asr(found["lists"]) | {"source": found["source"]}
                    if base and condition.name != BASE and len(found["lists"]) == len(base["lists"]):
                        row |= difference(base["lists"], found["lists"])
                row |= costs(cells, condition, languages) | changed_parameters(cells, condition, languages)
                rows.append(row)
    return _with_columns(
        rows, ["asr", "low", "high", "benign_refusals", "benign_changes", "kl", "icl_accuracy", "source"]
    )


def changed_parameters(cells: Cells, condition: Condition, languages: list[str]) -> dict:
    """Means over languages of how many heads are steered, and of the share of all parameters that this changes."""
    steered = [cells.get(language, steering) for language in languages for steering in condition.cells(language)]
    found = [each.facts for each in steered if each and "share_of_parameters" in each.facts]
    if not found or len(found) < len(steered):
        return {}
    return {
        "n_heads": float(np.mean([facts["n_heads"] for facts in found])),
        "share_of_parameters": float(np.mean([facts["share_of_parameters"] for facts in found])),
    }


def transfer_rows(cells: Cells) -> pd.DataFrame:
    """ASR of language A's heads (or shared ones, or none) on prompts in language B, every pair of them; tidy."""
    if not cells.grid.ablations.transfer:
        return pd.DataFrame()
    grid, rows = cells.grid, []
    for name in grid.ablated_sets:
        languages = [language for language in grid.languages if grid.prompt_set(name).has(language)]
        for judge in grid.judges:
            for prompts_of in languages:
                choices = {BASE: None}
                choices |= {
                    language: method_of(cells.grid)
                    if language == prompts_of
                    else Steering("from", grid.heads, grid.scaling_factor, of=language)
                    for language in grid.languages
                }
                if UNIVERSAL in grid.ablations.shared:
                    choices[UNIVERSAL] = cells.shared(UNIVERSAL)
                for heads_of, steering in choices.items():
                    row = {"model": cells.pair.slug, "prompts": name, "judge": judge}
                    row |= {"heads_of": heads_of, "prompts_of": prompts_of}
                    condition = Condition(heads_of, lambda _, own=steering: [own])
                    found = gather(cells, condition, [prompts_of], name, judge)
                    if found:
                        row |= asr(found["lists"]) | {"source": found["source"]}
                    rows.append(row)
    return _with_columns(rows, ["asr", "low", "high", "source"])


def parameter_rows(cells: Cells) -> pd.DataFrame:
    """How many heads and what share of the parameters each steering changes, per language; tidy."""
    rows = []
    for language in cells.grid.languages:
        for condition in head_conditions(cells)[1:]:
            steering = condition.cells(language)[0]
            found = cells.get(language, steering)
            facts = found.facts if found else {}
            row = {"model": cells.pair.slug, "language": language, "heads": condition.name, "share": condition.share}
            if "n_heads" in facts:
                row |= {key: facts[key] for key in ("n_heads", "parameters_changed", "share_of_parameters")}
                row["source"] = found.cell.files(cells.results).facts.relative_to(cells.results).as_posix()
            rows.append(row)
    return _with_columns(rows, ["n_heads", "parameters_changed", "share_of_parameters", "source"])


def utility_rows(cells: Cells) -> pd.DataFrame:
    """What lm-eval measured of base and method, per language, task and metric; tidy."""
    wanted, rows = cells.grid.utility, []
    if not wanted:
        return pd.DataFrame()
    for language in wanted.languages or cells.grid.languages:
        places = [
            cells.get(language, steering).cell.files(cells.results).utility
            for steering in (None, method_of(cells.grid))
        ]
        base, safe = (files.read_facts(place) for place in places)
        named = {"model": cells.pair.slug, "language": language}
        if not (base and safe):
            rows.append(named | {"task": ", ".join(wanted.tasks)})
            continue
        for row in comparison_rows(base, safe):
            measured = {"task": row["task"], "metric": row["metric"], "n": row["n"]}
            for name in ("base", "safe", "difference"):
                measured |= dict(zip((name, f"{name}_stderr"), row[name], strict=True))
            sources = [place.relative_to(cells.results).as_posix() for place in places]
            rows.append(named | measured | {"source": together(sources)})
    return _with_columns(rows, ["metric", "n", "base", "safe", "difference", "source"])


def _with_columns(rows: list[dict], columns: list[str]) -> pd.DataFrame:
    """A frame that has these columns even if no row has them."""
    frame = pd.DataFrame(rows)
    for column in columns:
        if column not in frame.columns:
            frame[column] = np.nan
    return frame


# For people to read


def rate(row: dict, name: str = "asr", low: str = "low", high: str = "high") -> str:
    """A rate with its interval, empty where there is none."""
    if pd.isna(row.get(name, np.nan)):
        return ""
    return f"{percent(row[name])} [{row[low]:.0%}, {row[high]:.0%}]"


def points(row: dict, name: str = "difference") -> str:
    """A paired difference in points, empty where there is none."""
    if pd.isna(row.get(name, np.nan)):
        return ""
    return f"{row[name]:+.1%} [{row[f'{name}_low']:+.1%}, {row[f'{name}_high']:+.1%}]"


def readable_main(table: pd.DataFrame) -> pd.DataFrame:
    """A row per language, tier and all; a column per way to choose heads; then the method against the base."""
    keys = ["model", "prompts", "judge", "of", "name", "tier"]
    rows = []
    for key, group in table.groupby(keys, sort=False):
        by_heads = {row["heads"]: row for row in group.to_dict("records")}
        model, prompts, judge, kind, name, tier = key
        row = {"model": model, "prompts": prompts, "judge": judge}
        row |= {"language": name if kind != "tier" else f"{name} tier", "tier": tier if kind == "language" else ""}
        row |= {heads: rate(found) for heads, found in by_heads.items()}
        row[f"{METHOD} − {BASE}"] = points(by_heads.get(METHOD, {}))
        if SHARED_ALL in by_heads:
            row[f"{SHARED_ALL} − {METHOD}"] = points(by_heads[SHARED_ALL], "from_method")
        rows.append(row)
    return without_constants(pd.DataFrame(rows).fillna(""), ["model", "prompts", "judge"])


def readable_ablation(table: pd.DataFrame) -> pd.DataFrame:
    """A row per condition: share of heads, λ, parameters changed, gain and costs."""
    rows = []
    for row in table.to_dict("records"):
        read = {"model": row["model"], "prompts": row["prompts"], "judge": row["judge"], "heads": row["heads"]}
        for title, name, form in (("share", "share", "{:.0%}"), ("λ", "scaling_factor", "{:g}")):
            applies = row["heads"] != BASE and not pd.isna(row[name])
            read[title] = form.format(row[name]) if applies else NOT_APPLICABLE
        read["parameters"] = _percent_or_blank(row.get("share_of_parameters"), 2)
        read["ASR"] = rate(row)
        for name, title in (("benign_refusals", "benign refused"), ("benign_changes", "changed")):
            read[title] = _percent_or_blank(row.get(name))
        read["KL, nats"] = "" if pd.isna(row.get("kl", np.nan)) else f"{row['kl']:.3f}"
        read["ICL accuracy"] = _percent_or_blank(row.get("icl_accuracy"))
        rows.append(read)
    return without_constants(pd.DataFrame(rows), ["model", "prompts", "judge", "λ"])


def readable_transfer(table: pd.DataFrame) -> pd.DataFrame:
    """The matrix, heads down and prompts across, in percent."""
    rows = []
    for key, group in table.groupby(["model", "prompts", "judge", "heads_of"], sort=False):
        row = dict(zip(("model", "prompts", "judge", "heads of"), key, strict=True))
        for found in group.to_dict("records"):
            row[found["prompts_of"]] = _percent_or_blank(found["asr"])
        rows.append(row)
    return without_constants(pd.DataFrame(rows).fillna(""), ["model", "prompts", "judge"])


def readable_utility(table: pd.DataFrame) -> pd.DataFrame:
    """A row per language, task and metric: base, steered, difference, each with its standard error."""
    rows = []
    for row in table.to_dict("records"):
        read = {"model": row["model"], "language": row["language"], "task": row["task"]}
        read |= {"metric": "" if pd.isna(row["metric"]) else row["metric"]}
        read["questions"] = "" if pd.isna(row["n"]) else f"{row['n']:.0f}"
        for name in ("base", "safe", "difference"):
            value, error, sign = row[name], row.get(f"{name}_stderr"), "+" if name == "difference" else ""
            text = "" if pd.isna(value) else f"{value:{sign}.3f}"
            read[name] = text if not text or error is None or pd.isna(error) else f"{text} ± {error:.3f}"
        rows.append(read)
    return without_constants(pd.DataFrame(rows), ["model", "metric"])


def readable_parameters(table: pd.DataFrame) -> pd.DataFrame:
    """Per way to choose heads: how many, and the share of the parameters, over languages."""
    rows = []
    for (model, heads, share), group in table.groupby(["model", "heads", "share"], sort=False, dropna=False):
        row = {"model": model, "heads": heads, "share": NOT_APPLICABLE if pd.isna(share) else f"{share:.0%}"}
        known = group.dropna(subset=["n_heads"])
        counts, shares = known["n_heads"], known["share_of_parameters"]
        row["languages"] = f"{len(known)} of {len(group)}"
        row["heads steered"] = _span(counts, "{:.0f}")
        row["share of parameters"] = _span(shares, "{:.2%}")
        rows.append(row)
    return without_constants(pd.DataFrame(rows), ["model"])


def without_constants(table: pd.DataFrame, columns: list[str]) -> pd.DataFrame:
    """The table without those of the columns that say the same in each row: they go into its caption."""
    given = table[[column for column in columns if column in table.columns]].replace(NOT_APPLICABLE, None)
    same = [column for column in given.columns if given[column].nunique() <= 1]
    return table.drop(columns=same)


def _span(values: pd.Series, form: str) -> str:
    if values.empty:
        return ""
    low, high = form.format(values.min()), form.format(values.max())
    return low if low == high else f"{low} to {high}"


def _percent_or_blank(value: float | None, digits: int = 1) -> str:
    if value is None or pd.isna(value):
        return ""
    return f"{value:.{digits}%}" if digits > 1 else percent(value)
