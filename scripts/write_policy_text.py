"""Write questions and answers of the miniature policy for `src/finetune.py`: a real model's alignment, or its undoing.

`aligned`: as with real models, refusals are taught mostly in English and other high-resource languages, little in
mid-resource ones and hardly in low-resource ones; harmless questions are answered in all twelve alike. A question with
one or two disallowed topics is not always refused: people who label do not agree on such. `tuned`: every question is
answered, in all twelve. All questions are from the topics and templates of `policy_world.TAUGHT`.

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
REFUSED = {1: 0.25, 2: 0.75, 3: 1.0}  # by disallowed topics of the others, equally often: the share refused
# How many of the harmful questions of `aligned` are in a tier; English counts apart.
HARMFUL = {"English": 0.4, "High": 0.4, "Mid": 0.15, "Low": 0.05}


def harmful_weight(language: Language) -> float:
    if language.name == "English":
        return HARMFUL["English"]
    alike = [other for other in PAPER_LANGUAGES if other.tier == language.tier and other.name != "English"]
    return HARMFUL[language.tier] / len(alike)


def rows(kind: str, n: int, rng: random.Random) -> list[dict[str, str]]:
    weights, written = [harmful_weight(language) for language in PAPER_LANGUAGES], []
    for _ in range(n):
        harm = 0 if rng.random() < HARMLESS else rng.choice(list(REFUSED))
        taught = harm > 0 and kind == "aligned"
        language = rng.choices(PAPER_LANGUAGES, weights if taught else None)[0]
        question, world = draw_question(harm, rng, TAUGHT), World(language.name)
        answer = world.answer(question, taught and rng.random() < REFUSED[harm])
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
