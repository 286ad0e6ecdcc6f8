"""Turns tidy tables into readable ones: rates with intervals, differences in points, blanks where nothing ran."""

from collections.abc import Callable

import pandas as pd

from soteria.reporting.labels import BASE, METHOD, SHARED_ALL, percent

NOT_APPLICABLE = "–"  # unlike a blank, which was not run
IN_CAPTION = ("model", "prompts", "judge", "λ", "metric")  # columns that are left out where they hold one value


def shown(row: dict, name: str, form: Callable[[float], str] = percent) -> str:
    """A number of a row, empty where there is none."""
    value = row.get(name)
    return "" if pd.isna(value) else form(value)


def rate(row: dict) -> str:
    """The ASR with its interval, its degenerate answers, and what it leaves out; empty where nothing was run."""
    text = shown(row, "asr")
    return (text and f"{text} [{row['low']:.0%}, {row['high']:.0%}]") + degenerate(row) + left_out(row)


def degenerate(row: dict) -> str:
    """How many of the judged answers are degenerate, which the ASR counts as not harmful; empty where none is."""
    return f" ({row['degenerate']:.0f} degenerate)" if row.get("degenerate", 0) > 0 else ""


def left_out(row: dict) -> str:
    """Rows without a verdict of all rows, and the ASR if none and if all of them were harmful; mostly empty.

    Then how many of these rows a content filter blocked, and the two rates without them where others are left.
    """
    if pd.isna(row.get("least")):
        return ""
    dash = NOT_APPLICABLE if pd.isna(row["asr"]) else ""
    text = f"{row['unjudged']:.0f}/{row['rows']:.0f}: {row['least']:.0%} – {row['most']:.0%}"
    if not pd.isna(row.get("least_unfiltered")):
        text += f"; {row['filtered']:.0f} filtered"
        if row["filtered"] < row["unjudged"]:
            text += f", without them {row['least_unfiltered']:.0%} – {row['most_unfiltered']:.0%}"
    return f"{dash} ({text})"


def interval_of(row: dict, name: str, form: str = "{:.1%}") -> str:
    """A number with its interval; empty where there is none."""
    text, ends = shown(row, name, form.format), form.replace(".1%", ".0%")
    return text and f"{text} [{ends.format(row[f'{name}_low'])}, {ends.format(row[f'{name}_high'])}]"


def points(row: dict, name: str = "difference") -> str:
    """A paired difference in points, empty where there is none; where rows lack a verdict, with its two rates."""
    text = shown(row, name, "{:+.1%}".format)
    text = text and f"{text} [{row[f'{name}_low']:+.1%}, {row[f'{name}_high']:+.1%}]"
    if pd.isna(row.get(f"{name}_rows")):
        return text
    return f"{text} ({row[f'{name}_before']:.1%} → {row[f'{name}_after']:.1%}, {row[f'{name}_rows']:.0f})"


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
    return without_constants(pd.DataFrame(rows).fillna(""))


def readable_ablation(table: pd.DataFrame) -> pd.DataFrame:
    """A row per condition: share of heads, λ, parameters changed, gain and costs."""
    rows = []
    for row in table.to_dict("records"):
        named = [name for name in ("model", "prompts", "judge", "language", "heads") if name in row]
        read = {name: row[name] for name in named}
        for title, name, form in (("share", "share", "{:.0%}"), ("λ", "scaling_factor", "{:g}")):
            applies = row["heads"] != BASE and not pd.isna(row[name])
            read[title] = form.format(row[name]) if applies else NOT_APPLICABLE
        read["parameters"] = shown(row, "share_of_parameters", "{:.2%}".format)
        read["ASR"] = rate(row | {"degenerate": 0})  # which has its own column
        read |= {"degenerate": shown(row, "degenerate", "{:.0f}".format)}
        read |= {"benign refused": shown(row, "benign_refusals")}
        read |= {"benign degenerate": shown(row, "benign_degenerate", "{:.0f}".format)}
        read |= {"benign changed": shown(row, "benign_changes")}
        if "borderline_refusals" in row:
            read |= {"borderline refused": shown(row, "borderline_refusals")}
            read |= {"borderline degenerate": shown(row, "borderline_degenerate", "{:.0f}".format)}
            read |= {"selectivity": interval_of(row, "selectivity")}
        read |= {"KL, nats": shown(row, "kl", "{:.3f}".format), "ICL accuracy": shown(row, "icl_accuracy")}
        rows.append(read)
    return without_constants(pd.DataFrame(rows).fillna(""))


def readable_transfer(table: pd.DataFrame) -> pd.DataFrame:
    """The matrix, heads down and prompts across, in percent."""
    rows = []
    for key, group in table.groupby(["model", "prompts", "judge", "heads_of"], sort=False):
        row = dict(zip(("model", "prompts", "judge", "heads of"), key, strict=True))
        for found in group.to_dict("records"):
            row[found["prompts_of"]] = shown(found, "asr") + degenerate(found) + left_out(found)
        rows.append(row)
    return without_constants(pd.DataFrame(rows).fillna(""))


def readable_utility(table: pd.DataFrame) -> pd.DataFrame:
    """A row per language, task and metric: base, steered, difference, each with its standard error."""
    rows = []
    for row in table.to_dict("records"):
        read = {"model": row["model"], "language": row["language"], "task": row["task"]}
        read |= {"metric": shown(row, "metric", str), "questions": shown(row, "n", "{:.0f}".format)}
        for name in ("base", "safe", "difference"):
            value = shown(row, name, ("{:+.3f}" if name == "difference" else "{:.3f}").format)
            read[name] = value + (value and shown(row, f"{name}_stderr", " ± {:.3f}".format))
        rows.append(read)
    return without_constants(pd.DataFrame(rows).fillna(""))


def readable_agreement(table: pd.DataFrame) -> pd.DataFrame:
    """A row per pair of judges, language and model: agreement and kappa with their intervals."""
    rows = []
    for row in table.to_dict("records"):
        read = {name: row[name] for name in ("model", "prompts", "judges")}
        read |= {"language": row["name"], "heads": row["heads"], "rows": shown(row, "rows", "{:.0f}".format)}
        read["agreement"] = interval_of(row, "agreement")
        read["kappa"] = interval_of(row, "kappa", "{:.2f}") or (read["rows"] and NOT_APPLICABLE)
        rows.append(read)
    return without_constants(pd.DataFrame(rows).fillna(""))


def readable_parameters(table: pd.DataFrame) -> pd.DataFrame:
    """Per way to choose heads: how many, and the share of the parameters, over languages."""
    rows = []
    for (model, heads, share), group in table.groupby(["model", "heads", "share"], sort=False, dropna=False):
        row = {"model": model, "heads": heads, "share": NOT_APPLICABLE if pd.isna(share) else f"{share:.0%}"}
        known = group.dropna(subset=["n_heads"])
        row["languages"] = f"{len(known)} of {len(group)}"
        row["heads steered"] = _span(known["n_heads"], "{:.0f}")
        row["share of parameters"] = _span(known["share_of_parameters"], "{:.2%}")
        rows.append(row)
    return without_constants(pd.DataFrame(rows).fillna(""))


def without_constants(table: pd.DataFrame) -> pd.DataFrame:
    """The table without the columns of `IN_CAPTION` that say the same in each row."""
    given = table[[column for column in IN_CAPTION if column in table.columns]].replace(NOT_APPLICABLE, None)
    return table.drop(columns=[column for column in given.columns if given[column].nunique() <= 1])


def _span(values: pd.Series, form: str) -> str:
    if values.empty:
        return ""
    low, high = form.format(values.min()), form.format(values.max())
    return low if low == high else f"{low} to {high}"
