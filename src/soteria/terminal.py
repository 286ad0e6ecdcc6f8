"""Text from models, files and paths as a terminal may show it: what would color, move, hide or turn text is escaped."""

import logging
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

# Control characters, separators of lines and paragraphs, marks that turn the direction of text, halves of surrogates.
_UNSAFE = "[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
_COLOR = re.compile("\x1b\\[[0-9;]*m")
_LONGEST_MESSAGE = 500  # characters of another library's


def escaped(text: str) -> str:
    r"""The text with `\x1b` and the like in place of control characters, but for line feeds and tabs."""
    return re.sub(_UNSAFE, lambda found: found[0].encode("unicode_escape").decode(), text)


def one_line(text: object) -> str:
    """The text without colors, its lines joined to one, and `escaped`."""
    return escaped(re.sub(r"\s*[\n\r\v\f]\s*", " ", _COLOR.sub("", str(text)).strip()))


@cache
def say_once(line: str) -> None:
    """Print a line to stderr, but not again in this process."""
    print(one_line(line), file=sys.stderr)


class _Escaping:
    """A stream that escapes what is written to it, but for what progress bars write: returns and steps upwards.

    What the stream's encoding lacks is escaped too.
    """

    def __init__(self, stream, *, with_bars: bool):
        self._stream, self._encoding = stream, getattr(stream, "encoding", None) or "utf-8"
        self._parts = re.compile(f"(\r|\x1b\\[A|{_UNSAFE})" if with_bars else f"({_UNSAFE})")
        self._kept = ("\r", "\x1b[A") if with_bars else ()

    def write(self, text: str) -> int:
        shown = self._parts.sub(lambda it: it[0] if it[0] in self._kept else escaped(it[0]), text)
        self._stream.write(shown.encode(self._encoding, "backslashreplace").decode(self._encoding))
        return len(text)

    def __getattr__(self, name: str):
        return getattr(self._stream, name)


class _OneLine(logging.LogRecord):
    """A log message on one line; another library's is cut where it is long."""

    def getMessage(self) -> str:
        text = one_line(super().getMessage())
        is_long = len(text) > _LONGEST_MESSAGE and not self.name.startswith("soteria")
        return text[:_LONGEST_MESSAGE] + "…" if is_long else text


@contextmanager
def safe_terminal() -> Iterator[None]:
    """While the block runs, what is printed, logged and warned of is shown escaped; messages are one line each."""
    before = sys.stdout, sys.stderr, logging.getLogRecordFactory(), warnings.formatwarning
    sys.stdout, sys.stderr = _Escaping(sys.stdout, with_bars=False), _Escaping(sys.stderr, with_bars=True)
    logging.setLogRecordFactory(_OneLine)
    warnings.formatwarning = lambda message, *_, **__: f"warning: {one_line(message)}\n"
    try:
        yield
    finally:
        sys.stdout, sys.stderr, factory, warnings.formatwarning = before
        logging.setLogRecordFactory(factory)
