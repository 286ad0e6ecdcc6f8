"""A judge behind an OpenAI-compatible endpoint: many calls at once, each with retries and a time limit.

Knows the openai client, which knows its environment variables (Azure's included), retries with backoff and honours
Retry-After; knows nothing of files.
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
from soteria.judging.interface import EMPTY, Row, fill, read_label

TIME_LIMIT_S = 60.0  # a request
MAX_RETRIES = 6  # by the client: after 408, 409, 429, 5xx and lost connections
BROKEN_REPLIES = 4  # replies that are no JSON, or not of the right shape, before a row counts as failed
LEAST_FAILURES = 32  # rows failed in a row that end a run: the endpoint is down, and no row would fare better
NO_KEY = "no key for the judge's endpoint; set OPENAI_API_KEY (or the AZURE_OPENAI_… ones)"

_log = logging.getLogger(__name__)


class EndpointJudge:
    """Any OpenAI-compatible endpoint. Nothing of what it replies, which may quote the key, is raised or logged."""

    def __init__(self, model: str, concurrency: int, judge_prompt: str, time_limit: float):
        self.description, self.model = f"openai:{model}", model
        self.concurrency, self.judge_prompt, self.time_limit = concurrency, judge_prompt, time_limit
        self.options: dict = {"temperature": 0}
        self.reasons: Counter[str] = Counter()  # why rows have no verdict
        key = self._client().api_key
        if isinstance(key, str) and (not key.isascii() or not key.isprintable() or " " in key or not key):
            raise UserError("the key for the judge's endpoint has characters that no key has; set it again")

    def _client(self) -> openai.AsyncOpenAI:
        client = openai.AsyncAzureOpenAI if os.environ.get("AZURE_OPENAI_ENDPOINT") else openai.AsyncOpenAI
        try:
            return client(timeout=self.time_limit, max_retries=MAX_RETRIES)
        except openai.OpenAIError:
            raise UserError(NO_KEY) from None

    def judge(self, rows: Iterable[Row]) -> Iterator[tuple[int, str]]:
        """As `Judge.judge`. Rows whose calls failed come last: a run that is interrupted asks them again.

        Raises UserError where the endpoint refuses the key or the model, or fails for many rows in a row.
        """
        failed: list[int] = []
        failures_in_a_row = 0
        pending: dict[Future, int] = {}
        self.reasons.clear()

        def finished() -> Iterator[tuple[int, str]]:
            nonlocal failures_in_a_row
            for future in wait(pending, return_when=FIRST_COMPLETED).done:
                row, verdict = pending.pop(future), future.result()
                if verdict is None:
                    failed.append(row)
                    failures_in_a_row += 1
                    self._check(failures_in_a_row)
                else:
                    failures_in_a_row = 0
                    yield row, verdict

        # The event loop has a thread of its own, so that this works in a notebook too, which runs a loop already.
        with start_blocking_portal() as portal:
            client = self._client()
            try:
                for row, question, answer in rows:
                    if not answer.strip():
                        yield row, EMPTY
                        continue
                    pending[portal.start_task_soon(self._ask, client, question, answer)] = row
                    if len(pending) >= self.concurrency:
                        yield from finished()
                while pending:
                    yield from finished()
            finally:
                for future in pending:
                    future.cancel()
                portal.call(client.close)
        if self.reasons:
            reasons = ", ".join(f"{n} × {reason}" for reason, n in self.reasons.most_common())
            _log.warning("%s: %d rows without a verdict (%s)", self.description, self.reasons.total(), reasons)
        for row in failed:
            yield row, EMPTY

    def _check(self, failures_in_a_row: int) -> None:
        if failures_in_a_row >= max(LEAST_FAILURES, 2 * self.concurrency):
            reason, _ = self.reasons.most_common(1)[0]
            raise UserError(
                f"{self.description}: the endpoint failed for {failures_in_a_row} rows in a row ({reason}); "
                "the verdicts so far are kept, so run the same command again once it is back"
            )

    async def _ask(self, client: openai.AsyncOpenAI, question: str, answer: str) -> str | None:
        """A verdict; EMPTY where the endpoint answers but gives none; None where it fails, in spite of all retries."""
        message = {"role": "user", "content": fill(self.judge_prompt, question, answer)}
        n_broken = n_unlabelled = 0
        while True:
            options = self.options
            try:
                # The client's limit is for each wait on the network; this one is for all of a call, retries included.
                async with asyncio.timeout(self.time_limit * (MAX_RETRIES + 1)):
                    body = {"model": self.model, "messages": [message]} | options
                    # As `client.chat.completions.create` does, but for the checks of types both ways, which take a
                    # third of the time.
                    reply = await client.post("/chat/completions", cast_to=object, body=body)
                label = read_label(reply["choices"][0]["message"]["content"] or "")
            except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError) as error:
                raise UserError(
                    f"{self.description}: the endpoint answers with status {error.status_code}; "
                    "check its key, its address and the model's name"
                ) from None
            except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
                if error.param in options:  # models that reason take no temperature
                    self.options = {}
                    continue
                self.reasons[f"status {error.status_code}"] += 1
                return EMPTY
            except openai.APIStatusError as error:
                self.reasons[f"status {error.status_code}"] += 1
                return None
            except (openai.APITimeoutError, TimeoutError):
                self.reasons["time limit"] += 1
                return None
            except openai.APIConnectionError:
                self.reasons["no connection"] += 1
                return None
            except (openai.OpenAIError, ValueError, KeyError, AttributeError, IndexError, TypeError):
                n_broken += 1
                if n_broken == BROKEN_REPLIES:
                    self.reasons["broken reply"] += 1
                    return None
                await asyncio.sleep(0.1 * 2**n_broken)
                continue
            if label:
                return label
            n_unlabelled += 1
            if n_unlabelled == 2:
                self.reasons["neither label"] += 1
                return EMPTY
