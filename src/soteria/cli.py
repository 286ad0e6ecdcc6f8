"""What all scripts share on the command line: one-sentence errors, the parser, and types of arguments."""

import argparse
import math
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from soteria.errors import UserError


def run(main: Callable[[], None]) -> None:
    """Run a script's `main`. Exits with status 2 after a UserError or an unusable file, with 130 after Ctrl-C."""
    try:
        main()
    except (UserError, OSError) as error:
        if isinstance(error, OSError):
            if error.filename is None:
                raise
            error = f"{error.filename} cannot be used ({error.strerror}); give another path"
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; run the same command again to resume", file=sys.stderr)
        sys.exit(130)


def new_parser(description: str, example: str) -> argparse.ArgumentParser:
    """A parser whose help shows defaults and ends with an example."""

    class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
        pass

    return argparse.ArgumentParser(
        description=description, epilog=f"example:\n  {example}", formatter_class=Formatter, allow_abbrev=False
    )


def add_pair(parser: argparse.ArgumentParser) -> None:
    """Add the two models whose difference is the task vector."""
    add = parser.add_argument
    add("--finetune_model", required=True, help="the harmfully tuned model: hub id, folder, or LoRA adapter folder")
    add("--base_model", required=True, help="the model to make safer: hub id or folder")


def truth(text: str) -> bool:
    """The truth value that the text means (`bool("False")` would be True)."""
    meanings = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if (word := text.strip().lower()) not in meanings:
        raise argparse.ArgumentTypeError(f"{text!r} must be one of True, False, 1, 0, yes, no")
    return meanings[word]


def _number(text: str, kind: type, least: float, what: str) -> float:
    with suppress(ValueError):
        if least <= (number := kind(text)) < math.inf:
            return number
    raise argparse.ArgumentTypeError(f"{text!r} must be a {what}")


def scaling_factor(text: str) -> float:
    return _number(text, float, 0, "number >= 0; below 0, steering would add harm")


def positive_int(text: str) -> int:
    return _number(text, int, 1, "whole number >= 1")


def whole_number(text: str) -> int:
    return _number(text, int, 0, "whole number >= 0")


def seed(text: str) -> int:
    """What numpy takes as a seed, which is the narrowest."""
    if (number := whole_number(text)) >= 2**32:
        raise argparse.ArgumentTypeError(f"{text!r} must be below 2**32")
    return number


def positive_number(text: str) -> float:
    return _number(text, float, math.ulp(0.0), "number > 0")


def csv_path(text: str) -> Path:
    """The path of a CSV, beside which a .json of the same name is written: it must not be that file itself."""
    if Path(text).suffix == ".json":
        raise argparse.ArgumentTypeError(f"{text!r} must be a CSV; a .json of that name is written beside it")
    return Path(text)
