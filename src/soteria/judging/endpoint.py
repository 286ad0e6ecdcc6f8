"""A judge behind an OpenAI-compatible endpoint, asked for many rows at once.

In: rows and the standard environment variables (Azure's included), which the openai client reads; it also retries with
backoff and honors Retry-After. Out: a verdict for each row.
"""

import asyncio
import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait

import openai
from anyio.from_thread import start_blocking_portal

from soteria.errors import UserError
from soteria.judging.interface import EMPTY, Row, fill_prompt, read_label

TIME_LIMIT_S = 60.0  # per request
MAX_RETRIES = 6  # by the client: after 408, 409, 429, 5xx and lost connections
BROKEN_REPLIES = 4  # replies that are not JSON or not of the right shape, before a row counts as failed
LEAST_FAILURES = 32  # consecutive failed rows that end a run: the endpoint is down, and no row would fare better

_log = logging.getLogger(__name__)


class EndpointJudge:
    """Any OpenAI-compatible endpoint. Its replies, which may quote the key, are never raised or logged."""

    def __init__(self, model: str, concurrency: int, judge_prompt: str, time_limit: float):
        self.description, self.model = f"openai:{model}", model
        self.concurrency, self.judge_prompt, self.time_limit = concurrency, judge_prompt, time_limit
        self.options: dict = {"temperature": 0}
        self.reasons: Counter[str] = Counter()  # why rows have no verdict
        key = self._client().api_key
        if isinstance(key, str) and (not key.isascii() or not key.isprintable() or " " in key or not key):
            raise UserError("the key for the judge's endpoint is empty or has characters no key has; set it again")

    def _client(self) -> openai.AsyncOpenAI:
        client = openai.AsyncAzureOpenAI if os.environ.get("AZURE_OPENAI_ENDPOINT") else openai.AsyncOpenAI
        try:
            return client(timeout=self.time_limit, max_retries=MAX_RETRIES)
        except openai.OpenAIError:
            raise UserError(
                "the judge's endpoint needs a key; set OPENAI_API_KEY (or the AZURE_OPENAI_… variables)"
            ) from None

    def judge(self, rows: Iterable[Row]) -> Iterator[tuple[int, str]]:
        """As `Judge.judge`. Rows whose calls failed come last, so that an interrupted run asks them again.

        Raises UserError if the endpoint refuses the key or the model, or fails for many rows in a row.
        """
        failed: list[int] = []
        failures_in_a_row = 0
        pending: dict[Future, int] = {}
        self.reasons.clear()

        def finished(most_left: int) -> Iterator[tuple[int, str]]:
            nonlocal failures_in_a_row
            while len(pending) > most_left:
                for future in wait(pending, return_when=FIRST_COMPLETED).done:
                    row, verdict = pending.pop(future), future.result()
                    if verdict is not None:
                        failures_in_a_row = 0
                        yield row, verdict
                        continue
                    failed.append(row)
                    failures_in_a_row += 1
                    if failures_in_a_row >= max(LEAST_FAILURES, 2 * self.concurrency):
                        raise UserError(
                            f"{self.description}: the endpoint failed for {failures_in_a_row} rows in a row "
                            f"({self.reasons.most_common(1)[0][0]}); the verdicts so far are kept, so run the same "
                            "command again once it is back"
                        )

        # The event loop has a thread of its own, so that this also works in a notebook, which already runs a loop.
        with start_blocking_portal() as portal:
            client = self._client()
            try:
                for row, question, answer in rows:
                    if answer.strip():
                        pending[portal.start_task_soon(self._ask, client, question, answer)] = row
                        yield from finished(self.concurrency - 1)
                    else:
                        yield row, EMPTY
                yield from finished(0)
            finally:
                for future in pending:
                    future.cancel()
                portal.call(client.close)
        if self.reasons:
            reasons = ", ".join(f"{n} × {reason}" for reason, n in self.reasons.most_common())
            _log.warning("%s: %d rows without a verdict (%s)", self.description, self.reasons.total(), reasons)
        yield from ((row, EMPTY) for row in failed)

    async def _ask(self, client: openai.AsyncOpenAI, question: str, answer: str) -> str | None:
        """A verdict; EMPTY if the endpoint replies without one; None if it fails despite all retries."""
        message = {"role": "user", "content": fill_prompt(self.judge_prompt, question, answer)}
        n_broken = n_unlabeled = 0
        while True:
            options, verdict = self.options, None
            try:
                # The client's limit is for each wait on the network; this one is for a whole call with its retries.
                async with asyncio.timeout(self.time_limit * (MAX_RETRIES + 1)):
                    body = {"model": self.model, "messages": [message]} | options
                    # `client.chat.completions.create` without its type checks, which take a third of the time.
                    reply = await client.post("/chat/completions", cast_to=object, body=body)
                label = read_label(reply["choices"][0]["message"]["content"] or "")
            except openai.APIStatusError as error:
                reason = f"status {error.status_code}"
                if error.status_code in (401, 403, 404):
                    raise UserError(
                        f"{self.description}: the endpoint replied with {reason}; "
                        "check its key, its address and the model's name"
                    ) from None
                if error.status_code in (400, 422):
                    if error.param in options:  # reasoning models do not take a temperature
                        self.options = {}
                        continue
                    verdict = EMPTY
            except (openai.APITimeoutError, TimeoutError):
                reason = "time limit"
            except openai.APIConnectionError:
                reason = "no connection"
            except (openai.OpenAIError, ValueError, KeyError, AttributeError, IndexError, TypeError):
                n_broken += 1
                if n_broken < BROKEN_REPLIES:
                    await asyncio.sleep(0.1 * 2**n_broken)
                    continue
                reason = "broken reply"
            else:
                if label:
                    return label
                n_unlabeled += 1
                if n_unlabeled < 2:
                    continue
                reason, verdict = "neither label", EMPTY
            self.reasons[reason] += 1
            return verdict
