"""What `scripts/run.sh` asks first: are its eight arguments sound, and what will its three results be called?

Prints the folder of the safe model, the CSV of the answers and the CSV of the verdicts, a line each.
"""

import os

from soteria import cli, files
from soteria.judges import make_judge
from soteria.languages import find_language
from soteria.questions import dataset_slug, read_questions


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
    read_questions(arguments.dataset_file)
    files.head_folder(arguments.head_folder)
    judge = os.environ.get("SOTERIA_JUDGE") or "refusal"
    if not judge.startswith("hf:"):  # that one would load its model
        make_judge(judge)  # better refused now than after all answers
    named = (arguments.language.name, arguments.base_model)
    print(files.steered_folder(files.RESULTS, *named, arguments.scaling_factor))
    for file in files.answer_files(
        files.RESULTS, *named, dataset_slug(arguments.dataset_file), arguments.scaling_factor
    ):
        print(file)


if __name__ == "__main__":
    cli.run(main)
