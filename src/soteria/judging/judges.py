"""The judge of a name, and what its verdicts depend on."""

import hashlib
from pathlib import Path

from soteria.errors import UserError
from soteria.judging.interface import JUDGE_PROMPT, Judge
from soteria.judging.refusal import PHRASES, RefusalJudge


def judge_basis(name: str, judge_prompt: str | None) -> str:
    """A hash of what a judge goes by: its phrases or its prompt. Verdicts by anything else are not reused."""
    basis = PHRASES.read_text(encoding="utf-8") if name == "refusal" else judge_prompt or JUDGE_PROMPT
    return hashlib.sha256(basis.encode("utf-8")).hexdigest()


def make_judge(
    name: str, *, concurrency: int = 16, judge_prompt: str | None = None, time_limit: float | None = None
) -> Judge:
    """The judge of a name: `refusal`, `openai:<model>` or `hf:<model>`. Raises UserError for any other.

    `concurrency` is how many calls an endpoint gets at once, `time_limit` how many seconds each may take.
    """
    kind, _, model = name.partition(":")
    if name == "refusal":
        return RefusalJudge()
    if kind == "openai" and model:
        from soteria.judging.endpoint import TIME_LIMIT_S, EndpointJudge

        return EndpointJudge(model, concurrency, judge_prompt or JUDGE_PROMPT, time_limit or TIME_LIMIT_S)
    if kind == "hf" and model:
        from soteria.judging.local import LocalJudge

        return LocalJudge(model, judge_prompt)
    raise UserError(f"unknown judge {name!r}; give refusal, openai:<model> or hf:<model>")


def read_judge_prompt(path: Path) -> str:
    """A judge prompt with the places {question} and {answer}. Raises UserError where they are missing."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the judge prompt {path} ({error})") from None
    if "{question}" not in text or "{answer}" not in text:
        raise UserError(f"the judge prompt {path} needs the places {{question}} and {{answer}}")
    return text
