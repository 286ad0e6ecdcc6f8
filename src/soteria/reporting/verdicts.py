"""States what a grid's numbers show, in sentences that the numbers alone decide."""

from collections import Counter
from itertools import product

import pandas as pd

from soteria.judging.interface import CONTENT_FILTER
from soteria.reporting.draws import MEASURES, placed_among
from soteria.reporting.labels import BASE, BOTTOM, RANDOM, TOP
from soteria.reporting.readable import degenerate, left_out, points
from soteria.reporting.write_up import GROUPS, WriteUp
from soteria.scoring.notes import CANNOT_MEAN, MIXES, ambiguous_datasets

FILTERS = " A content filter blocks the most harmful answers first: the truth is probably nearer the upper bound."


def verdicts(found: WriteUp) -> list[str]:
    """How the method compares with its controls (by paired 95 % intervals), across languages, and over λ."""
    sentences = []
    for named, group in found.tidy("heads").groupby(GROUPS, sort=False):
        share = found.grid.method_share
        own = group["share"].isna() if share is None else group["share"] == share
        rows = {row["heads"]: row for row in group[own].to_dict("records")}
        rows[BASE] = group[group["heads"] == BASE].to_dict("records")[0]
        if TOP not in rows or pd.isna([rows[BASE]["asr"], rows[TOP]["asr"]]).any():
            continue
        before, after = (f"{row['asr']:.1%}{degenerate(row)}{left_out(row)}" for row in (rows[BASE], rows[TOP]))
        sentences.append(f"{', '.join(named)}: ASR {before} → {after} with the top heads.")
        controls = [rows[name] for name in (RANDOM, BOTTOM) if name in rows]
        sentences += [_against(row) for row in controls if not pd.isna(row.get("over_top"))]
    own = _places(found) + _transfers(found) + _choices(found)
    return sentences + own + _first_tokens(found) + _unjudged(found)


def _against(row: dict) -> str:
    """Whether the functional heads do better than a control, as far as the interval of the difference tells."""
    low, high = row["over_top_low"], row["over_top_high"]
    verdict = "better than" if low > 0 else "worse than" if high < 0 else "no better than"
    asr = f"{row['asr']:.1%}{degenerate(row)}{left_out(row)}"
    so = f"The functional heads do {verdict} as many {row['heads']} here"
    return f"{so}: ASR {asr} with those, a difference of {points(row, 'over_top')}."


def _places(found: WriteUp) -> list[str]:
    """The method's place among random draws over all languages, a sentence for each kind of draw."""
    sentences, table = [], found.tidy("draws")
    for (*named, drawn), group in table.groupby([*GROUPS, "drawn"], sort=False) if len(table) else ():
        widest = group[group["name"] == group["name"].iloc[-1]]
        rows = widest.to_dict("records")
        if not widest["p"].isna().any():
            places = ", ".join(f"{placed_among(row)} in {MEASURES[row['measure']][1]}" for row in rows)
            sentences.append(
                f"{', '.join(named)}: among {rows[0]['draws']} random draws of {drawn}, on {rows[0]['questions']} "
                f"questions a language, the method has place {places}."
            )
    return sentences


def _choices(found: WriteUp) -> list[str]:
    """Which λ the grid's `limits` choose, where it has any."""
    limits, sentences = found.grid.limits, []
    for named, group in found.tidy("scaling").groupby(GROUPS, sort=False) if limits else ():
        base, *points = group.to_dict("records")
        chosen = "no λ is chosen, for some numbers were not measured"
        if not group[["asr", "kl", "benign_refusals", "benign_changes", "icl_accuracy"]].isna().any(axis=None):
            best = limits.choose(points, base)
            chosen = f"λ = {best['scaling_factor']:g} is chosen" if best else "no λ keeps the limits"
        sentences.append(
            f"{', '.join(named)}: {chosen} (lowest ASR with at most {limits.max_refusals:.0%} more benign questions "
            f"refused, {limits.max_accuracy_loss:.0%} of in-context accuracy lost, {limits.max_changes:.0%} of benign "
            "answers changed)."
        )
    return sentences


def _first_tokens(found: WriteUp) -> list[str]:
    """How far the heads rest on first tokens that do not tell a task's answers apart."""
    grid, sentences = found.grid, []
    datasets = [] if grid.head_folder else [f"{task}_{language}" for task in grid.tasks for language in grid.languages]
    for pair in grid.models:
        warned = ambiguous_datasets(grid.scores(found.results, pair), datasets)
        without = [dataset for dataset, meaning in warned.items() if meaning == CANNOT_MEAN]
        if warned:
            sentences.append(
                f"{pair.slug}: in {len(warned)} of {len(datasets)} datasets some answers begin with the same token, "
                f"and the effect {MIXES}" + (f"; it {CANNOT_MEAN} in {', '.join(without)}." if without else ".")
            )
    return sentences


def _transfers(found: WriteUp) -> list[str]:
    """ASR with a language's own heads and with other languages' heads, in a sentence."""
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


def _unjudged(found: WriteUp) -> list[str]:
    """How many answers each judge left without a verdict, and why."""
    sentences = []
    for cells, judge in product(found.cells, found.grid.judges):
        reasons, n_rows = Counter(), 0
        for each in cells.every:
            for name in each.cell.sets:
                reasons.update(each.unjudged(name, judge))
                n_rows += len(each.verdicts(name, judge) or ())
        if reasons:
            named = ", ".join(f"{n} × {reason}" for reason, n in sorted(reasons.items()))
            sentences.append(
                f"{cells.pair.slug}, {judge}: {reasons.total()} of {n_rows} answers have no verdict ({named}); ASR is "
                "over the judged rows, with bounds." + FILTERS * (CONTENT_FILTER in reasons)
            )
    return sentences
