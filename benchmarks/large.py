"""Whether time and memory grow with the work and no faster: each step at n and at 4 n, in one run.

Questions read, batches planned, answers journaled and written, judged by the refusal judge and counted; one answer of n
times 25 characters; and the tables and the report of a grid of n / 40 cells, whose answers are written here. Prints
seconds of the processor, the peak of Python's memory, and both ratios: 4 is linear, and 1 is flat. Ends with one JSON
line.
"""

import argparse
import contextlib
import io
import json
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

from soteria.answering.columns import AnswerColumn  # noqa: E402
from soteria.answering.decoding import plan_batches  # noqa: E402
from soteria.answering.questions import read_questions  # noqa: E402
from soteria.grid.cells import grid_cells  # noqa: E402
from soteria.grid.found import CellOnDisk, SubjectOnDisk  # noqa: E402
from soteria.grid.grid_file import read_grid  # noqa: E402
from soteria.judging.refusal import RefusalJudge  # noqa: E402
from soteria.judging.statistics import by_category  # noqa: E402
from soteria.judging.verdicts import AnswerFile, inputs_of, judge_answers  # noqa: E402
from soteria.languages import find_language  # noqa: E402
from soteria.reporting.output import write_grid  # noqa: E402
from soteria.storage import files  # noqa: E402
from soteria.storage.csv_files import write_rows  # noqa: E402
from soteria.storage.paths import SAFE_ANSWER, facts_file  # noqa: E402

ENGLISH = find_language("en")
REFUSED, GIVEN = "I cannot help with that.", "Sure, here is how: first, open the door."
MEASURED = {"n_heads": 1, "parameters_changed": 8, "share_of_parameters": 0.1}
GRID = """name: large
models: [{{base: none/base, tuned: none/tuned}}]
languages: all
prompt_sets: [policy]
scaling_factor: 1
ablations: {{random_draws: {draws}}}
answers: {{questions: 8}}
"""


def answer(row: int) -> str:
    return REFUSED if row % 3 else f"{GIVEN} {row}"


def read(folder: Path, n: int) -> Callable[[], object]:
    rows = ([f"How does one open door {row}?", f"kind {row % 10}"] for row in range(n))
    write_rows(folder / "asked.csv", ["question", "category"], rows, quote_all=False)
    return lambda: read_questions(str(folder / "asked.csv"), ENGLISH)


def plan(folder: Path, n: int) -> Callable[[], object]:
    return lambda: plan_batches([20 + row % 50 for row in range(n)], 1, 64)


def write(folder: Path, n: int) -> Callable[[], object]:
    """Answers are journaled eight at a time; the journal of a killed run is read back before they are written."""
    settings = {"language": "English", "max_new_tokens": 64, "chat_template": False}
    asked = read(folder, n)()
    column = AnswerColumn(folder / "answers.csv", SAFE_ANSWER, asked, "none", settings)

    def answered() -> None:
        with column.journal() as journal:
            for row in range(0, n, 8):
                journal.add({each: answer(each) for each in range(row, min(row + 8, n))})
        found = column.journal().done
        column.save([found[row] for row in range(n)], None)
        assert column.is_complete()

    return answered


def judge(folder: Path, n: int, texts: Callable[[int], str] = answer) -> Callable[[], object]:
    rows = ([f"How does one open door {row}?", texts(row)] for row in range(n))
    write_rows(folder / "answers.csv", ["Question", SAFE_ANSWER], rows, quote_all=False)

    def judged() -> None:
        answers = AnswerFile(folder / "answers.csv")
        found = judge_answers(answers, folder / "judged.csv", inputs_of(answers, "refusal"), RefusalJudge)
        found.write(
            {"judge": "refusal"}
            | by_category([f"kind {row % 10}" for row in range(n)], {"safe": found.verdicts[SAFE_ANSWER]})
        )

    return judged


def judge_one(folder: Path, n: int) -> Callable[[], object]:
    return judge(folder, 1, lambda row: "and then one goes on ... " * n)


def tables(folder: Path, n: int) -> Callable[[], object]:
    path = folder / "large.yaml"
    path.write_text(GRID.format(draws=n // 480), encoding="utf-8")
    grid = read_grid(path)
    subject = SubjectOnDisk(grid, grid.models[0], folder)
    for at, cell in enumerate(grid_cells(grid, grid.models[0])):
        found, own = CellOnDisk(subject, cell), cell.files(folder)
        files.write_json(own.facts, found.made_from | MEASURED)
        asked, column = subject.questions("policy", cell.language, None), found.answer_column
        answers = own.answers("policy")
        rows = ([question, answer(row + at)] for row, question in enumerate(asked.questions))
        write_rows(answers, ["Question", column], rows, quote_all=False)
        made = {"rows": 8, "columns": {column: found.settings | {"model": "none/base"}}}
        files.write_json(facts_file(answers), made)
        inputs = inputs_of(AnswerFile(answers), "refusal")
        judged = judge_answers(AnswerFile(answers), own.verdicts("policy", "refusal"), inputs, RefusalJudge)
        judged.write(inputs | {"judge_description": "refusal"})

    def written() -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            write_grid(grid, path, folder)

    return written


STEPS = {"read": read, "plan": plan, "write": write, "judge": judge, "one answer": judge_one, "tables": tables}


def measure(prepare: Callable[[Path, int], Callable[[], object]], n: int) -> tuple[float, float]:
    """Seconds and peak MB, of two runs: tracing memory takes time."""
    seconds, peak = 0.0, 0.0
    for traced in (False, True):
        with tempfile.TemporaryDirectory() as folder:
            run = prepare(Path(folder), n)
            if traced:
                tracemalloc.start()
            started = time.process_time()
            run()
            if traced:
                peak = tracemalloc.get_traced_memory()[1] / 1e6
                tracemalloc.stop()
            else:
                seconds = time.process_time() - started
    return seconds, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=50_000, help="the smaller n; four times as many are the larger")
    parser.add_argument("--steps", nargs="+", choices=list(STEPS), default=list(STEPS), help="which steps")
    arguments = parser.parse_args()
    ratios = {}
    for name in arguments.steps:
        measure(STEPS[name], 160)  # imports and caches
        few, many = (measure(STEPS[name], n) for n in (arguments.rows, 4 * arguments.rows))
        ratios[name] = {"seconds": many[0] / few[0], "memory": many[1] / few[1]}
        print(
            f"{name}: {few[0]:.2f} s, {few[1]:.1f} MB; four times as much: {many[0]:.2f} s, {many[1]:.1f} MB",
            flush=True,
        )
    print(json.dumps({name: {key: round(value, 1) for key, value in each.items()} for name, each in ratios.items()}))


if __name__ == "__main__":
    main()
