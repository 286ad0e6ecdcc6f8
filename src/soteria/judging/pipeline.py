"""The plan of `scripts/run.sh`, before anything is computed: are its arguments sound, and what are its files called?

Run as `python -m soteria.judging.pipeline` with the eight arguments of run.sh. Prints the folder of the steered model,
the CSV of the answers, the CSV of the verdicts, then the options that the environment asks for: the number of those of
judge.py, they themselves, and those of generate.py. Each ends with a zero byte, which no path or option holds.
"""

import argparse
import os
import sys
from collections.abc import Iterable
from contextlib import redirect_stdout
from pathlib import Path

from soteria import cli
from soteria.answering.alike import describe_differences, differences, how_made
from soteria.answering.question_files import find_local
from soteria.answering.questions import RELEASE, benign_set, dataset_slug, longest_answer, read_questions
from soteria.errors import UserError
from soteria.judging.formats import FORMATS
from soteria.judging.judges import check_judge, settings_of
from soteria.judging.presets import PRESETS, make_settings
from soteria.judging.refusal import phrase_lists
from soteria.languages import Language, find_language
from soteria.storage import outputs, paths
from soteria.storage.paths import BASE_ANSWER, BENIGN, BORDERLINE, SAFE_ANSWER

SELECTION = {"subset": "SUBSET", "split": "SPLIT", "question_column": "QUESTION_COLUMN", "where": "WHERE"}
# Harmless questions that come with the project, under data/benign.
DEFAULTS = {BENIGN: "everyday", BORDERLINE: "borderline"}


def _yes_or_no(text: str) -> str:
    if text not in ("yes", "no"):
        raise argparse.ArgumentTypeError(f"{text!r} must be yes or no")
    return text


# What each argument must be; all are positional, so one that looks like an option is a name like any other.
ARGUMENTS = {
    "finetune_model": str,
    "base_model": str,
    "language": find_language,
    "dataset_file": str,
    "scaling_factor": cli.scaling_factor,
    "do_base": _yes_or_no,
    "batch_size": cli.positive_int,
    "head_folder": str,
}


def main() -> None:
    with redirect_stdout(sys.stderr):  # whatever a library prints is no part of the plan
        words = plan(sys.argv[1:])
    sys.stdout.flush()
    sys.stdout.buffer.write(b"".join(os.fsencode(word) + b"\0" for word in words))


def plan(given: list[str]) -> list[str]:
    """What is printed for run.sh's arguments. Raises UserError for anything that would fail later."""
    if len(given) != len(ARGUMENTS):
        raise UserError(f"{len(given)} arguments instead of {len(ARGUMENTS)}: {', '.join(ARGUMENTS)}")
    arguments = argparse.Namespace()
    for (name, kind), text in zip(ARGUMENTS.items(), given, strict=True):
        if not text.strip():
            raise UserError(f"the argument {name} is empty; give all of {', '.join(ARGUMENTS)}")
        try:
            setattr(arguments, name, kind(text))
        except argparse.ArgumentTypeError as error:
            raise UserError(f"{name}: {error}") from None
    language, dataset = arguments.language, arguments.dataset_file
    judges = list(dict.fromkeys((os.environ.get("SOTERIA_JUDGE") or "").split())) or ["refusal"]
    strict, with_template = (_truth(f"SOTERIA_{name}") for name in ("STRICT", "CHAT_TEMPLATE"))
    selected, selected_benign = _selection(""), _selection("BENIGN_")
    _read(dataset, language, selected, strict)
    harmless = {kind: _harmless(kind, language, selected_benign if kind == BENIGN else {}, strict) for kind in DEFAULTS}
    paths.head_folder(arguments.head_folder)
    if "refusal" in judges and (lacks := without_phrases([language])):
        raise UserError(f"SOTERIA_JUDGE: {lacks}")
    preset = os.environ.get("SOTERIA_PRESET") or ""
    if preset not in ("", RELEASE) or (preset and with_template):
        raise UserError(f"SOTERIA_PRESET is {preset!r}; give {RELEASE}, without SOTERIA_CHAT_TEMPLATE, or leave it out")
    longest = _longest()
    if with_template:
        from soteria.models.loading import check_chat_template  # transformers takes seconds to import

        check_chat_template(arguments.base_model, "SOTERIA_CHAT_TEMPLATE=yes")
    judging = _judging("" if judges == ["refusal"] else preset)
    settings = make_settings(**judging)
    for judge in judges:
        check_judge(judge, settings_of(judge, judges, settings))  # better refused now than after all answers
    named = (language.name, arguments.base_model)
    steered = paths.steered_folder(paths.RESULTS, *named, arguments.scaling_factor)
    answers, verdicts = paths.answer_files(paths.RESULTS, *named, dataset_slug(dataset), arguments.scaling_factor)
    if arguments.do_base == "no":
        wanted = {"chat_template": with_template, "max_new_tokens": longest_answer(SAFE_ANSWER, preset, longest)}
        _check_base(answers, wanted | ({"preset": preset} if preset else {}))
    sets = [find_local(name) for name in (dataset, *(name for given in harmless.values() for name in given))]
    _check_outputs(steered, (answers, verdicts), [kind for kind, given in harmless.items() if given], judges, sets)
    asked = [f"--judge_{name}={value}" for name, value in judging.items() if value]
    words = [steered, answers, verdicts, 1 + len(judges) + len(asked), "--judge", *judges, *asked]
    options = [("preset", [preset] if preset else []), ("max_new_tokens", [longest] if longest else [])]
    options += [*harmless.items(), *selected.items()]
    options += [(f"benign_{name}", values) for name, values in selected_benign.items()]
    words += [f"--{name}={value}" for name, values in options for value in values]
    words += [name for name, is_set in (("--strict", strict), ("--chat_template", with_template)) if is_set]
    return [str(word) for word in words]


def without_phrases(languages: Iterable[Language]) -> str:
    """Why the refusal judge cannot judge answers in some of the languages, or nothing: it would call all harmful."""
    others = [language for language in languages if language.tier is None]
    lacking = [language.name for language in others if language.name not in phrase_lists()]
    return (
        f"the refusal judge has no phrases in {', '.join(lacking)}; use openai:<model> or hf:<model>" if lacking else ""
    )


def _harmless(kind: str, language: Language, selected: dict[str, list[str]], strict: bool) -> list[str]:
    """The questions of a kind that the environment names, or those of the project; none for `none`."""
    asked = os.environ.get(f"SOTERIA_{kind.upper()}") or None
    if selected and asked in (None, "none"):
        raise UserError("SOTERIA_BENIGN_SUBSET, _SPLIT, _QUESTION_COLUMN and _WHERE need SOTERIA_BENIGN")
    if asked == "none":
        return []
    found = benign_set(asked or DEFAULTS[kind], language)
    if asked:
        _read(found, language, selected, strict)
    elif find_local(found) is None:  # a language without such questions
        return []
    return [found]


def _selection(prefix: str) -> dict[str, list[str]]:
    """What the environment says of the part of a set to ask, by option of generate.py; `;` parts conditions."""
    given = {option: os.environ.get(f"SOTERIA_{prefix}{name}") for option, name in SELECTION.items()}
    found = {option: text.split(";") if option == "where" else [text] for option, text in given.items() if text}
    found = {option: [text for text in texts if text.strip()] for option, texts in found.items()}
    return {option: texts for option, texts in found.items() if texts}


def _read(dataset: str, language: Language, selected: dict[str, list[str]], strict: bool) -> None:
    """Raise UserError for questions that generate.py could not read."""
    subset, split, column = (selected.get(name, [None])[0] for name in ("subset", "split", "question_column"))
    where = selected.get("where", [])
    read_questions(dataset, language, subset=subset, split=split, column=column, where=where, strict=strict)


def _truth(name: str) -> bool:
    try:
        return cli.truth(os.environ.get(name) or "no")
    except argparse.ArgumentTypeError as error:
        raise UserError(f"{name}: {error}") from None


def _longest() -> int | None:
    """What the environment says of the most new tokens of an answer."""
    try:
        given = os.environ.get("SOTERIA_MAX_NEW_TOKENS")
        return cli.positive_int(given) if given else None
    except argparse.ArgumentTypeError as error:
        raise UserError(f"SOTERIA_MAX_NEW_TOKENS: {error}") from None


def _check_base(answers: Path, wanted: dict) -> None:
    """Raise UserError for answers of the base that stay and were made unlike those that are to be made of the safe."""
    made = how_made(answers).get(BASE_ANSWER, {})
    kept = {name: made[name] for name in ("chat_template", "max_new_tokens", "preset") if name in made}
    if kept and (unlike := differences({SAFE_ANSWER: wanted, BASE_ANSWER: kept})):
        raise UserError(
            f"{answers} has answers of the base made with unlike {describe_differences(unlike)}, safe and base; give "
            "do_base yes, the settings of then, or another SOTERIA_RESULTS"
        )


def _check_outputs(
    steered: Path, files: tuple[Path, Path], kinds: list[str], judges: list[str], inputs: list[Path | None]
) -> None:
    """Raise UserError for what steer.py, generate.py and judge.py would refuse to write over, an hour later."""
    answers, verdicts = files
    outputs.check_folder(steered, "finetune_model", "a steered model")
    for place in (answers, *(paths.harmless_file(answers, kind) for kind in kinds)):
        outputs.check_csv(place, "columns", inputs)
    for place in (verdicts, *(paths.own_verdicts(verdicts, judge) for judge in judges if len(judges) > 1)):
        outputs.check_csv(place, "inputs_sha256", inputs)


def _judging(preset: str) -> dict[str, str | None]:
    """How the environment has judges asked, by a preset if it says no other. Raises UserError for unknown names."""
    given = {}
    for name, known in (("preset", PRESETS), ("format", FORMATS)):
        variable = f"SOTERIA_JUDGE_{name.upper()}"
        given[name] = os.environ.get(variable) or None
        if given[name] and given[name] not in known:
            raise UserError(f"{variable} is {given[name]!r}; give one of {', '.join(known)}")
    return given | {"preset": given["preset"] or preset or None}


if __name__ == "__main__":
    cli.run(main)
