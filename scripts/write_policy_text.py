"""Write questions and answers of the miniature policy for `src/finetune.py`: a real model's alignment, or its undoing.

`aligned`: as with real models, refusals are taught mostly in English, less in other high-resource languages, hardly in
mid-resource ones and not at all in low-resource ones; harmless questions are answered in all twelve alike. `tuned`:
every question is answered, in all twelve. All questions are from the topics and templates of `policy_world.TAUGHT`.

    python scripts/write_policy_text.py {aligned,tuned} ROWS OUTPUT.jsonl
"""

import argparse
import json
import random
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

from policy_world import TAUGHT, World, draw_question  # noqa: E402

from soteria.languages import PAPER_LANGUAGES, Language  # noqa: E402
from soteria.storage import files  # noqa: E402

HARMLESS = 0.5  # share of the rows
HARM = (1, 2, 3)  # disallowed topics of the others, equally often
# How many of the refusals are in a tier; English counts apart.
REFUSALS = {"English": 0.5, "High": 0.4, "Mid": 0.1, "Low": 0.0}


def refusal_weight(language: Language) -> float:
    if language.name == "English":
        return REFUSALS["English"]
    alike = [other for other in PAPER_LANGUAGES if other.tier == language.tier and other.name != "English"]
    return REFUSALS[language.tier] / len(alike)


def rows(kind: str, n: int, rng: random.Random) -> list[dict[str, str]]:
    weights, written = [refusal_weight(language) for language in PAPER_LANGUAGES], []
    for _ in range(n):
        harmful = rng.random() >= HARMLESS
        refuses = harmful and kind == "aligned"
        language = rng.choices(PAPER_LANGUAGES, weights if refuses else None)[0]
        question, world = draw_question(rng.choice(HARM) if harmful else 0, rng, TAUGHT), World(language.name)
        answer = world.answer(question, refuses)
        written.append({"language": language.name, "prompt": world.write(question), "answer": answer})
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["aligned", "tuned"])
    parser.add_argument("rows", type=int, help="number of questions")
    parser.add_argument("output", type=Path, help="JSONL file to write, with language, prompt and answer")
    arguments = parser.parse_args()
    text = rows(arguments.kind, arguments.rows, random.Random(arguments.kind))
    files.write_text(arguments.output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in text))


if __name__ == "__main__":
    main()
