"""What scripts print, log and warn of, as it reaches a terminal."""

import io
import logging
import sys
import warnings

from tqdm import tqdm

from soteria.terminal import escaped, one_line, safe_terminal

HOSTILE = "\x1b[31mred\x1b[2J\x07\x08\x9b1m\u202e\u2066\udc80\x7f"


def test_control_characters_are_escaped_and_letters_of_every_script_stay():
    assert escaped(HOSTILE).isascii() and escaped(HOSTILE).isprintable()
    for text in ("नमस्ते\u200d\u200c", "العربية\u200f", "a\tb\nc", "naïve – “quoted” → λ ≥ 0"):
        assert escaped(text) == text
    assert one_line("\x1b[1mLOAD REPORT\x1b[0m\n  a | b \r\n\n c\n") == "LOAD REPORT a | b c"


def test_whatever_is_printed_logged_or_warned_of_reaches_the_terminal_escaped(monkeypatch):
    out, err = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    with safe_terminal():
        print(f"{HOSTILE}: rows", "a\rb")
        print(HOSTILE, file=sys.stderr)
        logger = logging.getLogger("other")
        logger.propagate = False
        logger.addHandler(logging.StreamHandler())
        logger.warning("%s", "\x1b[33mfirst\nsecond\x1b[0m\n" + "third " * 1000)
        warned = warnings.formatwarning(UserWarning("a\n\x1bb"), UserWarning, "file.py", 1)
        for _ in tqdm(range(3), desc=HOSTILE, position=1):
            pass
    assert (sys.stdout, sys.stderr) == (out, err)
    shown = err.getvalue()
    assert "\r" not in out.getvalue() and "\x1b[A" in shown  # progress bars still work
    for text in (out.getvalue(), shown.replace("\x1b[A", "")):
        assert not set("\x1b\x07\x08\x9b\u202e\u2066\udc80\x7f") & set(text)
    assert "\nfirst second third" in shown and "third " * 100 not in shown
    assert warned == "warning: a \\x1bb\n"


def test_what_the_terminals_encoding_lacks_is_escaped(monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    with safe_terminal():
        print("50% – 100%", "हिन्दी"[:1])
    out.flush()
    assert out.buffer.getvalue() == b"50% \\u2013 100% \\u0939\n"
