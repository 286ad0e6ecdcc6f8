"""Every table of a grid: score, select, steer, answer, judge and tabulate every cell of a grid file.

Each model is loaded once and steered in place. What is done already is skipped, so an interrupted run resumes where it
was. A cell that fails is skipped and listed at the end. --shard spreads the work over machines that share a results
folder; --plan prints what would run and what it would take, and starts nothing.
"""

import sys
from argparse import ArgumentTypeError
from pathlib import Path

from soteria import cli, disk
from soteria.grid.cells import Shard
from soteria.grid.grid_file import read_grid
from soteria.languages import language_names
from soteria.storage import paths

STEPS = ("score", "answer", "utility", "judge", "tables")
MODELS = "models"  # what an engine serves for each cell; only where it is asked for


def shard(text: str) -> Shard:
    try:
        return Shard.parse(text)
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from None


def parse_arguments():
    parser = cli.new_parser(__doc__, "bash scripts/reproduce.sh configs/embedded.yaml")
    add = parser.add_argument
    add("grid", type=Path, help="a grid file: one of configs/*.yaml, or your own")
    add("--plan", action="store_true", help="print what would run, what is done, and an estimate of time and disk")
    add("--shard", type=shard, default="1/1", help="i/n: the i-th of n parts of the (model, language) pairs")
    steps_help = "only these; a shard leaves out the tables; models writes what an engine serves for each cell"
    add("--steps", nargs="+", choices=[*STEPS, MODELS], default=list(STEPS), help=steps_help)
    add("--language", nargs="+", help="names or codes, or all, instead of the grid file's languages")
    add("--name", help="name of the tables instead of the grid file's")
    add("--results", type=Path, default=paths.RESULTS, help="folder for everything that is written")
    add("--retry_empty", action="store_true", help="judge again the rows that a finished run left without a verdict")
    add("--device", type=cli.device, help="cpu, cuda, cuda:1 … (default: cuda if available, else cpu)")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    changes = {"languages": arguments.language and language_names(arguments.language), "name": arguments.name}
    grid = read_grid(arguments.grid, **{key: value for key, value in changes.items() if value})
    if arguments.plan:
        from soteria.grid.plan import bill

        print(bill(grid, arguments.results))
        return
    steps = [step for step in (*STEPS, MODELS) if step in arguments.steps]
    disk.check_output(paths.report_file(arguments.results))
    for pair in grid.models if len(grid.models) > 1 else ():  # the longest name that a run ends with
        disk.check_output(paths.table_file(arguments.results, grid.name, f"head_shares_{pair.slug}", "png"))

    from soteria.models.processes import Processes

    failed, waiting = {}, {}
    with Processes(arguments.device) as processes:
        if steps != ["tables"]:
            from soteria.grid.reproduction import Reproduction

            reproduction = Reproduction(grid, arguments.results, processes, arguments.shard)
            reproduction.judges.retry_empty = arguments.retry_empty
            reproduction.check(steps)
            reproduction.run(steps)
            failed, waiting = reproduction.failed, reproduction.waiting
        if "tables" in steps and arguments.shard.of == 1 and processes.is_first:
            from soteria.reporting.output import write_grid

            given = {"--language": arguments.language, "--name": arguments.name and [arguments.name]}
            options = "".join(f" {option} {' '.join(words)}" for option, words in given.items() if words)
            write_grid(grid, arguments.grid, arguments.results, options)
        if processes.is_first:
            report(failed, waiting)
    if failed or waiting:
        sys.exit(1)


def report(failed: dict[str, str], waiting: dict[str, str]) -> None:
    """Print on stderr what was not run, why, and what to do. At most three cells are named per reason."""
    for what, cells in (("failed", failed), ("waits", waiting)):
        for reason in dict.fromkeys(cells.values()):
            names = [name for name, own in cells.items() if own == reason]
            for name in names[:3]:
                print(f"{what}: {name}: {reason}", file=sys.stderr)
            if len(names) > 3:
                print(f"{what}: {len(names) - 3} more for the same reason", file=sys.stderr)
    if failed:
        print(f"{len(failed)} failed: fix the errors above and rerun the same command to resume", file=sys.stderr)
    if waiting:
        print(f"{len(waiting)} wait for scores: rerun the same command once they are there", file=sys.stderr)


if __name__ == "__main__":
    cli.run(main)
