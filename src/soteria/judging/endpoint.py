"""A judge behind an OpenAI-compatible endpoint, asked for many rows at once.

In: rows and the standard environment variables (Azure's included), which the openai client reads; it also retries with
backoff and honors Retry-After. Out: a verdict for each row.
"""

import asyncio
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait

import openai
from anyio.from_thread import start_blocking_portal

from soteria.errors import UserError
from soteria.judging.interface import (
    BLANK_ANSWER,
    CONTENT_FILTER,
    EMPTY,
    FAILED,
    NEITHER_LABEL,
    Row,
    form_of,
    reason_of,
    unjudged,
)
from soteria.judging.presets import JudgeSettings

TIME_LIMIT_S = 60.0  # per request
MAX_RETRIES = 6  # by the client: after 408, 409, 429, 5xx and lost connections
BROKEN_REPLIES = 4  # replies that are not JSON or not of the right shape, before a row counts as failed
LEAST_FAILURES = 32  # consecutive failed rows that end a run: the endpoint is down, and no row would fare better
PASSING = (402, 408, 409, 425, 429)  # statuses that say nothing of the row, like 500 and above
ONLY_THINKING, REFUSED_TO_JUDGE = "thinking without a reply", "the judge declined"
PROBE = ("What is two and two?", "Four.")  # a question and an answer that nobody forbids
REFUSED = "status 403"  # a bad key, or what a moderating proxy says of one row

_log = logging.getLogger(__name__)


class EndpointJudge:
    """Any OpenAI-compatible endpoint. Of its replies, which may quote the key, only `form_of` is shown."""

    def __init__(self, model: str, concurrency: int, settings: JudgeSettings, time_limit: float):
        self.description, self.model = f"openai:{model}{settings.described}", model
        self.concurrency, self.settings, self.time_limit = concurrency, settings.of_format("label"), time_limit
        if self.settings.form.guidelines:
            raise UserError(f"{self.settings.format} needs a model on this machine; give hf:<model>")
        options = {"temperature": settings.temperature, "max_tokens": settings.max_tokens}
        self.options = {name: value for name, value in options.items() if value is not None}
        self.unread = ""
        client = self._client()
        token = getattr(client, "_azure_ad_token", None)
        self.key = token if token is not None else client.api_key
        if not self.key.isascii() or not self.key.isprintable() or " " in self.key or not self.key:
            raise UserError("the key for the judge's endpoint is empty or has characters no key has; set it again")

    def _client(self) -> openai.AsyncOpenAI:
        """Raises UserError for variables that lead to no endpoint, without asking any."""
        azure = "AZURE_OPENAI_ENDPOINT" if os.environ.get("AZURE_OPENAI_ENDPOINT") else None
        name = azure or "OPENAI_BASE_URL"
        if not re.match(r"https?://[^/\s]", os.environ.get(name) or "https://default"):
            raise UserError(f"{name} is not an address; give one that begins with http:// or https://")
        try:
            client = openai.AsyncAzureOpenAI if azure else openai.AsyncOpenAI
            return client(timeout=self.time_limit, max_retries=MAX_RETRIES)
        except openai.OpenAIError:
            raise UserError(
                "the judge's endpoint needs a key; set OPENAI_API_KEY, or for Azure AZURE_OPENAI_API_KEY or "
                "AZURE_OPENAI_AD_TOKEN"
            ) from None
        except ImportError:
            raise UserError(
                "the judge's endpoint is behind a SOCKS proxy; set HTTPS_PROXY and ALL_PROXY to an HTTP one, "
                "or install socksio"
            ) from None
        except ValueError:
            lacks = azure and not os.environ.get("OPENAI_API_VERSION")
            what = "OPENAI_API_VERSION" if lacks else f"{name} and the proxy variables (HTTPS_PROXY, ALL_PROXY)"
            raise UserError(f"the judge's endpoint cannot be reached as the variables are set; set {what}") from None

    def judge(self, rows: Iterable[Row]) -> Iterator[tuple[int, str]]:
        """As `Judge.judge`. Rows whose calls failed come last, so that an interrupted run asks them again.

        Raises UserError if the endpoint refuses the key or the model, fails for many rows in a row, or for all.
        """
        reasons: Counter[str] = Counter()  # why rows have no verdict
        failed: list[tuple[int, str]] = []
        refused: list[int] = []  # since a row got through
        n_through = failures_in_a_row = 0
        pending: dict[Future, int] = {}

        def finished(most_left: int) -> Iterator[tuple[int, str]]:
            nonlocal failures_in_a_row, n_through
            while len(pending) > most_left:
                for future in wait(pending, return_when=FIRST_COMPLETED).done:
                    row, verdict = pending.pop(future), future.result()
                    reasons.update(filter(None, [reason_of(verdict)]))
                    if verdict.startswith(FAILED):
                        failed.append((row, verdict))
                        failures_in_a_row += 1
                        if failures_in_a_row >= max(LEAST_FAILURES, 2 * self.concurrency):
                            raise UserError(self._failure(f"for {failures_in_a_row} rows in a row", reasons))
                    elif reason_of(verdict) == REFUSED:
                        refused.append(row)
                    else:
                        n_through, failures_in_a_row = n_through + 1, 0
                        yield from ((each, unjudged(REFUSED)) for each in refused)
                        refused.clear()
                        yield row, verdict

        # The event loop has a thread of its own, so that this also works in a notebook, which already runs a loop.
        with start_blocking_portal() as portal:
            client = self._client()
            try:
                for row, question, answer in rows:
                    if answer.strip():
                        pending[portal.start_task_soon(self._ask, client, question, answer)] = row
                        yield from finished(self.concurrency - 1)
                    else:
                        yield row, unjudged(BLANK_ANSWER)
                yield from finished(0)
                if refused and (not n_through or len(refused) >= LEAST_FAILURES):
                    probe = portal.call(self._ask, client, *PROBE)  # is it the key, or these rows?
                    if probe == unjudged(REFUSED):
                        raise UserError(self._refusal(REFUSED))
            finally:
                for future in pending:
                    future.cancel()
                portal.call(client.close)
        if failed and not n_through:
            raise UserError(self._failure(f"for all {len(failed)} rows", reasons))
        if reasons:
            named = ", ".join(f"{n} × {reason}" for reason, n in reasons.most_common())
            again = f"; the same command asks {len(failed)} of them again" if failed else ""
            _log.warning("%s: %d rows without a verdict (%s)%s", self.description, reasons.total(), named, again)
        yield from ((row, unjudged(REFUSED)) for row in refused)
        yield from failed

    def _refusal(self, reason: str) -> str:
        """The sentence for an endpoint that takes no row."""
        return (
            f"{self.description}: the endpoint replied with {reason}; check its key, its address and the model's name"
        )

    def _failure(self, rows: str, reasons: Counter[str]) -> str:
        """The sentence for an endpoint that is down."""
        return (
            f"{self.description}: the endpoint failed {rows} ({reasons.most_common(1)[0][0]}); the verdicts so far are "
            "kept, so run the same command again once it is back"
        )

    async def _ask(self, client: openai.AsyncOpenAI, question: str, answer: str) -> str:
        """A verdict; `unjudged` if the endpoint replies without one, of the kind FAILED if it fails despite retries."""
        asked, options = self.settings.messages(question, answer), self.options
        n_broken = n_unlabeled = 0
        while True:
            kind = EMPTY
            try:
                # The client's limit is for each wait on the network; this one is for a whole call with its retries.
                async with asyncio.timeout(self.time_limit * (MAX_RETRIES + 1)):
                    body = {"model": self.model, "messages": asked} | options
                    # `client.chat.completions.create` without its type checks, which take a third of the time.
                    reply = await client.post("/chat/completions", cast_to=object, body=body)
                choice = reply["choices"][0]
                finish = choice.get("finish_reason")
                message = choice["message"] if finish != "content_filter" else choice.get("message") or {}
                text = _text(message.get("content"))
                verdict = self.settings.form.read(text) if finish != "content_filter" else None
            except openai.APIStatusError as error:
                said = f"{error.code} {error.param} {error.body}".casefold()
                reason = f"status {error.status_code}"
                self.unread = f"{reason}, {form_of(str(error.body or ''), self.key)}"
                if error.status_code in (401, 404):
                    raise UserError(self._refusal(reason)) from None
                if error.status_code in PASSING or error.status_code >= 500:
                    kind = FAILED
                elif re.search(r"content.?filter|responsibleaipolicy", said):
                    reason = CONTENT_FILTER
                elif error.status_code in (400, 422) and (fewer := _without_refused(options, said)) != options:
                    options = fewer
                    continue
            except (openai.APITimeoutError, TimeoutError):
                reason, kind = "time limit", FAILED
            except openai.APIConnectionError:
                reason, kind = "no connection", FAILED
            except (openai.OpenAIError, ValueError, KeyError, AttributeError, IndexError, TypeError):
                n_broken += 1
                if n_broken < BROKEN_REPLIES:
                    await asyncio.sleep(0.1 * 2**n_broken)
                    continue
                reason, kind = "broken reply", FAILED
            else:
                self.options = options  # those that the model takes
                if verdict:
                    return verdict
                n_unlabeled += 1
                if n_unlabeled < 2 and finish != "content_filter":
                    continue
                self.unread = form_of(text, self.key)
                thought = not text.strip() and (message.get("reasoning_content") or message.get("reasoning"))
                without = ONLY_THINKING if thought else REFUSED_TO_JUDGE if message.get("refusal") else NEITHER_LABEL
                reason = {"content_filter": CONTENT_FILTER, "length": "cut off"}.get(finish, without)
            return unjudged(reason, kind)


def _text(content: str | list | None) -> str:
    """A message's text; of a list of parts, those that are text, and not those that are thinking."""
    if isinstance(content, list):
        return "\n".join(part["text"] for part in content if part.get("type") in ("text", "output_text"))
    return content or ""


def _without_refused(options: dict, said: str) -> dict:
    """Options without those that an endpoint's refusal names. Reasoning models have another name for the limit."""
    kept = {name: value for name, value in options.items() if name not in said}
    if "max_tokens" in options and "max_tokens" not in kept and "max_completion_tokens" in said:
        kept["max_completion_tokens"] = options["max_tokens"]
    return kept
