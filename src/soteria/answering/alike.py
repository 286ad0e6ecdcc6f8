"""Whether the safe and the base model were asked alike: their answers, verdicts and costs cannot be compared otherwise.

In: the JSON beside a CSV of answers, which says how each column was made.
"""

from pathlib import Path

from soteria.answering.facts import AnswerFacts
from soteria.answering.questions import RELEASE, RELEASE_TOKENS
from soteria.errors import UserError
from soteria.storage.paths import ANSWER_COLUMNS, BASE_ANSWER, SAFE_ANSWER, facts_file
from soteria.storage.side_files import read_noted

# What is noted of a column that differs between the two models.
OWN = {"model_sha256", "model", "steered", "weights", "answers_sha256", "served"}


def how_made(answers: Path) -> dict[str, dict]:
    """The settings of each column of a CSV of answers, as far as they are noted."""
    noted = read_noted(facts_file(answers), AnswerFacts).get("columns", {})
    return {name: noted[name] for name in ANSWER_COLUMNS if name in noted}


def differences(made: dict[str, dict]) -> dict[str, tuple]:
    """The settings that answers depend on and that differ between the two columns: (safe's, base's) by name."""
    if len(made) < 2:
        return {}
    safe, base = (_without_name(made[column]) for column in (SAFE_ANSWER, BASE_ANSWER))
    found = {name: (safe.get(name), base.get(name)) for name in sorted({*safe, *base} - OWN)}
    if "dtype" not in safe or "dtype" not in base:  # of answers that an earlier version made
        found.pop("dtype", None)
    if found.get("preset") == (RELEASE, RELEASE):  # which has a length for each model
        lengths = RELEASE_TOKENS[SAFE_ANSWER], RELEASE_TOKENS[BASE_ANSWER]
        found = {name: pair for name, pair in found.items() if (name, pair) != ("max_new_tokens", lengths)}
    return {name: pair for name, pair in found.items() if pair[0] != pair[1]}


def _without_name(made: dict) -> dict:
    """Settings whose engine is without the name under which it serves the model."""
    return made | ({"engine": str(made["engine"]).partition(":")[0]} if "engine" in made else {})


def describe_differences(found: dict[str, tuple]) -> str:
    """Such as `chat_template (True, False)`."""
    return ", ".join(f"{name} ({safe!r}, {base!r})" for name, (safe, base) in found.items())


def check_alike(answers: Path) -> None:
    """Raise UserError if the two columns of a CSV of answers were made under unlike settings."""
    if found := differences(how_made(answers)):
        raise UserError(
            f"{answers}: {SAFE_ANSWER} and {BASE_ANSWER} cannot be compared, as they were made with unlike "
            f"{describe_differences(found)}; run generate.py again for one of them, with the settings of the other"
        )
