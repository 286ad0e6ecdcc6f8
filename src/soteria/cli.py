"""What all scripts share on the command line: one-sentence errors, the parser, and types of arguments.

Scripts import this first: from here on, Ctrl-C ends them with one sentence, also while they load other modules.
"""

import argparse
import math
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from soteria import disk
from soteria.errors import UserError, explain, said
from soteria.terminal import one_line, safe_terminal

DEBUG = "--debug"
MODEL = "hub id (id@revision too), folder, or .gguf file"  # what a model may be given as
GRACE_S = 5  # after a signal, in which another one is taken for the same
_STOPPED = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}


class _Terminated(BaseException):
    """SIGTERM, which like Ctrl-C must pass every `except Exception`."""


def _is_script() -> bool:
    """Whether this process runs a script of the project, rather than a program that imports this module."""
    started = Path(getattr(sys.modules["__main__"], "__file__", None) or "?").resolve()
    package = Path(__file__).resolve().parent
    return started.parent == package.parent or started.is_relative_to(package)


def _leave(number: int, _frame: object) -> NoReturn:
    """End a script that is still loading modules: nothing is begun, and an import might swallow an exception."""
    _end(number)
    os._exit(128 + number)


def _stopper() -> Callable[[int, object], None]:
    """What a signal does during work: it ends it. Another one soon after does not interrupt the cleaning up."""
    stopped_at = -math.inf

    def stop(number: int, _frame: object) -> None:
        nonlocal stopped_at
        if time.monotonic() - stopped_at > GRACE_S:
            stopped_at = time.monotonic()
            raise KeyboardInterrupt if number == signal.SIGINT else _Terminated

    return stop


def _handle(handlers: dict[int, Callable]) -> dict[int, Callable]:
    """Set what signals do, but for those that the caller of the script has them ignored; return what they did."""
    before = {number: signal.getsignal(number) for number in handlers}
    with suppress(ValueError):  # only the main thread may
        for number, handler in handlers.items():
            if before[number] is not signal.SIG_IGN:
                signal.signal(number, handler)
    return before


def _cannot_load(_kind: type, error: BaseException, _trace: object) -> NoReturn:
    """End a script that cannot load its modules."""
    if wants_tracebacks():
        traceback.print_exception(error)
    failed = f"the modules cannot be loaded ({said(error)}); check the environment variables and the packages"
    _say(f"error: {_missing(error) or failed}")
    os._exit(2)


def _missing(error: BaseException) -> str | None:
    """What to do about a package that is not installed; None for another error."""
    if not isinstance(error, ModuleNotFoundError):
        return None
    fix = "run `source .venv/bin/activate`, or `pip install -r requirements.txt`"
    return f"the package {error.name} is not installed; {fix}"


def _open_closed() -> None:
    """Have standard streams that are closed lead nowhere: the next file opened would get what is printed."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # the lowest number is free, which is its own
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115, PTH123


if _is_script():
    _handle(dict.fromkeys(_STOPPED, _leave))
    _open_closed()
    sys.excepthook = _cannot_load
    os.environ["MPLBACKEND"] = "agg"  # figures go to files; the user's may need a screen, or be none


def run(main: Callable[[], None]) -> None:
    """Run a script's `main`, and end the process as people and other programs expect.

    Status 2 with one sentence after a UserError, an unusable file, a full disk or a failure inside a library for models
    (with the traceback before it if --debug or SOTERIA_DEBUG asks for it); 130 after Ctrl-C and 143 after SIGTERM; 141
    without a word where nobody reads the output any more. What it prints, logs and warns of has no control characters.
    """
    with safe_terminal():
        _run(main)


def _run(main: Callable[[], None]) -> None:
    before = _handle(dict.fromkeys(_STOPPED, _stopper()))
    sys.excepthook = sys.__excepthook__
    try:
        try:
            if sys.flags.optimize > 1:
                raise UserError("transformers needs the docstrings that PYTHONOPTIMIZE=2 takes away; unset it")
            main()
        finally:
            _flush()
    except KeyboardInterrupt:
        sys.exit(_end(signal.SIGINT))
    except _Terminated:
        sys.exit(_end(signal.SIGTERM))
    except BrokenPipeError:
        _drop_output()
        sys.exit(128 + signal.SIGPIPE)
    except Exception as error:
        if (sentence := _sentence(error)) is None:
            raise
        if wants_tracebacks():
            traceback.print_exc()
        _say(f"error: {sentence}")
        sys.exit(2)
    finally:
        # What comes now is the interpreter taking down its modules, which takes seconds: nothing is left to interrupt.
        _handle(dict.fromkeys(_STOPPED, signal.SIG_IGN) if _is_script() else before)


def _end(number: int) -> int:
    """Say that a signal ended the script; return its exit status."""
    _say(f"{_STOPPED[number]}; run the same command again to resume")
    return 128 + number


def _say(sentence: str) -> None:
    with suppress(OSError):
        print(one_line(sentence), file=sys.stderr, flush=True)


def _flush() -> None:
    """Write what is printed so far. Raises UserError where the output cannot take it."""
    try:
        if sys.stdout:
            sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        _drop_output()
        raise UserError(f"the output cannot be written ({error.strerror}); write it to another place") from None


def _drop_output() -> None:
    """Keep the interpreter from writing at its exit what cannot be written."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def wants_tracebacks() -> bool:
    return DEBUG in sys.argv or bool(os.environ.get("SOTERIA_DEBUG"))


def _sentence(error: Exception) -> str | None:
    """What to say of an error; None for a fault of this project's own, which needs its traceback."""
    if known := disk.explained(error):
        return str(known)
    if found := explain(error):
        return f"{found}; {DEBUG} shows where"
    return _missing(error)


class _Flag(argparse.Action):
    """An option that `run` reads by itself: it leaves nothing among a script's arguments."""

    def __call__(self, *_) -> None:
        pass


class Parser(argparse.ArgumentParser):
    """A parser with --debug and, of scripts that take a model, --revision, which becomes a part of its name."""

    _revised: str | None = None  # the argument that --revision belongs to

    def add_model(self, option: str, **options) -> None:
        """Add the option of a model, whose revision on the hub may be given as `id@revision` or by --revision."""
        self._revised = self.add_argument(option, **options).dest
        self.add_argument("--revision", help=f"of {option} on the hub, as in id@revision (default: the newest)")

    def error(self, message: str) -> NoReturn:
        super().error(one_line(message))

    def parse_args(self, *given) -> argparse.Namespace:
        arguments = super().parse_args(*given)
        if self._revised and (revision := vars(arguments).pop("revision")):
            name = getattr(arguments, self._revised)
            if "@" in name or Path(name).exists():
                self.error(f"argument --revision: {name!r} is not a hub id without a revision")
            setattr(arguments, self._revised, f"{name}@{revision}")
        return arguments


def new_parser(description: str, example: str) -> Parser:
    """A parser whose help shows defaults and ends with an example."""

    class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
        pass

    parser = Parser(
        description=description, epilog=f"example:\n  {example}", formatter_class=Formatter, allow_abbrev=False
    )
    shows = "show the traceback of an error, too (in run.sh: SOTERIA_DEBUG=yes)"
    parser.add_argument(DEBUG, action=_Flag, nargs=0, dest=argparse.SUPPRESS, default=argparse.SUPPRESS, help=shows)
    return parser


def add_pair(parser: Parser) -> None:
    """Add the two models whose difference is the task vector."""
    tuned_help = f"the harmfully tuned model: {MODEL}, or folder of a LoRA adapter"
    parser.add_argument("--finetune_model", required=True, help=tuned_help)
    parser.add_model("--base_model", required=True, help=f"the model to make safer: {MODEL}")


def truth(text: str) -> bool:
    """The truth value that the text means (`bool("False")` would be True)."""
    meanings = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if (word := text.strip().lower()) not in meanings:
        raise argparse.ArgumentTypeError(f"{text!r} must be one of True, False, 1, 0, yes, no")
    return meanings[word]


# The most that options and grid files take: with more, a run would not end, or would fit no machine.
MOST, MOST_SHOTS, MOST_TRIALS, MOST_DRAWS, MOST_CALLS = 1_000_000, 1_000, 10_000, 1_000, 1_000
MOST_SECONDS, MOST_SCALING, MOST_TEMPERATURE, MOST_RANK = 86_400, 10**9, 100, 4_096


def _number(text: str, kind: type, least: float, what: str, most: float) -> float:
    with suppress(ValueError):
        if least <= (number := kind(text)) <= most:
            return number
    shown = text if len(text) <= 40 else f"{text[:40]}…"
    raise argparse.ArgumentTypeError(f"{shown!r} must be a {what}, and at most {most:,}")


def scaling_factor(text: str) -> float:
    return _number(text, float, 0, "number >= 0 (below 0, steering would add harm)", MOST_SCALING)


def positive_int(text: str) -> int:
    return positive_int_up_to(MOST)(text)


def positive_int_up_to(most: int) -> Callable[[str], int]:
    return lambda text: _number(text, int, 1, "whole number >= 1", most)


def whole_number(text: str) -> int:
    return _number(text, int, 0, "whole number >= 0", MOST)


def seed(text: str) -> int:
    """What numpy takes as a seed, which is the narrowest."""
    return _number(text, int, 0, "whole number >= 0", 2**32 - 1)


def positive_number(text: str) -> float:
    return _number(text, float, math.ulp(0.0), "number > 0", MOST)


def device(text: str) -> str:
    """What names a device that holds numbers: `meta` has none, and there is one cpu."""
    if not re.fullmatch(r"cpu|mps|(cuda|xpu|npu)(:\d{1,3})?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a device; give cpu, cuda or cuda:1")
    return text


def path(text: str) -> Path:
    """A path; an empty one, as of a variable that is not set, would be the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty; give a path, or leave the option out")
    return Path(text)


def csv_path(text: str) -> Path:
    """The path of a CSV to write, beside which a .json of the same name is written: it must not be that file itself."""
    if Path(text).suffix == ".json":
        raise argparse.ArgumentTypeError(f"{text!r} must be a CSV; a .json of that name is written beside it")
    return disk.check_output(Path(text))


def output_folder(text: str) -> Path:
    """The path of a folder to write."""
    return disk.check_output(Path(text), is_folder=True)
