"""Step 3.3: judge every answer column of a CSV, count attack success, print the table.

Each verdict is on disk before the next is counted: an interrupted call, repeated, asks for none of them twice. With
--compare, says how far these verdicts agree with those of another judge, or of people, on the same rows.
"""

import hashlib
from pathlib import Path

from soteria import cli, files
from soteria.errors import UserError
from soteria.evaluation import ANSWER_COLUMNS, agreement, compare_paired, summarise
from soteria.judges import EMPTY, HARMFUL, NOT_HARMFUL, make_judge, read_judge_prompt
from soteria.questions import read_table, write_table


def parse_arguments():
    parser = cli.new_parser(
        __doc__, "python src/evaluate.py --input answers.csv --output Evaluated_answers.csv --judge refusal"
    )
    add = parser.add_argument
    add("--input", type=Path, required=True, help="a CSV with Question and SAFE ANSWER, BASE ANSWER or both")
    add("--output", type=cli.csv_path, required=True, help="the CSV to write, with a .json of the counts beside it")
    add("--judge", required=True, help="refusal (offline, a proxy), openai:<model> or hf:<model>")
    add("--concurrency", type=cli.positive_int, default=16, help="questions asked of an endpoint at once")
    add("--judge_prompt", type=Path, help="a text file with {question} and {answer} to use instead of the own one")
    add("--compare", type=Path, help="a CSV of the same questions with Verdict_Safe, Verdict_Base or both")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    table = read_table(arguments.input)
    columns = [column for column in ANSWER_COLUMNS if column in table.columns]
    if "Question" not in table.columns or not columns:
        raise UserError(f"{arguments.input} needs the column Question and one of {', '.join(ANSWER_COLUMNS)}")
    if table.empty:
        raise UserError(f"{arguments.input} has no rows to judge")
    judge_prompt = read_judge_prompt(arguments.judge_prompt)
    others = read_verdicts(arguments.compare, list(table["Question"]), columns) if arguments.compare else {}
    inputs = {
        "judge": arguments.judge,
        "rows": len(table),
        "inputs_sha256": sha256(table[["Question", *columns]], judge_prompt),
    }
    finished = files.read_json(arguments.output.with_suffix(".json"))
    if arguments.output.exists() and isinstance(finished, dict) and inputs.items() <= finished.items():
        print_table(finished)
        print_agreement(read_table(arguments.output), others)
        return
    judge = make_judge(arguments.judge, concurrency=arguments.concurrency, judge_prompt=judge_prompt)

    from tqdm import tqdm

    summary = describe(arguments.input) | inputs | {"judge_description": judge.description}
    journals = []
    for column in columns:
        verdict_column, short = ANSWER_COLUMNS[column]
        journal = files.Journal(
            arguments.output.with_name(f".{arguments.output.name}.{short}.journal"),
            {
                "judge": arguments.judge,
                "judge_prompt": judge_prompt,
                "rows": table[["Question", column]].to_numpy().tolist(),
            },
        )
        journals.append(journal)
        rows = {
            row: texts
            for row, texts in enumerate(zip(table["Question"], table[column], strict=True))
            if row not in journal.done
        }
        with tqdm(total=len(table), initial=len(journal.done), desc=column, unit="verdict", disable=None) as progress:

            def report(row: int, verdict: str, journal=journal, progress=progress) -> None:
                journal.add({row: verdict})
                progress.update()

            judge.judge(rows, report)
        table[verdict_column] = [journal.done.get(row, EMPTY) for row in range(len(table))]
        summary[short] = summarise(list(table[verdict_column]))
    if {"base", "safe"} <= summary.keys():
        summary["paired"] = compare_paired(list(table["Verdict_Base"]), list(table["Verdict_Safe"]))
    write_table(table, arguments.output)
    files.write_json(arguments.output.with_suffix(".json"), summary)
    for journal in journals:
        journal.remove()
    print_table(summary)
    print_agreement(table, others)


def read_verdicts(path: Path, questions: list[str], columns: list[str]) -> dict[str, list[str]]:
    """Another judge's verdict columns, by their names, for the same questions in the same order.

    Raises UserError for other questions, no verdicts, or a word that is no verdict, by its row.
    """
    other = read_table(path)
    if list(other.get("Question", [])) != questions:
        raise UserError(f"{path} is not of the same questions in the same order; it cannot be compared")
    wanted = [ANSWER_COLUMNS[column][0] for column in columns if ANSWER_COLUMNS[column][0] in other.columns]
    if not wanted:
        raise UserError(f"{path} has no column {' or '.join(ANSWER_COLUMNS[column][0] for column in columns)}")
    known = {verdict.casefold(): verdict for verdict in (HARMFUL, NOT_HARMFUL, EMPTY)} | {"": EMPTY}
    verdicts = {}
    for column in wanted:
        for row, word in enumerate(other[column]):
            if word.strip().casefold() not in known:
                raise UserError(f"{path}: {column} of row {row} is {word!r}, not {HARMFUL}, {NOT_HARMFUL} or {EMPTY}")
        verdicts[column] = [known[word.strip().casefold()] for word in other[column]]
    return verdicts


def print_agreement(table, others: dict[str, list[str]]) -> None:
    for column, other in others.items():
        found = agreement(list(table[column]), other)
        if not found["rows"]:
            print(f"{column}: no row has a verdict in both files")
            continue
        low, high = found["ci95"]
        kappa = "not defined (one label throughout)" if found["kappa"] is None else f"{found['kappa']:.2f}"
        print(
            f"{column}: {found['agreement']:.1%} of {found['rows']} rows agree (95 % interval {low:.1%} – {high:.1%}), "
            f"Cohen's kappa {kappa}; harmful only here {found['harmful_only_here']}, only there "
            f"{found['harmful_only_there']}, without a verdict in one {found['unjudged']}"
        )


def sha256(table, judge_prompt: str) -> str:
    return hashlib.sha256((judge_prompt + table.to_csv(index=False)).encode("utf-8", "surrogatepass")).hexdigest()


def describe(answers: Path) -> dict:
    """What generate.py noted beside the answers: model, language, dataset, scaling factor; None where unknown."""
    facts = files.read_json(answers.with_suffix(".json")) or {}
    made = facts.get("columns", {})
    safe, base = made.get("SAFE ANSWER", {}), made.get("BASE ANSWER", {})
    return {
        "model": safe.get("steered", {}).get("base_model") or base.get("model") or safe.get("model"),
        "language": facts.get("language"),
        "dataset": facts.get("dataset"),
        "scaling_factor": safe.get("steered", {}).get("scaling_factor"),
    }


def print_table(summary: dict) -> None:
    print(f"\n{summary['dataset'] or 'answers'}, {summary['rows']} rows, judge: {summary['judge_description']}")
    print(f"{'model':6} {'ASR':>7} {'95 % interval':>17} {'ASR judged':>11} {'blank':>6}")
    for short in ("base", "safe"):
        if short in summary:
            s = summary[short]
            low, high = s["ci95"]
            judged = "–" if s["asr_judged"] is None else f"{s['asr_judged']:.1%}"
            interval = f"{low:.1%} – {high:.1%}"
            print(f"{short:6} {s['asr']:>7.1%} {interval:>17} {judged:>11} {s['blank']:>6}")
    if summary.get("paired"):
        p = summary["paired"]
        low, high = p["ci95"]
        print(
            f"safe - base on the same {p['rows']} questions: {p['difference']:+.1%} "
            f"({low:+.1%} – {high:+.1%}, paired bootstrap), McNemar's exact p = {p['mcnemar_p']:.2g}"
        )


if __name__ == "__main__":
    cli.run(main)
