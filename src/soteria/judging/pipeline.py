"""The plan of `scripts/run.sh`, before anything is computed: are its arguments sound, and what are its files called?

Run as `python -m soteria.judging.pipeline` with the eight arguments of run.sh. Prints the folder of the steered model,
the CSV of the answers and the CSV of the verdicts, a line each, then the options of generate.py that the environment
asks for.
"""

import argparse
import os

from soteria import cli
from soteria.answering.questions import benign_set, dataset_slug, find_local, read_questions
from soteria.errors import UserError
from soteria.judging.formats import FORMATS
from soteria.judging.judges import make_judge
from soteria.judging.presets import PRESETS, JudgeSettings, make_settings
from soteria.languages import find_language
from soteria.storage import paths

DEFAULT_BENIGN = "everyday"  # harmless questions that come with the project, under data/benign


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
    language, dataset = arguments.language, arguments.dataset_file
    split, column, asked_benign, judge, chat_template = (
        os.environ.get(f"SOTERIA_{name}") or None
        for name in ("SPLIT", "QUESTION_COLUMN", "BENIGN", "JUDGE", "CHAT_TEMPLATE")
    )
    read_questions(dataset, language, split=split, column=column)
    benign = None if asked_benign == "none" else benign_set(asked_benign or DEFAULT_BENIGN, language)
    if benign and asked_benign:
        read_questions(benign, language)
    elif benign and find_local(benign) is None:  # a language without such questions
        benign = None
    try:
        with_template = cli.truth(chat_template or "no")
    except argparse.ArgumentTypeError as error:
        raise UserError(f"SOTERIA_CHAT_TEMPLATE: {error}") from None
    paths.head_folder(arguments.head_folder)
    settings = _settings()
    if not (judge or "").startswith("hf:"):  # that one would load its model
        make_judge(judge or "refusal", settings)  # better refused now than after all answers
    named = (language.name, arguments.base_model)
    print(paths.steered_folder(paths.RESULTS, *named, arguments.scaling_factor))
    print(*paths.answer_files(paths.RESULTS, *named, dataset_slug(dataset), arguments.scaling_factor), sep="\n")
    for name, value in {"--split": split, "--question_column": column, "--benign": benign}.items():
        if value:
            print(name, value, sep="\n")
    if with_template:
        print("--chat_template")


def _settings() -> JudgeSettings:
    """How the environment has the judge asked. Raises UserError for a name that is none."""
    given = {}
    for name, known in (("preset", PRESETS), ("format", FORMATS)):
        variable = f"SOTERIA_JUDGE_{name.upper()}"
        given[name] = os.environ.get(variable) or None
        if given[name] and given[name] not in known:
            raise UserError(f"{variable} is {given[name]!r}; give one of {', '.join(known)}")
    return make_settings(**given)


if __name__ == "__main__":
    cli.run(main)
