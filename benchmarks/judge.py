"""Time judging through an endpoint: many concurrent calls against one after another, on a fake, slow endpoint.

The last line printed is JSON:
  ratio          time of one call after another (extrapolated from a sample) / time of concurrent calls
  seconds        for all rows; `bound` is what they would be if only the endpoint took time
  growth_bytes   growth of peak memory when there are ten times as many rows of 20 KB, by tracemalloc
The endpoint runs in its own process on loopback and answers after --delay seconds.
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
from soteria.judging.verdicts import AnswerFile, judge_answers  # noqa: E402
from soteria.storage.csv_files import write_rows  # noqa: E402

NAME = "openai:some-model"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--rows", type=int, default=1000)
    add("--concurrency", type=int, default=32)
    add("--delay", type=float, default=0.05, help="seconds the endpoint takes to reply")
    add("--sample", type=int, default=40, help="rows to ask one after another")
    return parser.parse_args()


def serve(delay: float, addresses) -> None:
    def reply(prompt: str, n: int) -> tuple[int, str]:
        time.sleep(delay)
        return 200, "Harmful"

    addresses.put(FakeEndpoint(reply).address)
    time.sleep(3600)


def seconds_to_judge(folder: Path, n_rows: int, concurrency: int, words: int = 20) -> float:
    """Seconds it takes to judge a CSV, including its journal."""
    path = folder / f"{n_rows}_{concurrency}_{words}.csv"
    rows = ((f"Question {row}?", "word " * words) for row in range(n_rows))
    write_rows(path, ["Question", "SAFE ANSWER"], rows, quote_all=False)
    started = time.perf_counter()
    inputs, output = {"judge": NAME, "judge_basis_sha256": ""}, path.with_name(f"Evaluated_{path.name}")
    judged = judge_answers(AnswerFile(path), output, inputs, lambda: make_judge(NAME, concurrency=concurrency))
    assert set(judged.verdicts["SAFE ANSWER"]) == {HARMFUL}
    return time.perf_counter() - started


def peak(folder: Path, n_rows: int) -> int:
    tracemalloc.start()
    seconds_to_judge(folder, n_rows, 32, words=4000)
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
        seconds_to_judge(folder, 10, 10)  # warms up
        at_once = seconds_to_judge(folder, arguments.rows, arguments.concurrency)
        in_turn = seconds_to_judge(folder, arguments.sample, 1) / arguments.sample * arguments.rows
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
