"""How often the refusal judge is right, by kind of answer and language, on answers written after it was frozen.

--answers second: eight questions and eight answers of each kind a language, which the judge has not been changed for.
--answers first: as many, written after the judge's first version, which was corrected once by what they showed.
--answers gemma: Gemma 3 270M's own, labeled by hand: 105 of the aligned model of configs/gemma.yaml (16 tokens), base
or steered at λ = 1, and 56 of the pretrained one (40 tokens), after which the judge learned to see loops.
--answers earlier: 24 refusals and 24 compliant answers a language, which the phrases were made with in view.
Prints a Markdown table of the accuracy with Wilson 95 % intervals, and with --failures every misjudged answer.
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

from soteria.judging.interface import DEGENERATE, HARMFUL, NOT_HARMFUL  # noqa: E402
from soteria.judging.refusal import RefusalJudge  # noqa: E402
from soteria.judging.statistics import Rate  # noqa: E402

# What the answers of a kind should be judged as; those in another language name their own label.
LABELS = {
    "plain refusal": NOT_HARMFUL,
    "soft refusal": NOT_HARMFUL,
    "refusal with other help": NOT_HARMFUL,
    "compliance": HARMFUL,
    "polite compliance": HARMFUL,
    "disclaimer, then steps": HARMFUL,
    "refusal after restating": NOT_HARMFUL,
    "another language": None,
    "degenerate": DEGENERATE,
}
EARLIER = {"refusals": NOT_HARMFUL, "compliant": HARMFUL}
TESTS = ROOT / "tests"
SETS = {
    "second": (TESTS / "unseen_answers" / "second", LABELS),
    "first": (TESTS / "unseen_answers" / "first", LABELS),
    "gemma": (TESTS / "unseen_answers" / "gemma", dict.fromkeys(["aligned", "pretrained"])),
    "earlier": (TESTS / "judged_answers", EARLIER),
}
Row = tuple[str, str, str, str, str]  # language, kind, answer, right label, verdict


def judged(folder: Path, labels: dict[str, str | None]) -> list[Row]:
    """Every answer of a folder with the label that is right and the judge's own."""
    judge, rows = RefusalJudge(), []
    for path in sorted(folder.glob("*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        for kind, label in labels.items():
            questions = found.get("questions", [""] * len(found[kind]))
            for question, given in zip(questions, found[kind], strict=True):
                if isinstance(given, dict):
                    question, answer, right = given["question"], given["answer"], given["label"]
                else:
                    answer, right = (given, label) if label else given
                rows.append((path.stem, kind, answer, right, judge.verdict(answer, question)))
    return rows


def right(rows: list[Row]) -> Rate:
    return Rate(sum(row[3] == row[4] for row in rows), len(rows))


def cell(rate: Rate) -> str:
    low, high = rate.interval
    return f"{rate.count} of {rate.n}, {rate.value:.0%} [{low:.0%}, {high:.0%}]"


def print_table(rows: list[Row]) -> None:
    """A row a kind, a column a language; then all."""
    languages, kinds = (list(dict.fromkeys(row[at] for row in rows)) for at in (0, 1))
    print(f"| kind | {' | '.join(languages)} | all |\n|{'---|' * (len(languages) + 2)}")
    for kind in [*kinds, "all"]:
        own = [row for row in rows if kind in (row[1], "all")]
        rates = [right([row for row in own if row[0] == language]) for language in languages]
        cells = [f"{rate.count}/{rate.n}" if rate.n else "–" for rate in rates]
        print(f"| {kind} | {' | '.join(cells)} | {cell(right(own))} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--failures", action="store_true", help="print the misjudged answers")
    parser.add_argument("--answers", choices=SETS, default="second", help="which answers are judged (default: second)")
    arguments = parser.parse_args()
    rows = judged(*SETS[arguments.answers])
    print_table(rows)
    for language, kind, answer, label, verdict in rows if arguments.failures else ():
        if label != verdict:
            print(f"{language} · {kind} · {verdict} · {answer!r}")


if __name__ == "__main__":
    main()
