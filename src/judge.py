"""Step 3.3: judge every answer column of a CSV, count attack success, print the table.

Each verdict is on disk before the next is counted: an interrupted call, repeated, asks for none of them twice. Beside
the attack success rate (ASR) stands what safety costs, where generate.py answered harmless questions too. With
--compare, says how far these verdicts agree with those of another judge, or of people, on the same rows.
"""

from pathlib import Path

from soteria import cli
from soteria.errors import UserError
from soteria.judging.judges import make_judge, read_judge_prompt
from soteria.judging.verdicts import Answers, describe, inputs_of, judge_answers, read_verdicts
from soteria.storage import files, paths
from soteria.storage.paths import ANSWER_COLUMNS


def parse_arguments():
    parser = cli.new_parser(
        __doc__, "python src/judge.py --input answers.csv --output Evaluated_answers.csv --judge refusal"
    )
    add = parser.add_argument
    add("--input", type=Path, required=True, help="a CSV with Question and SAFE ANSWER, BASE ANSWER or both")
    add("--output", type=cli.csv_path, required=True, help="the CSV to write, with a .json of the counts beside it")
    add("--judge", required=True, help="refusal (offline, a proxy), openai:<model> or hf:<model>")
    add("--concurrency", type=cli.positive_int, default=16, help="calls to an endpoint at once")
    add("--time_limit", type=cli.positive_int, default=60, help="seconds that an endpoint may take for a reply")
    add("--judge_prompt", type=Path, help="a text file with {question} and {answer} to use instead of the own one")
    add("--retry_empty", action="store_true", help="ask again for the rows that a finished run left without a verdict")
    add("--benign", type=Path, help="answers to harmless questions (default: benign/<input's name> beside the input)")
    add("--compare", type=Path, help="a CSV of the same questions with Verdict_Safe, Verdict_Base or both")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    answers = Answers(arguments.input)
    if arguments.output.exists() and arguments.output.samefile(arguments.input):
        raise UserError(f"{arguments.output} holds the answers themselves; give another --output")
    files.check_facts_file(arguments.output.with_suffix(".json"), "inputs_sha256")
    judge_prompt = read_judge_prompt(arguments.judge_prompt) if arguments.judge_prompt else None
    benign = arguments.benign or paths.benign_file(arguments.input)
    if arguments.benign and not benign.exists():
        raise UserError(f"no file {benign}; give the answers to harmless questions, or leave out --benign")
    others = read_verdicts(arguments.compare, answers) if arguments.compare else {}
    inputs = inputs_of(answers, arguments.judge, judge_prompt)
    judged = judge_answers(
        answers,
        arguments.output,
        inputs,
        lambda: make_judge(
            arguments.judge,
            concurrency=arguments.concurrency,
            judge_prompt=judge_prompt,
            time_limit=arguments.time_limit,
        ),
        retry_empty=arguments.retry_empty,
    )

    from soteria.judging.damage import measure_damage
    from soteria.judging.statistics import by_category, compare_paired, summarise

    by_model = {ANSWER_COLUMNS[column][1]: given for column, given in judged.verdicts.items()}
    summary = describe(arguments.input) | inputs | {"judge_description": judged.description}
    summary |= {model: summarise(given) for model, given in by_model.items()}
    if {"base", "safe"} <= by_model.keys():
        summary["paired"] = compare_paired(by_model["base"], by_model["safe"])
    if answers.categories:
        summary["categories"] = by_category(answers.categories, by_model)
    if benign.exists():
        summary["benign"] = measure_damage(benign)
    judged.write(summary)
    print_table(summary)
    print_agreement(judged.verdicts, others)


def print_table(summary: dict) -> None:
    """A row for each model, gain and damage side by side; then safe against base, in all and per category."""
    models = [model for model in ("base", "safe") if model in summary]
    benign = summary.get("benign", {})
    print(f"\n{summary['dataset'] or 'answers'}, {summary['rows']} rows, judge: {summary['judge_description']}")
    if benign:
        print(f"harmless questions: {benign['dataset']}, {benign['rows']} rows, refusals by {benign['judge']}")
    print(
        f"{'model':6} {'ASR':>7} {'95 % interval':>17} {'ASR judged (95 %)':>24} {'blank':>6} {'benign refused':>15} "
        f"{'changed':>8} {'KL from base':>13}"
    )
    for model in models:
        s = summary[model]
        judged = "–"
        if s["asr_judged"] is not None:
            judged = f"{s['asr_judged']:.1%} ({s['ci95_judged'][0]:.1%} – {s['ci95_judged'][1]:.1%})"
        refused = f"{benign[model]['refusal_rate']:.1%}" if model in benign else "–"
        divergence = benign.get("kl_first_token") if model == "safe" else None
        nats = f"{divergence['mean']:.3g} nats" if divergence else "–"
        changed = f"{benign['changed']['rate']:.1%}" if model == "safe" and "changed" in benign else "–"
        low, high = (f"{end:.1%}" for end in s["ci95"])
        print(
            f"{model:6} {s['asr']:>7.1%} {low + ' – ' + high:>17} {judged:>24} {s['blank']:>6} {refused:>15} "
            f"{changed:>8} {nats:>13}"
        )
    if summary.get("paired"):
        p = summary["paired"]
        print(f"safe - base on the same {p['rows']} questions: {paired(p)}")
    for category, found in summary.get("categories", {}).items():
        rates = " → ".join(f"{found[model]['asr']:.1%}" for model in models)
        change = f"  safe - base {paired(found['paired'])}" if found.get("paired") else ""
        print(f"  {category} ({found['rows']} rows): {rates}{change}")


def paired(p: dict) -> str:
    low, high = (f"{end:+.1%}" for end in p["ci95"])
    return f"{p['difference']:+.1%} ({low} – {high}, paired bootstrap), McNemar's exact p = {p['mcnemar_p']:.2g}"


def print_agreement(verdicts: dict[str, list[str]], others: dict[str, list[str]]) -> None:
    from soteria.judging.statistics import agreement

    for column, other in others.items():
        name, found = ANSWER_COLUMNS[column][0], agreement(verdicts[column], other)
        if not found["rows"]:
            print(f"{name}: no row has a verdict in both files")
            continue
        low, high = found["ci95"]
        kappa = "not defined (one label throughout)" if found["kappa"] is None else f"{found['kappa']:.2f}"
        print(
            f"{name}: {found['agreement']:.1%} of {found['rows']} rows agree (95 % interval {low:.1%} – {high:.1%}), "
            f"Cohen's kappa {kappa}; harmful only here {found['harmful_only_here']}, only there "
            f"{found['harmful_only_there']}, without a verdict in one {found['unjudged']}"
        )


if __name__ == "__main__":
    cli.run(main)
