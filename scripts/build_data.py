"""Build the aligned data of the twelve languages: `data/icl/`, `prompts/` and `benign/` from `data/source/` and CLDR.

Row i of a file is the same item in every language. Country names are CLDR's, read through Babel, but for those that
`data/source/country_names.csv` corrects; the rest was written for this project. Run this after a change in
`data/source/`: a test compares its output with the committed files.

    python scripts/build_data.py [--output DIR]
"""

import argparse
import csv
import datetime
import io
import json
import sys
from pathlib import Path

from babel import Locale
from babel.numbers import get_territory_currencies
from policy_world import World, held_out_questions, unseen_questions

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

from soteria.languages import PAPER_LANGUAGES, Language  # noqa: E402

# The day whose legal tender counts, fixed so that the files do not depend on when this script runs.
CURRENCY_DATE = datetime.date(2025, 1, 1)


def country_names(language: Language) -> dict[str, str]:
    """ISO 3166 code → the country's name in one language: CLDR's, or ours where CLDR's was found wrong."""
    names = dict(Locale.parse(language.code, sep="-").territories)
    with (ROOT / "data" / "source" / "country_names.csv").open(encoding="utf-8", newline="") as stream:
        for row in csv.DictReader(stream):
            if row["language"] == language.name:
                names[row["code"]] = row["ours"]
    return names


def legal_tender(country: str) -> str | None:
    """The ISO 4217 code of a country's one legal tender; None where there are several, or another since 2026."""
    currencies = get_territory_currencies(country, CURRENCY_DATE)
    # Lesotho uses loti and rand; Bulgaria adopted the euro in 2026.
    return currencies[0] if len(currencies) == 1 and country != "BG" else None


def icl_rows(language: Language) -> dict[str, list[tuple[str, str]]]:
    """(input, output) rows of the five tasks in one language, in an order that is the same for all languages."""
    source, countries = World(language.name).source, country_names(language)
    units = source["currency_units"]
    return {
        "antonym": [(word, opposite) for word, opposite in source["antonyms"]],
        "country-capital": [(countries[code], city) for code, city in source["capitals"].items()],
        "country-currency": [
            (countries[code], units[tender]) for code in source["capitals"] if (tender := legal_tender(code)) in units
        ],
        "sentiment": interleave(source["reviews"], source["sentiment_labels"]),
        "ag_news": interleave(source["headlines"], source["news_labels"]),
    }


def interleave(texts: dict[str, list[str]], labels: dict[str, str]) -> list[tuple[str, str]]:
    """Rows with the labels in turn, so that any stretch of the file is balanced."""
    rows = zip(*([(text, labels[key]) for text in texts[key]] for key in texts), strict=True)
    return [row for turn in rows for row in turn]


def question_sets(world: World) -> dict[str, list[tuple[str, str]]]:
    """(question, category) rows of each question file in one language, by the file's folder and name."""
    sets = {}
    for name, questions in (held_out_questions() | unseen_questions()).items():
        folder = "benign" if questions[0].n_disallowed == 0 else "prompts"
        sets[f"{folder}/{name}"] = [(world.write(question), question.category) for question in questions]
    for name in ("borderline", "borderline-validation"):
        texts = world.source[name.replace("-", "_")]
        sets[f"benign/{name}"] = interleave(texts, {kind: kind for kind in texts})
    return sets


def question_csv(rows: list[tuple[str, str]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["id", "question", "category"])
    writer.writerows([i, *row] for i, row in enumerate(rows))
    return text.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "data", help="folder to write to (default: data/)")
    output = parser.parse_args().output
    files = {}
    for language in PAPER_LANGUAGES:
        for task, rows in icl_rows(language).items():
            lines = [json.dumps({"input": a, "output": b}, ensure_ascii=False) for a, b in rows]
            files[f"icl/{task}_{language.name}.json"] = "[\n" + ",\n".join(lines) + "\n]\n"
        for path, rows in question_sets(World(language.name)).items():
            files[f"{path}_{language.name}.csv"] = question_csv(rows)
    for name, text in files.items():
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        (output / name).write_text(text, encoding="utf-8")
    print(f"wrote {len(files)} files under {output}")


if __name__ == "__main__":
    main()
