"""What `scripts/run.sh` asks first: are its eight arguments sound, and what will its three results be called?

Prints the folder of the safe model, the CSV of the answers and the CSV of the verdicts, a line each, and then the
options of generate.py that the environment asks for, a word a line.
"""

import argparse
import os

from soteria import cli
from soteria.answering.questions import benign_set, dataset_slug, find_local, read_questions
from soteria.errors import UserError
from soteria.judging.judges import make_judge
from soteria.languages import find_language
from soteria.storage import paths

BENIGN = "everyday"  # harmless questions that come with the project, under data/benign


def main() -> None:
    parser = cli.new_parser(__doc__, "bash scripts/run.sh (with its eight arguments)")
    parser.add_argument("finetune_model")
    parser.add_argument("base_model")
    parser.add_argument("language", type=find_language)
    parser.add_argument("dataset_file")
    parser.add_argument("scaling_factor", type=cli.scaling_factor)
    parser.add_argument("do_base", choices=["yes", "no"])
    parser.add_argument("batch_size", type=cli.positive_int)
    parser.add_argument("head_folder")
    arguments = parser.parse_args()
    language = arguments.language
    split, column = (os.environ.get(name) or None for name in ("SOTERIA_SPLIT", "SOTERIA_QUESTION_COLUMN"))
    read_questions(arguments.dataset_file, language, split=split, column=column)
    asked_for = os.environ.get("SOTERIA_BENIGN")
    benign = benign_set(asked_for or BENIGN, language)
    if asked_for and asked_for != "none":
        read_questions(benign, language)
    elif asked_for or find_local(benign) is None:  # not wanted, or a language without such questions
        benign = None
    chat_template = read_truth("SOTERIA_CHAT_TEMPLATE")
    paths.head_folder(arguments.head_folder)
    judge = os.environ.get("SOTERIA_JUDGE") or "refusal"
    if not judge.startswith("hf:"):  # that one would load its model
        make_judge(judge)  # better refused now than after all answers
    named = (arguments.language.name, arguments.base_model)
    print(paths.steered_folder(paths.RESULTS, *named, arguments.scaling_factor))
    for file in paths.answer_files(
        paths.RESULTS, *named, dataset_slug(arguments.dataset_file), arguments.scaling_factor
    ):
        print(file)
    for name, value in {"--split": split, "--question_column": column, "--benign": benign}.items():
        if value:
            print(name, value, sep="\n")
    if chat_template:
        print("--chat_template")


def read_truth(variable: str) -> bool:
    """A truth value from the environment, false where it is not set."""
    try:
        return cli.truth(os.environ.get(variable) or "no")
    except argparse.ArgumentTypeError as error:
        raise UserError(f"{variable}: {error}") from None


if __name__ == "__main__":
    cli.run(main)
