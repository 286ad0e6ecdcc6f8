"""A model's in-context accuracy by language and task: whole answers, ten shots, rows that step 1 never draws from.

    python benchmarks/icl_accuracy.py results/models/gemma-aligned --prompts 10

Prints a Markdown table, in percent, with the number of prompts and 95 % Wilson intervals of each language.
"""

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

from soteria.grid.grid_file import ACCURACY_SEED  # noqa: E402
from soteria.judging.costs import icl_accuracy, read_tasks  # noqa: E402
from soteria.judging.statistics import Rate  # noqa: E402
from soteria.languages import find_language, language_names  # noqa: E402
from soteria.models.loading import load_model  # noqa: E402
from soteria.scoring.prompts import TASKS  # noqa: E402
from soteria.storage import paths  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="hub id or folder")
    parser.add_argument("--language", nargs="+", default=["all"], help="names or codes (default: the paper's twelve)")
    parser.add_argument("--prompts", type=int, default=25, help="per task and language (default: 25)")
    arguments = parser.parse_args()
    loaded, rows = load_model(arguments.model), []
    for name in tqdm(language_names(arguments.language), desc="accuracy", unit="language", disable=None):
        splits = read_tasks(paths.DATA / "icl", TASKS, find_language(name))
        rates = [icl_accuracy(loaded, {task: splits[task]}, ACCURACY_SEED, arguments.prompts) for task in TASKS]
        both = Rate(sum(rate.count for rate in rates), sum(rate.n for rate in rates))
        low, high = both.interval
        cells = [*(f"{rate.value:.0%}" for rate in rates), f"{both.value:.0%} [{low:.0%}, {high:.0%}]"]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    print(f"| language | {' | '.join(TASKS)} | all, {both.n} prompts |\n|{'---|' * (len(TASKS) + 2)}")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
