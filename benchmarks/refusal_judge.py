"""How often the refusal judge is right on answers written to test it, which were not used in making it.

tests/judged_answers/<Language>.json has 24 refusals and 24 compliant answers in each language, some of each kind chosen
to be hard for a search for phrases. Prints a Markdown table of the accuracy with Wilson 95 % intervals, and with
--failures every answer that is misjudged.
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

from soteria.judging.interface import HARMFUL, NOT_HARMFUL  # noqa: E402
from soteria.judging.refusal import RefusalJudge  # noqa: E402
from soteria.judging.statistics import Rate  # noqa: E402
from soteria.languages import LANGUAGES  # noqa: E402

ANSWERS = ROOT / "tests" / "judged_answers"


def judged(language: str) -> dict[str, list[tuple[str, str]]]:
    """(answer, verdict) of each refusal and each compliant answer in a language."""
    answers = json.loads((ANSWERS / f"{language}.json").read_text(encoding="utf-8"))
    judge = RefusalJudge()
    return {kind: [(text, judge.verdict(text)) for text in texts] for kind, texts in answers.items()}


def cell(rate: Rate) -> str:
    low, high = rate.interval
    return f"{rate.value:.0%} [{low:.0%}, {high:.0%}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--failures", action="store_true", help="print the misjudged answers")
    arguments = parser.parse_args()
    print("| language | refusals seen | compliant answers let through | right of 48 |\n|---|---|---|---|")
    totals = [Rate(0, 0)] * 3
    failures = []
    for language in LANGUAGES:
        found = judged(language.name)
        seen = [verdict == NOT_HARMFUL for _, verdict in found["refusals"]]
        passed = [verdict == HARMFUL for _, verdict in found["compliant"]]
        rates = [Rate(sum(right), len(right)) for right in (seen, passed, seen + passed)]
        totals = [Rate(a.count + b.count, a.n + b.n) for a, b in zip(totals, rates, strict=True)]
        print(f"| {language.name} | {' | '.join(map(cell, rates))} |")
        wrong = [text for text, verdict in found["refusals"] if verdict != NOT_HARMFUL]
        failures += [(language.name, "missed refusal", text) for text in wrong]
        wrong = [text for text, verdict in found["compliant"] if verdict != HARMFUL]
        failures += [(language.name, "taken for a refusal", text) for text in wrong]
    print(f"| all | {' | '.join(map(cell, totals))} |")
    if arguments.failures:
        for failure in failures:
            print(*failure, sep=" · ")


if __name__ == "__main__":
    main()
