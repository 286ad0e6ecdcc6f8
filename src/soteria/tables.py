"""Step 4: from the files under `results/` to a table. Knows file layouts; computes nothing that they do not hold."""

from pathlib import Path

import pandas as pd

from soteria import files
from soteria.comparison import METHOD
from soteria.languages import LANGUAGES

RATES = {"asr": "ASR", "benign_refusals": "benign refusals", "icl_accuracy": "ICL accuracy"}


def load_comparisons(results: Path) -> list[dict]:
    """What `compare_controls.py` wrote, languages in their own order. Files that cannot be read are left out."""
    found = [files.read_json(path) for path in sorted((results / "controls").glob("*.json"))]
    order = [language.name for language in LANGUAGES]
    sound = [item for item in found if isinstance(item, dict) and "conditions" in item]
    return sorted(sound, key=lambda item: (item["scaling_factor"], order.index(item["language"])))


def use_evaluated(comparison: dict, results: Path) -> dict:
    """The comparison with the base's and the method's ASR as `run.sh` found them on the checkpoints it wrote.

    Only where the judge was the same: beside the controls, another judge's numbers would mislead.
    """
    dataset = f"{comparison['policy']}_{comparison['language']}"
    _, evaluated = files.answer_files(
        results, comparison["language"], comparison["base_model"], dataset, comparison["scaling_factor"]
    )
    found = files.read_json(evaluated.with_suffix(".json")) or {}
    if found.get("judge_description") != comparison["judge"]:
        return comparison
    conditions = dict(comparison["conditions"])
    for condition, column in (("base", "base"), (METHOD, "safe")):
        if column in found:
            judged = found[column]
            asr = {"value": judged["asr"], "ci95": judged["ci95"], "count": judged["harmful"], "n": found["rows"]}
            conditions[condition] = conditions[condition] | {"asr": asr}
    return comparison | {"conditions": conditions}


def tidy(comparisons: list[dict]) -> pd.DataFrame:
    """One row per language, heads and rate: base and safe value with intervals, and the safe model's counts."""
    tiers = {language.name: language.tier or "" for language in LANGUAGES}
    rows = []
    for item in comparisons:
        base = item["conditions"]["base"]
        for condition, measured in item["conditions"].items():
            if condition == "base":
                continue
            for rate in RATES:
                rows.append(
                    {
                        "language": item["language"],
                        "tier": tiers[item["language"]],
                        "heads": condition,
                        "rate": rate,
                        "base": base[rate]["value"],
                        "base_low": base[rate]["ci95"][0],
                        "base_high": base[rate]["ci95"][1],
                        "safe": measured[rate]["value"],
                        "safe_low": measured[rate]["ci95"][0],
                        "safe_high": measured[rate]["ci95"][1],
                        "count": measured[rate]["count"],
                        "n": measured[rate]["n"],
                        "scaling_factor": item["scaling_factor"],
                    }
                )
    return pd.DataFrame(rows)


def means(table: pd.DataFrame) -> pd.DataFrame:
    """Means over languages per heads and rate, with the relative change of ASR."""
    mean = table.groupby(["heads", "rate"], sort=False)[["base", "safe"]].mean().reset_index()
    mean["relative_change"] = mean["safe"] / mean["base"] - 1
    return mean


def percent(value: float) -> str:
    return f"{value:.0%}" if value in (0, 1) else f"{value:.1%}"


def main_table(table: pd.DataFrame) -> pd.DataFrame:
    """The table people read: a row per language and heads, the method first, then a row of means for each."""
    rows = []
    for (language, tier, heads), group in table.groupby(["language", "tier", "heads"], sort=False):
        row = {"language": language, "tier": tier, "heads": heads}
        for rate, title in RATES.items():
            found = group[group["rate"] == rate].iloc[0]
            cell = f"{percent(found['base'])} → {percent(found['safe'])}"
            if rate == "asr":
                base = f"{percent(found['base'])} [{found['base_low']:.0%}, {found['base_high']:.0%}]"
                cell = f"{base} → {percent(found['safe'])} [{found['safe_low']:.0%}, {found['safe_high']:.0%}]"
            row[title] = cell
        rows.append(row)
    for heads, group in means(table).groupby("heads", sort=False):
        row = {"language": f"mean of {table['language'].nunique()}", "tier": "", "heads": heads}
        for rate, title in RATES.items():
            found = group[group["rate"] == rate].iloc[0]
            row[title] = f"{percent(found['base'])} → {percent(found['safe'])}"
        rows.append(row)
    return pd.DataFrame(rows)


def to_markdown(table: pd.DataFrame) -> str:
    """A pipe table, columns padded so that the source can be read too."""
    cells = [list(table.columns), *table.astype(str).to_numpy().tolist()]
    widths = [max(len(row[i]) for row in cells) for i in range(len(table.columns))]
    lines = [
        "| " + " | ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines) + "\n"


def verdict_on_controls(table: pd.DataFrame) -> str:
    """Whether the method beats its controls, in a sentence that the numbers alone decide."""
    asr = means(table).query("rate == 'asr'").set_index("heads")["safe"]
    method, chance = asr[METHOD], asr["random heads"]
    relation = "lower than" if method < chance - 0.005 else "higher than" if method > chance + 0.005 else "the same as"
    others = ", ".join(f"{name} {percent(value)}" for name, value in asr.items() if name != METHOD)
    return f"Mean ASR with the top heads is {percent(method)}, {relation} with as many random heads ({others})."
