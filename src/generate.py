"""Step 3.2: a model's greedy answers to a set of questions, as one column of a CSV.

The answers of the safe and of the base model go into the same file, by two calls. An interrupted call resumes at its
next batch when repeated; a column that is complete and was made with the same settings is kept. The base model's
answers are also kept in base_answers/ beside the file, where calls for other scaling factors find them. Under
`accelerate launch` or `torchrun`, the processes share the questions and write the same file as one process would.
"""

import sys
from argparse import ArgumentParser, Namespace
from functools import cache, partial

from soteria import cli
from soteria.answering.alike import describe_differences, differences, how_made
from soteria.answering.question_files import find_local
from soteria.answering.questions import (
    QUESTION_COLUMNS,
    RELEASE,
    QuestionSet,
    benign_set,
    longest_answer,
    read_questions,
)
from soteria.errors import UserError
from soteria.languages import Language, find_language
from soteria.models.processes import Processes
from soteria.storage import outputs, paths
from soteria.storage.paths import BENIGN, BORDERLINE
from soteria.terminal import one_line


def parse_arguments():
    parser = cli.new_parser(
        __doc__,
        "python src/generate.py --model data/models/polyglot-base --dataset policy_Hindi --language Hindi "
        "--output answers.csv --column 'BASE ANSWER'",
    )
    add = parser.add_argument
    parser.add_model("--model", required=True, help=cli.MODEL)
    files_help = "path of a CSV, JSON, JSONL or Parquet file, a name under data/prompts, or a hub dataset id or folder"
    add("--dataset", required=True, help=files_help)
    add("--language", required=True, help="name or code of the questions' language")
    add("--output", type=cli.csv_path, required=True, help="the CSV to write the column to")
    add("--column", choices=list(paths.ANSWER_COLUMNS), required=True, help="which model's answers these are")
    add("--batch_size", type=cli.positive_int, default=8, help="memory: that of this many of the longest questions")
    tokens_help = "maximum length of an answer in tokens (default: 512, or the preset's)"
    add("--max_new_tokens", type=cli.positive_int, help=tokens_help)
    preset_help = (
        "ask as the original release did: instruction and question joined, 512 new tokens, of the base 256, sampled as "
        "the model's generation config says, one question at a time"
    )
    add("--preset", choices=[RELEASE], help=preset_help)
    add("--chat_template", action="store_true", help="ask through the tokenizer's chat template")
    engine_help = (
        "what answers in place of this project's decoding: openai, a server that OPENAI_BASE_URL names and that serves "
        "the model under its name or that of openai:NAME; or vllm, in this process"
    )
    add("--engine", metavar="{openai,openai:NAME,vllm}", help=engine_help)
    add(
        "--concurrency",
        type=cli.positive_int_up_to(cli.MOST_CALLS),
        default=16,
        help="with --engine openai: calls at once",
    )
    add_selection(parser, "", "the questions")
    add("--strict", action="store_true", help="refuse a set with a row without a question, rather than leave it out")
    benign_help = (
        "harmless questions to answer too, to measure what safety costs: a path, or a name under data/benign without "
        "its _<Language>.csv; the answers go into benign/ beside the output (default: none)"
    )
    add("--benign", help=benign_help)
    add_selection(parser, "benign_", "the harmless questions")
    add("--borderline", help="harmless questions that look harmful, likewise; the answers go into borderline/")
    add("--device", type=cli.device, help="cpu, cuda, cuda:1 … (default: cuda if available, else cpu)")
    return parser.parse_args()


def add_selection(parser: ArgumentParser, prefix: str, what: str) -> None:
    """Add the options that choose a part of a question set."""
    add = parser.add_argument
    add(f"--{prefix}subset", help=f"subset of a hub dataset of {what} (default: the language's, else the default)")
    add(f"--{prefix}split", help=f"split of a hub dataset of {what} (default: the language's, else the first)")
    columns = ", ".join(QUESTION_COLUMNS)
    add(f"--{prefix}question_column", help=f"column of {what} (default: the language's, or else {columns})")
    where_help = f"only rows of {what} with column=value or column!=value; repeatable: any of a column's values do"
    add(f"--{prefix}where", action="append", default=[], metavar="COLUMN=VALUE", help=where_help)


def read_selected(arguments: Namespace, prefix: str, dataset: str, language: Language) -> QuestionSet:
    subset, split, column, where = (
        getattr(arguments, prefix + name) for name in ("subset", "split", "question_column", "where")
    )
    return read_questions(
        dataset, language, subset=subset, split=split, column=column, where=where, strict=arguments.strict
    )


def main() -> None:
    arguments = parse_arguments()
    language = find_language(arguments.language)
    if arguments.preset and arguments.chat_template:
        raise UserError("the release asked without a chat template; leave out --chat_template or --preset")
    kinds = {BENIGN: arguments.benign, BORDERLINE: arguments.borderline}
    asked = {kind: benign_set(name, language) for kind, name in kinds.items() if name}
    sets = [find_local(name) for name in (arguments.dataset, *asked.values())]
    for place in (arguments.output, *(paths.harmless_file(arguments.output, kind) for kind in asked)):
        outputs.check_csv(place, "columns", sets)
    if arguments.preset and arguments.engine:
        raise UserError(
            "the release's answers are sampled, and engines answer greedily; leave out --engine or --preset"
        )
    questions, harmless = read_selected(arguments, "", arguments.dataset, language), {}
    if BENIGN in asked:
        harmless[BENIGN] = read_selected(arguments, "benign_", asked[BENIGN], language)
    elif any(getattr(arguments, f"benign_{name}") for name in ("subset", "split", "question_column", "where")):
        raise UserError("--benign_subset, --benign_split, --benign_question_column and --benign_where need --benign")
    if BORDERLINE in asked:
        harmless[BORDERLINE] = read_questions(asked[BORDERLINE], language, strict=arguments.strict)

    from soteria.answering.columns import AnswerColumn, model_settings
    from soteria.answering.engines import make_engine
    from soteria.answering.generation import fill
    from soteria.models.loading import check_chat_template, load_model, running_dtype

    model, preset = arguments.model, arguments.preset
    if arguments.chat_template:
        check_chat_template(model, "--chat_template")
    longest = longest_answer(arguments.column, preset, arguments.max_new_tokens)
    engine = make_engine(arguments.engine, model, arguments.concurrency) if arguments.engine else None
    settings = model_settings(model, language, longest, arguments.chat_template, preset, engine and engine.name)
    if not engine:  # whose dtype is the engine's own
        settings["dtype"] = running_dtype(model, arguments.device)
    if unlike := differences(how_made(arguments.output) | {arguments.column: settings}):
        print(
            f"warning: the other answers in {arguments.output} were made with unlike {describe_differences(unlike)}, "
            "safe and base; judge.py compares them once both are made alike",
            file=sys.stderr,
        )
    columns = [AnswerColumn(arguments.output, arguments.column, questions, model, settings)]
    for kind, its_questions in harmless.items():
        place, with_first_tokens = paths.harmless_file(arguments.output, kind), kind == BENIGN
        columns.append(
            AnswerColumn(place, arguments.column, its_questions, model, settings, with_first_tokens=with_first_tokens)
        )
    with Processes(arguments.device) as processes:
        if engine:
            processes.need_one("--engine")
        load, complete = cache(lambda: load_model(model, processes.device)), [each.is_complete() for each in columns]
        for column, is_complete in zip(columns, complete, strict=True):
            state = "is already complete"
            if not is_complete:
                say = partial(announce, column, longest)
                fill(column, language, load, processes, arguments.batch_size, engine, say)
                state = f"has {len(column.questions.questions)} rows"
            if processes.is_first:
                column.forget_journal()  # a run that was killed at its very end left one
                print(f"{column.output}: {column.column} {state}")


def announce(column: "AnswerColumn", longest: int, n_done: int) -> None:  # noqa: F821
    """Say on stderr what will be made, before it takes its time."""
    n, done = len(column.questions.questions), f", {n_done} of them there already" * bool(n_done)
    kind = column.column.lower() + "s" * (n > 1)
    what = f"{n} {kind} to {column.questions.name}{done}, each of at most {longest} new tokens"
    print(one_line(f"{column.output}: {what}, by {column.model}"), file=sys.stderr, flush=True)


if __name__ == "__main__":
    cli.run(main)
