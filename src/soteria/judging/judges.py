"""The judge of a name: `refusal`, `openai:<model>` or `hf:<model>`, and what its verdicts depend on."""

import hashlib

from soteria.errors import UserError
from soteria.judging.interface import JUDGE_PROMPT, Judge
from soteria.judging.refusal import BASIS, RefusalJudge


def judge_basis(name: str, judge_prompt: str | None) -> str:
    """A hash of the judge's phrases and grammar, or of its prompt; verdicts made with others are not reused."""
    parts = [path.read_bytes() for path in BASIS] if name == "refusal" else [(judge_prompt or JUDGE_PROMPT).encode()]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def make_judge(
    name: str, *, concurrency: int = 16, judge_prompt: str | None = None, time_limit: float | None = None
) -> Judge:
    """The judge of a name. Raises UserError if there is none.

    An endpoint gets `concurrency` calls at once, each with `time_limit` seconds for a reply.
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
