"""Every table of a grid: score, select, steer, answer, judge, tabulate, for every cell of a grid file.

Each model is loaded once and steered in place. What is done already is skipped, so an interrupted run goes on where it
was; a cell that fails is passed by and listed at the end. --shard spreads the work over machines that share a results
folder, --plan says what would run and what it would take, and starts nothing.
"""

import sys
import time
from argparse import ArgumentTypeError
from pathlib import Path

from soteria import cli
from soteria.grid.cells import Shard
from soteria.grid.grid_file import Grid, read_grid
from soteria.storage import paths

STEPS = ("score", "answer", "utility", "judge", "tables")


def shard(text: str) -> Shard:
    try:
        return Shard.parse(text)
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from None


def parse_arguments():
    parser = cli.new_parser(__doc__, "bash scripts/reproduce.sh configs/embedded.yaml")
    add = parser.add_argument
    add("grid", type=Path, help="a grid file: configs/embedded.yaml, configs/paper.yaml or your own")
    add("--plan", action="store_true", help="print what would run, what is done, and an estimate of time and disk")
    add("--shard", type=shard, default="1/1", help="i/n: the i-th of n parts of the (model, language)s")
    add("--steps", nargs="+", choices=STEPS, default=list(STEPS), help="only these; a shard leaves out the tables")
    add("--results", type=Path, default=paths.RESULTS, help="where everything goes")
    add("--device", help="cpu, cuda, cuda:1 … (default: cuda if there is one, else cpu)")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    grid = read_grid(arguments.grid)
    if arguments.plan:
        from soteria.grid.plan import bill

        print(bill(grid, arguments.results))
        return
    steps = [step for step in STEPS if step in arguments.steps]

    from soteria.models.processes import Processes

    with Processes(arguments.device) as processes:
        failed, waiting = run_cells(grid, arguments, steps, processes) if steps != ["tables"] else ({}, {})
        if "tables" in steps and arguments.shard.of == 1 and processes.is_first:
            from make_tables import write_grid

            write_grid(grid, arguments.grid, arguments.results)
        if processes.is_first:
            tell(failed, waiting)
    if failed or waiting:
        sys.exit(1)


def tell(failed: dict[str, str], waiting: dict[str, str]) -> None:
    """Say on stderr what was not run and why, and what to do about it. Cells of one reason are named up to three."""
    for what, cells in (("failed", failed), ("waits", waiting)):
        for reason in dict.fromkeys(cells.values()):
            names = [name for name, own in cells.items() if own == reason]
            for name in names[:3]:
                print(f"{what}: {name}: {reason}", file=sys.stderr)
            if len(names) > 3:
                print(f"{what}: {len(names) - 3} more for the same reason", file=sys.stderr)
    if failed:
        print(f"{len(failed)} failed: mend what they say, and the same command goes on from here", file=sys.stderr)
    if waiting:
        print(f"{len(waiting)} wait for scores: the same command goes on when they are there", file=sys.stderr)


def run_cells(grid: Grid, arguments, steps: list[str], processes) -> tuple[dict[str, str], dict[str, str]]:
    """The steps before the tables; gives what failed and what waits, with the reasons."""
    import compute_indirect_effect as step_1
    from soteria.grid.reproduction import Reproduction
    from soteria.grid.subject import Subject

    def score(language: str, subject: Subject) -> None:
        options = {
            "--model_name": subject.pair.base,
            "--root_data_dir": grid.icl,
            "--save_path_root": subject.scores,
            "--dtype": grid.dtype,
            **{f"--{name}": value for name, value in grid.scoring.model_dump().items()},
        }
        words = ["--dataset_name", *(f"{task}_{language}" for task in grid.tasks)]
        words += [str(word) for option in options.items() for word in option]
        started = time.monotonic()
        _, scored = step_1.score(step_1.parse_arguments(words), subject.processes, lambda: subject.loaded)
        subject.note_cost("score", scored, time.monotonic() - started)

    reproduction = Reproduction(grid, arguments.results, processes, arguments.shard)
    reproduction.run(steps, score)
    return reproduction.failed, reproduction.waiting


if __name__ == "__main__":
    cli.run(main)
