"""Step 3.2: a model's greedy answers to a set of questions, into one column of a CSV.

The base and the safe model's answers go into the same file by two calls. An interrupted call, repeated, goes on at its
next batch; a column that is complete and made with the same settings is left as it is.
"""

from pathlib import Path

import pandas as pd

from soteria import cli, files
from soteria.errors import UserError
from soteria.evaluation import ANSWER_COLUMNS
from soteria.languages import find_language
from soteria.questions import dataset_slug, read_questions, read_table, write_table


def parse_arguments():
    parser = cli.new_parser(
        __doc__,
        "python src/generate.py --model data/models/polyglot-base --dataset policy_Hindi --language Hindi "
        "--output answers.csv --column 'BASE ANSWER'",
    )
    add = parser.add_argument
    add("--model", required=True, help="hub id or local folder")
    add("--dataset", required=True, help="a CSV's path, a name under data/prompts, or a hub dataset id")
    add("--language", required=True, help="name or code of the questions' language")
    add("--output", type=cli.csv_path, required=True, help="the CSV to write the column to")
    add("--column", choices=list(ANSWER_COLUMNS), required=True, help="which answers these are")
    add("--batch_size", type=cli.positive_int, default=8, help="questions answered at once")
    add("--max_new_tokens", type=cli.positive_int, default=512, help="length of an answer in tokens, at most")
    add("--chat_template", action="store_true", help="ask through the tokenizer's chat template")
    add("--device", help="cpu, cuda, cuda:1 … (default: cuda if there is one, else cpu)")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    language = find_language(arguments.language)
    questions = read_questions(arguments.dataset)
    table = pd.DataFrame({"Question": questions["question"].astype(str)})
    facts_file = arguments.output.with_suffix(".json")
    facts = files.read_json(facts_file) or {}
    settings = {
        "model": arguments.model,
        "language": language.name,  # the instruction is in it
        "max_new_tokens": arguments.max_new_tokens,
        "chat_template": arguments.chat_template,
        # A steered folder made anew under the same name answers anew.
        "steered": (files.read_json(Path(arguments.model) / "soteria.json") or {}) | {"heads": None},
    }
    if arguments.output.exists():
        found = read_table(arguments.output)
        if list(found.get("Question", [])) != list(table["Question"]):
            raise UserError(f"{arguments.output} holds answers to other questions; give another --output or remove it")
        if arguments.column in found.columns and facts.get("columns", {}).get(arguments.column) == settings:
            print(f"{arguments.output}: {arguments.column} is complete already")
            return
        table = found

    from tqdm import tqdm

    from soteria.generation import answer_questions
    from soteria.models import load_model

    loaded = load_model(arguments.model, arguments.device)
    which = ANSWER_COLUMNS[arguments.column][1]
    journal = files.Journal(
        arguments.output.with_name(f".{arguments.output.name}.{which}.journal"),
        settings | {"questions": list(table["Question"])},
    )
    with tqdm(total=len(table), initial=len(journal.done), desc=which, unit="answer", disable=None) as progress:

        def report(batch: dict[int, str]) -> None:
            journal.add(batch)
            progress.update(len(batch))

        table[arguments.column] = answer_questions(
            loaded,
            list(table["Question"]),
            language,
            batch_size=arguments.batch_size,
            max_new_tokens=arguments.max_new_tokens,
            chat_template=arguments.chat_template,
            done=journal.done,
            report=report,
        )
    table = table[["Question", *(column for column in ANSWER_COLUMNS if column in table.columns)]]
    write_table(table, arguments.output)
    files.write_json(
        facts_file,
        {
            "language": language.name,
            "dataset": dataset_slug(arguments.dataset),
            "rows": len(table),
            "columns": facts.get("columns", {}) | {arguments.column: settings},
        },
    )
    journal.remove()
    print(f"{arguments.output}: {len(table)} rows of {arguments.column}")


if __name__ == "__main__":
    cli.run(main)
