"""Step 4: from the files under `results/` to a table. Knows file layouts; computes nothing that they do not hold."""

from pathlib import Path

import pandas as pd

from soteria.grid.comparison import METHOD
from soteria.judging.statistics import compare_paired, summarise
from soteria.languages import LANGUAGES, find_language
from soteria.storage import files, paths
from soteria.storage.csv_files import read_table

RATES = {
    "asr": "ASR",
    "benign_refusals": "benign refusals",
    "benign_changes": "changed",
    "icl_accuracy": "ICL accuracy",
}
DIVERGENCE, DIVERGENCE_TITLE = "kl_first_token", "KL, nats"  # of the first token of benign answers, from the base


def load_comparisons(results: Path, kind: str = "controls") -> list[dict]:
    """What `compare_controls.py` wrote (`controls`, or with --choose `validation`), languages in their own order.

    Files of another kind or version are left out.
    """
    found = [files.read_json(path) for path in sorted((results / kind).glob("*.json"))]
    order = [language.name for language in LANGUAGES]
    sound = [
        item
        for item in found
        if isinstance(item, dict) and RATES.keys() <= item.get("conditions", {}).get("base", {}).keys()
    ]
    return sorted(sound, key=lambda item: (item["scaling_factor"], order.index(item["language"])))


def evaluated_file(comparison: dict, results: Path) -> Path:
    """Where `run.sh` put the verdicts on a comparison's language, questions and scaling factor."""
    dataset = f"{comparison['policy']}_{comparison['language']}"
    named = (comparison["language"], comparison["base_model"], dataset, comparison["scaling_factor"])
    return paths.answer_files(results, *named)[1]


def use_evaluated(comparison: dict, results: Path) -> dict:
    """The comparison with the base's and the method's ASR as `run.sh` found them on the checkpoints it wrote.

    Only where the judge was the same: beside the controls, another judge's numbers would mislead.
    """
    found = files.read_json(evaluated_file(comparison, results).with_suffix(".json")) or {}
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


def divergences(comparisons: list[dict]) -> pd.DataFrame:
    """Per language and heads, KL of the benign answers' first token from the base, in nats; None if not measured."""
    rows = [
        {"language": item["language"], "heads": condition, "kl": measured.get(DIVERGENCE, {}).get("value")}
        for item in comparisons
        for condition, measured in item["conditions"].items()
        if condition != "base"
    ]
    return pd.DataFrame(rows)


def trade_off(comparisons: list[dict], n_heads_total: int) -> pd.DataFrame:
    """Means over languages of ASR and of KL in nats, a row per share of all heads and scaling factor, the base's first.

    Columns: share, scaling_factor, asr, kl. The heads are the method's, or all. Rows that lack a language are left
    out: their means would be of another set of them.
    """
    rows = []
    for item in comparisons:
        shares = {"base": 0.0, METHOD: item["n_heads"] / n_heads_total, "all heads": 1.0}
        for condition in shares.keys() & item["conditions"].keys():
            measured = item["conditions"][condition]
            factor = item["scaling_factor"] if condition != "base" else 0.0
            moved = measured.get(DIVERGENCE, {}).get("value")
            rows.append((item["language"], shares[condition], factor, measured["asr"]["value"], moved))
    found = pd.DataFrame(rows, columns=["language", "share", "scaling_factor", "asr", "kl"]).dropna()
    groups = found.groupby(["share", "scaling_factor"])
    whole = groups["language"].transform("nunique") == found["language"].nunique()
    return found[whole].groupby(["share", "scaling_factor"])[["asr", "kl"]].mean().reset_index()


def paired_table(comparisons: list[dict], results: Path) -> pd.DataFrame:
    """Safe against base as `run.sh` had them judged: a row a language, a tier, all languages, and a category.

    ASR of both, the difference with its 95 % interval of a paired bootstrap, in which a question's translations are
    drawn together, and the p-value of McNemar's exact test, which takes them as independent. Languages without
    verdicts on both models are left out.
    """
    rows = []
    for item in comparisons:
        language, path = find_language(item["language"]), evaluated_file(item, results)
        summary = files.read_facts(path.with_suffix(".json"))
        if not {"base", "safe"} <= summary.keys() or not path.exists():
            continue
        verdicts = read_table(path, ["Question"])
        answers = results / "generations" / path.name.removeprefix("Evaluated_")
        noted = files.read_facts(answers.with_suffix(".json")).get("categories")
        for row, category in enumerate(noted or [None] * len(verdicts)):
            own = (verdicts["Verdict_Base"][row], verdicts["Verdict_Safe"][row])
            rows.append((language.name, language.tier, category, row, *own))
    judged = pd.DataFrame(rows, columns=["language", "tier", "category", "question", "base", "safe"])
    parallel = judged.groupby("language").size().nunique() <= 1
    found = []
    for scope in ("language", "tier", "all", "category"):
        groups = [("all", judged)] if scope == "all" else judged.groupby(scope, sort=False)
        for name, group in groups:
            base, safe = list(group["base"]), list(group["safe"])
            pair = compare_paired(base, safe, list(group["question"]) if parallel else None)
            if pair:
                low, high = pair["ci95"]
                rates = {"base": summarise(base)["asr"], "safe": summarise(safe)["asr"]}
                change = {"difference": pair["difference"], "low": low, "high": high, "p": pair["mcnemar_p"]}
                found.append({"of": scope, "name": name, "rows": pair["rows"]} | rates | change)
    return pd.DataFrame(found)


def readable_pairs(table: pd.DataFrame) -> pd.DataFrame:
    """The paired table as people read it."""
    rows = list(table.itertuples())
    return pd.DataFrame(
        {
            "group": [row.name for row in rows],
            "questions": [row.rows for row in rows],
            "ASR": [f"{percent(row.base)} → {percent(row.safe)}" for row in rows],
            "safe - base": [f"{row.difference:+.1%} [{row.low:+.1%}, {row.high:+.1%}]" for row in rows],
            "McNemar's p": [f"{row.p:.2g}" for row in rows],
        }
    )


def means(table: pd.DataFrame) -> pd.DataFrame:
    """Means over languages per heads and rate, with the relative change of ASR."""
    mean = table.groupby(["heads", "rate"], sort=False)[["base", "safe"]].mean().reset_index()
    mean["relative_change"] = mean["safe"] / mean["base"] - 1
    return mean


def nats(values: pd.Series) -> str:
    """The mean of divergences, or a dash where one was not measured."""
    return "–" if values.isna().any() else f"{values.mean():.3f}"


def percent(value: float) -> str:
    return f"{value:.0%}" if value in (0, 1) else f"{value:.1%}"


def main_table(table: pd.DataFrame, moved: pd.DataFrame | None = None) -> pd.DataFrame:
    """The table people read: a row per language and heads, the method first, then a row of means for each.

    `table` is `tidy`'s, `moved` that of `divergences`.
    """
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
        if moved is not None:
            own = moved[(moved["language"] == language) & (moved["heads"] == heads)]["kl"]
            row[DIVERGENCE_TITLE] = nats(own)
        rows.append(row)
    for heads, group in means(table).groupby("heads", sort=False):
        row = {"language": f"mean of {table['language'].nunique()}", "tier": "", "heads": heads}
        for rate, title in RATES.items():
            found = group[group["rate"] == rate].iloc[0]
            row[title] = f"{percent(found['base'])} → {percent(found['safe'])}"
        if moved is not None:
            row[DIVERGENCE_TITLE] = nats(moved[moved["heads"] == heads]["kl"])
        rows.append(row)
    return pd.DataFrame(rows)


def verdict_on_controls(table: pd.DataFrame) -> str:
    """Whether the method beats its controls, in a sentence that the numbers alone decide."""
    asr = means(table).query("rate == 'asr'").set_index("heads")["safe"]
    method, chance = asr[METHOD], asr["random heads"]
    relation = "lower than" if method < chance - 0.005 else "higher than" if method > chance + 0.005 else "the same as"
    others = ", ".join(f"{name} {percent(value)}" for name, value in asr.items() if name != METHOD)
    return f"Mean ASR with the top heads is {percent(method)}, {relation} with as many random heads ({others})."
