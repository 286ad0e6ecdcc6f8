"""What all scripts share on the command line: refusals in one sentence, truth values, and shared arguments."""

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path

from soteria.errors import UserError


def run(main: Callable[[], None]) -> None:
    """Run a script's `main`. A UserError ends it with its sentence on stderr and status 2, Ctrl-C with status 130.

    So does a file or folder that the system does not let us read or write.
    """
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.filename is None:
            raise
        print(f"error: {error.filename} cannot be used ({error.strerror}); give another path", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(130)


def new_parser(description: str, example: str) -> argparse.ArgumentParser:
    """A parser whose help shows defaults and ends with an example."""

    class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
        pass

    return argparse.ArgumentParser(
        description=description, epilog=f"example:\n  {example}", formatter_class=Formatter, allow_abbrev=False
    )


def add_pair(parser: argparse.ArgumentParser) -> None:
    """The two models whose difference is the task vector."""
    add = parser.add_argument
    add("--finetune_model", required=True, help="the harmfully tuned model: hub id, folder, or LoRA adapter folder")
    add("--base_model", required=True, help="the model to make safer: hub id or folder")


def add_languages(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--language", nargs="+", required=True, help="names or codes, or all for the paper's twelve")


def truth(text: str) -> bool:
    """`True/False/true/false/1/0/yes/no` as what they say (`bool("False")` would be True)."""
    meanings = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    try:
        return meanings[text.strip().lower()]
    except KeyError:
        raise argparse.ArgumentTypeError(f"{text!r} is not one of True, False, 1, 0, yes, no") from None


def scaling_factor(text: str) -> float:
    """A finite number, 0 or more: below 0, steering would add the harmful direction."""
    try:
        number = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not math.isfinite(number) or number < 0:
        raise argparse.ArgumentTypeError(f"{text} is not 0 or more (below 0, steering would add harm)")
    return number


def positive_int(text: str) -> int:
    """A whole number above zero."""
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is below 1")
    return number


def csv_path(text: str) -> Path:
    """A path for a CSV that gets a .json of the same name beside it, and so must not be that name itself."""
    if Path(text).suffix == ".json":
        raise argparse.ArgumentTypeError(f"{text} is to be a CSV; a .json of that name goes beside it")
    return Path(text)
