"""Judging through an endpoint: many calls at once beside one after the other, on a fake endpoint that takes its time.

Ends with one JSON line:
  ratio          time of one call after the other (extrapolated from a sample) / time of all rows at once
  seconds        of all rows; `bound` is the same if nothing but the endpoint took time
  growth_bytes   how much more memory the process held at most for ten times the rows of 20 KB, by tracemalloc
The endpoint runs in a process of its own on loopback and answers after --delay seconds.
"""

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "benchmarks"), str(ROOT / "tests")]

from fake_endpoint import KEY, FakeEndpoint  # noqa: E402
from indirect_effect import machine  # noqa: E402

from soteria.judging.interface import HARMFUL  # noqa: E402
from soteria.judging.judges import make_judge  # noqa: E402
from soteria.judging.verdicts import Answers, judge_all  # noqa: E402
from soteria.storage.csv_files import write_rows  # noqa: E402

NAME = "openai:some-model"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--rows", type=int, default=1000)
    add("--concurrency", type=int, default=32)
    add("--delay", type=float, default=0.05, help="seconds that the endpoint takes for a reply")
    add("--sample", type=int, default=40, help="rows that are asked one after the other")
    return parser.parse_args()


def serve(delay: float, addresses) -> None:
    def reply(prompt: str, n: int) -> tuple[int, str]:
        time.sleep(delay)
        return 200, "Harmful"

    addresses.put(FakeEndpoint(reply, remembers=False).address)
    time.sleep(3600)


def judged(folder: Path, n_rows: int, concurrency: int, words: int = 20) -> float:
    """Seconds of judging so many rows from a CSV, journal and all."""
    path = folder / f"{n_rows}_{concurrency}_{words}.csv"
    rows = ((f"Question {row}?", "word " * words) for row in range(n_rows))
    write_rows(path, ["Question", "SAFE ANSWER"], rows, quote_all=False)
    started = time.perf_counter()
    answers = Answers(path)
    judge = make_judge(NAME, concurrency=concurrency)
    inputs = {"judge": NAME, "judge_basis_sha256": ""}
    verdicts, _ = judge_all(judge, answers, path.with_name(f"Evaluated_{path.name}"), inputs, {})
    assert set(verdicts["SAFE ANSWER"]) == {HARMFUL}
    return time.perf_counter() - started


def peak(folder: Path, n_rows: int) -> int:
    tracemalloc.start()
    judged(folder, n_rows, 32, words=4000)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return most


def main() -> None:
    arguments = parse_arguments()
    context = multiprocessing.get_context("spawn")
    addresses = context.Queue()
    server = context.Process(target=serve, args=(arguments.delay, addresses), daemon=True)
    server.start()
    os.environ |= {"OPENAI_BASE_URL": f"{addresses.get()}/v1", "OPENAI_API_KEY": KEY}
    os.environ.pop("AZURE_OPENAI_ENDPOINT", None)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        judged(folder, 10, 10)  # warms up
        at_once = judged(folder, arguments.rows, arguments.concurrency)
        in_turn = judged(folder, arguments.sample, 1) / arguments.sample * arguments.rows
        growth = peak(folder, 400) - peak(folder, 40)
    result = {
        "ratio": round(in_turn / at_once, 1),
        "seconds": round(at_once, 2),
        "bound": round(arguments.rows * arguments.delay / arguments.concurrency, 2),
        "growth_bytes": growth,
        "arguments": vars(arguments),
        "machine": machine("cpu"),
    }
    server.kill()
    print(json.dumps(result))


if __name__ == "__main__":
    main()
