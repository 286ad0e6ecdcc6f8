"""Step 3.3: judge every answer column of a CSV, count how often the attacks succeed, and print the table.

Each verdict is on disk before the next is counted, so an interrupted call, repeated, asks for none of them twice. If
generate.py also answered harmless questions, the table shows what safety costs beside the attack success rate (ASR).
With --compare, it says how far these verdicts agree with those of another judge, or of people, on the same rows.
How a language model is asked is a preset's, or the --judge_… options', which come before those of the preset.
"""

import argparse
import math
from collections import Counter
from itertools import combinations
from pathlib import Path

from soteria import cli, disk
from soteria.answering.alike import check_alike
from soteria.answering.facts import check_same_models
from soteria.errors import UserError
from soteria.judging.formats import FORMATS
from soteria.judging.interface import CONTENT_FILTER, DIVIDED, EMPTY, FILTERED, MAJORITY, Judge, reason_of, unjudged
from soteria.judging.judges import check_judge, make_judge, settings_of
from soteria.judging.pipeline import without_phrases
from soteria.judging.presets import PRESETS, JudgeSettings, make_settings
from soteria.judging.verdicts import (
    AnswerFile,
    Judged,
    check_columns,
    describe,
    inputs_of,
    judge_answers,
    read_verdicts,
)
from soteria.languages import find_language
from soteria.storage import files, outputs, paths
from soteria.storage.paths import ANSWER_COLUMNS, BENIGN, BORDERLINE, HARMLESS
from soteria.terminal import one_line

ASKED = [f"judge_{name}" for name in ("preset", "format", "prompt", "system", "max_tokens", "temperature")]
FILTERS = "; a content filter blocks the most harmful answers first, so the truth is probably nearer the upper one"


def parse_arguments():
    parser = cli.new_parser(
        __doc__, "python src/judge.py --input answers.csv --output Evaluated_answers.csv --judge refusal"
    )
    add = parser.add_argument
    add("--input", type=Path, required=True, help="a CSV with Question and SAFE ANSWER, BASE ANSWER or both")
    add("--output", type=cli.csv_path, required=True, help="the CSV to write, with a .json of the counts beside it")
    judge_help = (
        "refusal (offline, a proxy), openai:<model> or hf:<model>; of several, the output holds what most of them say, "
        "and each one's own verdicts lie beside it; the options of judges are not for refusal then"
    )
    add("--judge", nargs="+", required=True, help=judge_help)
    add(
        "--concurrency",
        type=cli.positive_int_up_to(cli.MOST_CALLS),
        default=16,
        help="simultaneous calls to an endpoint",
    )
    add(
        "--time_limit",
        type=cli.positive_int_up_to(cli.MOST_SECONDS),
        default=60,
        help="seconds an endpoint may take for a reply",
    )
    add(
        "--judge_preset",
        "--preset",
        choices=list(PRESETS),
        help="how a language model is asked (default: by its chat template)",
    )
    format_help = "how its reply is read, and so what it is asked (default: by its chat template)"
    add("--judge_format", choices=list(FORMATS), help=format_help)
    prompt_help = "a text file with {answer}, and mostly {question} (default: that of the preset or format)"
    add("--judge_prompt", type=Path, help=prompt_help)
    add("--judge_system", type=Path, help="a text file with a system prompt")
    add(
        "--judge_max_tokens",
        type=cli.positive_int,
        default=argparse.SUPPRESS,
        help="length of a reply in tokens (default: no limit)",
    )
    temperature_help = "0 or more, or `own`: the endpoint's own (default: 0)"
    add("--judge_temperature", type=temperature, default=argparse.SUPPRESS, help=temperature_help)
    add("--harmful_labels", nargs="+", default=[], help="which labels of a sequence classifier mean harmful")
    add("--retry_empty", action="store_true", help="ask again for the rows that a finished run left without a verdict")
    add("--benign", type=Path, help="answers to harmless questions (default: benign/<input's name> beside the input)")
    borderline_help = "answers to harmless questions that look harmful (default: borderline/<input's name>)"
    add("--borderline", type=Path, help=borderline_help)
    add("--compare", type=Path, help="a CSV of the same questions with Verdict_Safe, Verdict_Base or both")
    return parser.parse_args()


def temperature(text: str) -> float | None:
    if text == "own":
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= cli.MOST_TEMPERATURE:
        most = cli.MOST_TEMPERATURE
        raise argparse.ArgumentTypeError(f"{text!r} is not a temperature; give a number from 0 to {most}, or own")
    return value


def judge_settings(arguments: argparse.Namespace) -> JudgeSettings:
    """Those of the preset, with what else is given in place of its own. Raises UserError for what cannot be read."""
    given = {name.removeprefix("judge_"): value for name, value in vars(arguments).items() if name in ASKED}
    return make_settings(**given)


def main() -> None:
    arguments = parse_arguments()
    names = list(dict.fromkeys(arguments.judge))
    harmless = {kind: paths.harmless_file(arguments.input, kind) for kind in HARMLESS}
    given = (arguments.benign, arguments.borderline, arguments.judge_prompt, arguments.judge_system, arguments.compare)
    places = {name: paths.own_verdicts(arguments.output, name) for name in names} if len(names) > 1 else {}
    for place in (arguments.output, *places.values()):
        outputs.check_csv(place, "inputs_sha256", (arguments.input, *harmless.values(), *given))
        disk.check_output(paths.verdict_journal(place), longest=files.LONGEST)
    answers = AnswerFile(arguments.input)
    check_alike(arguments.input)
    if len(names) > 1:
        check_columns(arguments.output, answers)
    settings, labels = judge_settings(arguments), arguments.harmful_labels
    for kind in HARMLESS:
        if given := getattr(arguments, kind):
            fix = f"no file {given}; give the answers to harmless questions, or leave out --{kind}"
            harmless[kind] = disk.regular_file(given, fix)
        check_alike(harmless[kind])
    others = read_verdicts(arguments.compare, answers) if arguments.compare else {}
    asked_in = describe(arguments.input)["language"]
    if "refusal" in names and asked_in and (lacks := without_phrases([find_language(asked_in)])):
        raise UserError(lacks)

    from soteria.judging.costs import measure_damage

    harmless = {kind: answered for kind, answered in harmless.items() if answered.exists()}
    for answered in harmless.values():
        check_same_models(arguments.input, answered)
    costs = {kind: measure_damage(answered) for kind, answered in harmless.items()}
    for name, place in places.items():  # refused before the others are asked
        if not place.exists():
            check_judge(name, settings_of(name, names, settings), [] if name == "refusal" else labels)
    every: dict[str, Judged] = {}
    for name in names:
        options = settings_of(name, names, settings), [] if name == "refusal" and len(names) > 1 else labels
        inputs = inputs_of(answers, name, *options)

        def chosen_judge(name: str = name, options: tuple = options) -> Judge:
            limits = {"concurrency": arguments.concurrency, "time_limit": arguments.time_limit}
            return make_judge(name, options[0], harmful_labels=options[1], **limits)

        output = places.get(name, arguments.output)
        judged = judge_answers(answers, output, inputs, chosen_judge, retry_empty=arguments.retry_empty)
        summary = summary_of(judged, inputs, costs)
        judged.write(summary)
        print_table(summary)
        every[name] = judged
    if len(names) > 1:
        judged = most_of(every, answers, arguments.output)
        inputs = inputs_of(answers, names[0]) | {"judge": f"{MAJORITY} of {', '.join(names)}"}
        del inputs["judge_basis_sha256"]
        summary = summary_of(judged, inputs, costs)
        pairs = list(combinations(every, 2))
        summary["agreement"] = {f"{a}, {b}": agreements(every[a].verdicts, every[b].verdicts) for a, b in pairs}
        judged.write(summary)
        print_table(summary)
        for pair, found in summary["agreement"].items():
            print_agreement(found, f"{pair}: ")
    print_agreement(agreements(judged.verdicts, others))


def summary_of(judged: Judged, inputs: dict, costs: dict) -> dict:
    """The numbers of the JSON."""
    from soteria.judging.statistics import by_category, compare_paired, summarise

    answers = judged.answers
    by_model = {ANSWER_COLUMNS[column][1]: given for column, given in judged.verdicts.items()}
    summary = describe(answers.path) | inputs | {"judge_description": judged.description}
    for column, given in judged.verdicts.items():
        summary[ANSWER_COLUMNS[column][1]] = summarise(given, judged.reasons[column]) | judged.refusals(column)
    if {"base", "safe"} <= by_model.keys():
        summary["paired"] = compare_paired(by_model["base"], by_model["safe"])
    if answers.categories:
        summary["categories"] = by_category(answers.categories, by_model)
    summary |= costs
    for model in by_model:
        summary[model] |= selectivity(summary, model)
    return summary


def most_of(every: dict[str, Judged], answers: AnswerFile, output: Path) -> Judged:
    """What most of the judges say."""
    from soteria.judging.statistics import majority

    given, reasons = {}, {}
    for column in answers.columns:
        words = majority([judged.verdicts[column] for judged in every.values()])
        given[column] = [unjudged(DIVIDED) if word == EMPTY else word for word in words]
        reasons[column] = Counter(filter(None, map(reason_of, given[column])))
    told = "; ".join(judged.description for judged in every.values())
    n_failed = sum(judged.n_failed for judged in every.values())
    return Judged(answers, output, given, reasons, f"{MAJORITY} of {told}", n_failed)


def agreements(verdicts: dict[str, list[str]], others: dict[str, list[str]]) -> dict[str, dict]:
    """How far two judges agree, per answer column that both judged."""
    from soteria.judging.statistics import agreement

    return {ANSWER_COLUMNS[column][0]: agreement(verdicts[column], other) for column, other in others.items()}


def print_table(summary: dict) -> None:
    """A row per model, with its gain and its damage; then safe against base, overall and per category."""
    import pandas as pd  # takes a second

    models = [model for model in ("base", "safe") if model in summary]
    benign, borderline, table = summary.get(BENIGN, {}), summary.get(BORDERLINE, {}), {}
    lacking = [model for model in models if summary[model]["blank"]]
    print(f"\n{summary['dataset'] or 'answers'}, {summary['rows']} rows, judge: {summary['judge_description']}")
    for kind in HARMLESS:
        if asked := summary.get(kind):
            print(f"{kind} questions: {asked['dataset']}, {asked['rows']} rows, refusals by {asked['judge']}")
    for model in models:
        found, costs = summary[model], benign if model == "safe" else {}
        nats = costs.get("kl_first_token")
        table[model] = {
            "model": model,
            "ASR, all rows" if lacking else "ASR": share(found["asr"]),
            "95 % interval": span(found["ci95"]),
            "ASR judged (95 %)": share(found["asr_judged"], found["ci95_judged"]),
            "degenerate": found["degenerate"],
            "blank": found["blank"],
            **({"bounds": bounds(found)} if lacking else {}),
            "benign refused": share(benign.get(model, {}).get("refusal_rate")),
            "benign degenerate": benign.get(model, {}).get("degenerate", "–"),
            "benign changed": share(costs.get("changed", {}).get("rate")),
            "KL from base": f"{nats['mean']:.3g} nats" if nats else "–",
            **({"borderline refused": share(borderline.get(model, {}).get("refusal_rate"))} if borderline else {}),
            **({"selectivity": share(summary[model].get("selectivity"))} if borderline else {}),
        }
    print(pd.DataFrame(table.values()).to_string(index=False))
    if any(summary[model]["degenerate"] for model in models):
        print("degenerate (an echo, a repetition, another language): judged, and not harmful in the ASR")
    for model in lacking:
        found = summary[model]
        reasons = ", ".join(f"{n} × {reason}" for reason, n in found["unjudged"].items())
        print(f"{model}: {found['blank']} of {summary['rows']} rows without a verdict ({reasons})")
        if found.get("filtered"):
            apart = span(found["bounds_without_filtered"] if found["asr_judged"] is not None else None)
            print(f"{model}: {found['filtered']} of these are {FILTERED}; without them the bounds are {apart}")
    for model in models:
        if told := summary[model].get("refusal_told"):
            print(f"{model}: the judge says that {summary[model]['refused']} of {told} answers refuse")
    if lacking:
        print(
            "bounds: the ASR if none and if all of these are harmful"
            + FILTERS * any(CONTENT_FILTER in summary[model]["unjudged"] for model in lacking)
        )
    if summary.get("paired"):
        p = summary["paired"]
        rates = f"{p['base']:.1%} → {p['safe']:.1%}, " if lacking else ""
        print(f"safe - base on the same {p['rows']} questions: {rates}{paired(p)}")
    for category, found in summary.get("categories", {}).items():
        rates = " → ".join(category_rate(found[model]) for model in models)
        change = f"  safe - base {paired(found['paired'])}" if found.get("paired") else ""
        print(f"  {one_line(category)} ({found['rows']} rows): {rates}{change}")


def selectivity(summary: dict, model: str) -> dict[str, float]:
    """How many more of the harmful questions (judged not harmful) than of the borderline ones a model refuses."""
    found, borderline = summary[model], summary.get(BORDERLINE, {}).get(model)
    judged = summary["rows"] - found["blank"]
    if not borderline or not judged:
        return {}
    return {"selectivity": found["not_harmful"] / judged - borderline["refusal_rate"]}


def category_rate(found: dict) -> str:
    """The ASR over judged rows, with what it leaves out."""
    left_out = f" (without {found['blank']} unjudged; {bounds(found)})" if found["blank"] else ""
    return share(found["asr_judged"]) + left_out


def bounds(found: dict) -> str:
    """The bounds of the ASR, which say nothing where nothing was judged."""
    return span(found["bounds"] if found["asr_judged"] is not None else None)


def share(rate: float | None, interval: list[float] | None = None) -> str:
    return "–" if rate is None else f"{rate:.1%}" + (f" ({span(interval)})" if interval else "")


def span(interval: list[float] | None, sign: str = "") -> str:
    return "–" if interval is None else " – ".join(f"{end:{sign}.1%}" for end in interval)


def paired(p: dict) -> str:
    found = f"{p['difference']:+.1%} ({span(p['ci95'], '+')}, paired bootstrap)"
    return f"{found}, McNemar's exact p = {p['mcnemar_p']:.2g}"


def print_agreement(agreed: dict[str, dict], judges: str = "") -> None:
    for name, found in agreed.items():
        if not found["rows"]:
            print(f"{judges}{name}: no row has a verdict in both files")
            continue
        kappa = "not defined (one label throughout)"
        if found["kappa"] is not None:
            kappa = "{:.2f} ({:.2f} – {:.2f})".format(found["kappa"], *found["kappa_ci95"])
        print(
            f"{judges}{name}: {found['agreement']:.1%} of {found['rows']} rows agree (95 % interval "
            f"{span(found['ci95'])}), Cohen's kappa {kappa}; harmful only here {found['harmful_only_here']}, only "
            f"there {found['harmful_only_there']}, without a verdict in one {found['unjudged']}"
        )


if __name__ == "__main__":
    cli.run(main)
