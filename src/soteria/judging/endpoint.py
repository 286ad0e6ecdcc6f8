"""A judge behind an OpenAI-compatible endpoint. In: rows. Out: a verdict for each."""

import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import closing

from soteria.errors import UserError, form_of
from soteria.judging.interface import (
    BLANK_ANSWER,
    CONTENT_FILTER,
    EMPTY,
    FAILED,
    NEITHER_LABEL,
    Row,
    unjudged,
)
from soteria.judging.presets import JudgeSettings
from soteria.models.endpoint import BROKEN_END, Call, Endpoint, Outcome, is_filtered, text_of

ONLY_THINKING, REFUSED_TO_JUDGE = "thinking without a reply", "the judge declined"
PROBE = ("What is two and two?", "Four.")  # a question and an answer that nobody forbids

_log = logging.getLogger(__name__)


class EndpointJudge:
    """A model behind an endpoint, asked for verdicts."""

    def __init__(self, model: str, concurrency: int, settings: JudgeSettings, time_limit: float):
        self.description, self.settings = f"openai:{model}{settings.described}", settings.of_format("label")
        if self.settings.form.guidelines:
            raise UserError(f"{self.settings.format} needs a model on this machine; give hf:<model>")
        options = {"temperature": settings.temperature, "max_tokens": settings.max_tokens}
        self.options = {name: value for name, value in options.items() if value is not None}
        self.unread = ""
        self.endpoint = Endpoint(self.description, model, concurrency, time_limit)

    def judge(self, rows: Iterable[Row]) -> Iterator[tuple[int, str]]:
        """As `Judge.judge`, and raises UserError as `Endpoint.ask`. Rows whose calls failed come last."""
        reasons, n_failed = Counter(), 0  # why rows have no verdict
        blank = Outcome(reason=BLANK_ANSWER)
        calls = ((row, self._call(question, answer) if answer.strip() else blank) for row, question, answer in rows)
        with closing(self.endpoint.ask(calls, self._call(*PROBE))) as asked:
            for row, outcome in asked:
                if outcome.value is None and outcome is not blank:
                    self.unread = form_of(outcome.said, self.endpoint.key) if outcome.said else self.unread
                    reasons[CONTENT_FILTER if outcome.filtered else outcome.reason] += 1
                    n_failed += outcome.failed
                yield row, _verdict(outcome)
        if reasons:
            named = ", ".join(f"{n} × {reason}" for reason, n in reasons.most_common())
            again = f"; the same command asks {n_failed} of them again" if n_failed else ""
            _log.warning("%s: %d rows without a verdict (%s)%s", self.description, reasons.total(), named, again)

    def _call(self, question: str, answer: str) -> Call:
        return Call(({"messages": self.settings.messages(question, answer)},), self._read, self.options)

    def _read(self, reply: dict) -> Outcome:
        choice = reply["choices"][0]
        if is_filtered(choice):
            return Outcome(filtered=True, said=text_of((choice.get("message") or {}).get("content")))
        if BROKEN_END.search(str(choice.get("finish_reason")).casefold()):
            raise ValueError("the reply broke off")
        message = choice["message"]
        text = text_of(message.get("content"))
        if verdict := self.settings.form.read(text):
            return Outcome(verdict)
        thought = not text.strip() and (message.get("reasoning_content") or message.get("reasoning"))
        without = ONLY_THINKING if thought else REFUSED_TO_JUDGE if message.get("refusal") else NEITHER_LABEL
        return Outcome(reason="cut off" if choice.get("finish_reason") == "length" else without, said=text)


def _verdict(outcome: Outcome) -> str:
    reason = CONTENT_FILTER if outcome.filtered else outcome.reason
    return outcome.value or unjudged(reason, FAILED if outcome.failed else EMPTY)
