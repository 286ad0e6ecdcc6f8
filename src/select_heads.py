"""Step 2: rank heads by their mean effect and keep the top ones, for languages or for a group of languages."""

from argparse import Namespace

from soteria import cli
from soteria.errors import UserError
from soteria.languages import language_names
from soteria.scoring.heads import (
    check_list,
    count_heads,
    count_top,
    group_list,
    mean_effect,
    rank_heads,
    write_heads,
)
from soteria.scoring.notes import ambiguous_datasets, describe_first_tokens
from soteria.scoring.prompts import TASKS
from soteria.storage import paths


def parse_arguments() -> Namespace:
    parser = cli.new_parser(
        __doc__,
        "python src/select_heads.py --results results/indirect_effect/polyglot-base --language Hindi Bengali "
        "--head_folder polyglot-base",
    )
    add = parser.add_argument
    add("--results", type=cli.path, help="output folder of step 1: results/indirect_effect/<model slug>")
    add("--language", nargs="+", help="names or codes, or all for the paper's twelve")
    add("--tasks", nargs="+", default=list(TASKS), help="tasks to average over")
    add("--top", type=float, default=0.5, help="a fraction of all heads below 1, or a whole number of heads")
    add("--head_folder", type=cli.path, required=True, help="name of the folder of head lists")
    add("--heads_root", type=cli.path, default=paths.heads_root(paths.RESULTS), help="where the head folders are")
    add("--group", help="High, Mid, Low, or Universal: write <Group>_Lang.json from the languages' lists in the folder")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    folder, lists, said = arguments.heads_root / arguments.head_folder, {}, {}
    if not arguments.language and arguments.group is None:
        raise UserError("nothing to select: give --language (with --results) or --group")
    if arguments.language:
        if not arguments.results:
            raise UserError("--language needs --results, the output folder of step 1")
        names, tasks = language_names(arguments.language), list(dict.fromkeys(arguments.tasks))
        for name in names:
            effect, path = mean_effect(arguments.results, name, tasks), folder / paths.language_file(name)
            lists[path] = rank_heads(effect)[: count_top(arguments.top, count_heads(effect))]
            warned = ambiguous_datasets(arguments.results, [f"{task}_{name}" for task in tasks])
            counted = f"{path}: {len(lists[path])} of {count_heads(effect)} heads"
            said[path] = [counted, *describe_first_tokens(arguments.results, warned)]
    if arguments.group is not None:
        heads = group_list(folder, arguments.group, lists)
        path = folder / paths.group_file(arguments.group)
        lists[path] = heads
        said[path] = [f"{folder}: {len(heads)} heads shared by group {arguments.group}"]
    for path, heads in lists.items():
        check_list(path, heads)
    for path, heads in lists.items():
        write_heads(path, heads)
        print(*said[path], sep="\n")


if __name__ == "__main__":
    cli.run(main)
