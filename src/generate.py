"""Step 3.2: a model's greedy answers to a set of questions, into one column of a CSV.

The base and the safe model's answers go into the same file by two calls. An interrupted call, repeated, goes on at its
next batch; a column that is complete and made with the same settings is left as it is. The base's answers are kept in
base_answers/ beside the file, where calls for other scaling factors find them. `accelerate launch` or `torchrun` start
several processes, which share the questions and write the same file as one.
"""

from functools import cache

from soteria import cli
from soteria.answering.questions import QuestionSet, benign_set, find_local, read_questions
from soteria.errors import UserError
from soteria.languages import find_language
from soteria.models.processes import Processes
from soteria.storage import files, paths


def parse_arguments():
    parser = cli.new_parser(
        __doc__,
        "python src/generate.py --model data/models/polyglot-base --dataset policy_Hindi --language Hindi "
        "--output answers.csv --column 'BASE ANSWER'",
    )
    add = parser.add_argument
    add("--model", required=True, help="hub id or local folder")
    add(
        "--dataset",
        required=True,
        help="path of a CSV, JSON, JSONL or Parquet file, a name under data/prompts, a hub dataset id, or its folder",
    )
    add("--language", required=True, help="name or code of the questions' language")
    add("--output", type=cli.csv_path, required=True, help="the CSV to write the column to")
    add("--column", choices=list(paths.ANSWER_COLUMNS), required=True, help="which answers these are")
    add(
        "--batch_size",
        type=cli.positive_int,
        default=8,
        help="memory to take: that of so many of the longest questions",
    )
    add("--max_new_tokens", type=cli.positive_int, default=512, help="length of an answer in tokens, at most")
    add("--chat_template", action="store_true", help="ask through the tokenizer's chat template")
    add("--split", help="split of a hub dataset (default: the language's own, else the first)")
    add("--question_column", help="column of the questions (default: question, Question, prompt, or the language's)")
    add(
        "--benign",
        help="harmless questions to answer too, for what safety costs: a path, or a name under data/benign without its "
        "_<Language>.csv; they go into benign/ beside the output (default: none)",
    )
    add("--device", help="cpu, cuda, cuda:1 … (default: cuda if there is one, else cpu)")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    language = find_language(arguments.language)
    local = find_local(arguments.dataset)
    if local and arguments.output.exists() and local.samefile(arguments.output):
        raise UserError(f"{arguments.output} holds the questions themselves; give another --output")
    files.check_facts_file(arguments.output.with_suffix(".json"), "columns")
    questions = read_questions(arguments.dataset, language, split=arguments.split, column=arguments.question_column)
    benign = read_questions(benign_set(arguments.benign, language), language) if arguments.benign else None

    from soteria.answering.columns import AnswerColumn, model_settings
    from soteria.answering.generation import fill
    from soteria.models.loading import load_model

    settings = model_settings(arguments.model, language, arguments.max_new_tokens, arguments.chat_template)

    def column(asked: QuestionSet, output, **options) -> AnswerColumn:
        return AnswerColumn(output, arguments.column, asked, arguments.model, settings, **options)

    columns = [column(questions, arguments.output)]
    if benign:
        columns.append(column(benign, paths.benign_file(arguments.output), with_first_tokens=True))
    with Processes(arguments.device) as processes:
        load = cache(lambda: load_model(arguments.model, processes.device))
        for each in columns:
            complete = each.is_complete()
            if not complete:
                fill(each, language, load, processes, arguments.batch_size)
            if processes.is_first:
                each.forget_journal()  # of a run that was killed at its very end, there may be one
                state = "is complete already" if complete else f"has {len(each.questions.questions)} rows"
                print(f"{each.output}: {each.column} {state}")


if __name__ == "__main__":
    cli.run(main)
