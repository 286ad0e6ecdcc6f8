"""The exception for errors that a user can fix, and how the exceptions of other libraries are put into a sentence."""

import re
import traceback

from soteria.terminal import one_line

# A failure inside these is one of the model, or of the library's version, and not of this project.
MODEL_LIBRARIES = ("transformers", "peft", "accelerate", "tokenizers", "safetensors")
LONGEST = 300  # characters of another library's message
SAY_ENOUGH = (OSError, ValueError, ImportError, RuntimeError)  # without their kind


class UserError(Exception):
    """Bad input. Scripts print the message to stderr, without a traceback, and exit with status 2 (`cli.run`)."""


def said(error: BaseException) -> str:
    """What an exception says: on one line, cut to LONGEST, with its kind where that is needed."""
    text = one_line(error)
    if not text or type(error) not in SAY_ENOUGH:
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return text if len(text) <= LONGEST else text[: LONGEST - 2] + " …"


def explain(error: Exception) -> str | None:
    """One sentence on a failure inside a library for models, naming the model's class; None for any other failure."""
    inside = [
        frame
        for frame, _ in traceback.walk_tb(error.__traceback__)
        if frame.f_globals.get("__name__", "").partition(".")[0] in MODEL_LIBRARIES
    ]
    if not inside:
        return None
    owners = [type(frame.f_locals["self"]) for frame in inside if "self" in frame.f_locals]
    named = [owner.__name__ for owner in owners if owner.__module__.startswith("transformers.models.")]
    library = inside[-1].f_globals["__name__"].partition(".")[0]
    if "out of memory" in str(error).lower() or isinstance(error, MemoryError):
        fix = "free some memory, or use a smaller model, --dtype or batch"
    else:
        fix = "the model's files may not fit its architecture, or this version of the library: try another model"
    return f"{named[0] if named else 'a model'} failed inside {library} ({said(error)}); {fix}"


def form_of(reply: str, secret: str = "") -> str:
    """A reply's form for people to read: its beginning, without runs of characters that may be a key."""
    reply = reply.replace(secret, "…") if secret else reply
    return repr(re.sub(r"[\w+/=.~-]{16,}", "…", " ".join(reply.split()), flags=re.ASCII)[:100])
