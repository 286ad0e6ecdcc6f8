"""A model behind an OpenAI-compatible endpoint, asked for many rows at once.

In: calls and the standard environment variables (Azure's included), which the openai client reads; it also retries with
backoff and honors Retry-After. Out: what was read of the reply to each call, or why nothing was.
"""

import asyncio
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import suppress
from dataclasses import dataclass, field
from urllib.parse import urlsplit
from urllib.request import getproxies

import openai
from anyio.from_thread import start_blocking_portal

from soteria.errors import UserError, form_of
from soteria.storage.csv_files import is_text

TIME_LIMIT_S = 60.0  # per request
MOST_ADDRESS = 2_000  # characters
MAX_RETRIES = 6  # by the client: after 408, 409, 429, 5xx and lost connections
MOST_REPLY = 2**24  # characters, more than any answer has
BROKEN_REPLIES = 4  # replies that are not JSON or not of the right shape, before a row counts as failed
LEAST_FAILURES = 32  # consecutive failed rows that end a run: the endpoint is down, and no row would fare better
PASSING = (402, 408, 409, 425, 429)  # statuses that say nothing of the row, like 500 and above
# What endpoints say where a filter blocked a row, and how a choice ends that it blocked, or that broke off.
FILTER = re.compile(
    r"content.?filter(?!_(?:result|offset))|responsibleaipolicy|block_?reason|['\"]filtered['\"]: true|flagged"
    r"|content_policy_violation|moderation_blocked|data_?inspection_?failed|content exists risk"
)
FILTERED_END = re.compile(r"content.?filter|safety|sensitive|blocklist|prohibited|spii|recitation|guardrail|refusal")
BROKEN_END = re.compile(r"error|abort|cancel")
NO_CHOICE = "no choice in the reply"
BROKEN, NO_CONNECTION = "broken reply", "no connection"
HINTS = {
    BROKEN: "its address mostly ends in /v1",
    NO_CONNECTION: "check its address and the proxy variables, such as HTTPS_PROXY and NO_PROXY",
}
NO_SUCH = (401, 404, 405, 410)  # statuses that every row would get
REFUSED = "status 403"  # a bad key, or what a moderating proxy says of one row
NO_REDIRECT = {"follow_redirects": False}  # which would make a GET of a POST, or show the rows to another host
CHAT, COMPLETIONS = "/chat/completions", "/completions"


@dataclass(frozen=True)
class Outcome:
    """What a call came to: what was read of its reply, or the `reason` why nothing was.

    `filtered`: a content filter blocked it. `failed`: it got no reply despite retries, and is worth asking again.
    `said` is what the endpoint said, which may quote the key.
    """

    value: str | None = None
    reason: str = ""
    filtered: bool = False
    failed: bool = False
    said: str = ""


@dataclass(frozen=True)
class Call:
    """What is asked: `bodies` are the same in several forms, of which the endpoint gets the first that it takes.

    `read` makes an outcome of a reply. One without a value is asked for once more; KeyError and its like mean that the
    reply is broken. `options` are left out where the endpoint refuses them by name.
    """

    bodies: tuple[dict, ...]
    read: Callable[[dict], Outcome]
    options: dict = field(default_factory=dict)


class Endpoint:
    """An OpenAI-compatible endpoint. Its replies may quote the key: only `form_of` them is to be shown."""

    def __init__(self, description: str, model: str, concurrency: int, time_limit: float, path: str = CHAT):
        """`concurrency` calls at once, each with `time_limit` seconds for a reply.

        Raises UserError for variables that lead to no endpoint, without asking any.
        """
        if not is_text(model):
            raise UserError(f"the model's name {model!r} is not UTF-8 text; give the name that the endpoint knows")
        self.description, self.model, self.path = description, model, path
        self.concurrency, self.time_limit = concurrency, time_limit
        self._names: dict[str, str | None] = {}  # other names of options, None for those that are refused
        self._form = 0  # of the bodies, the one that is taken
        self._wait = ""  # what it says of when to ask again
        self._is_reached = False
        client = self._client()
        token = getattr(client, "_azure_ad_token", None)
        self.key = token if token is not None else client.api_key
        if not self.key.isascii() or not self.key.isprintable() or " " in self.key or not self.key:
            raise UserError("the endpoint's key is empty or has characters no key has; set it again")
        self.host = client.base_url.host + (f":{client.base_url.port}" if client.base_url.port else "")

    def _client(self) -> openai.AsyncOpenAI:
        azure = "AZURE_OPENAI_ENDPOINT" if os.environ.get("AZURE_OPENAI_ENDPOINT") else None
        name = azure or "OPENAI_BASE_URL"
        address = os.environ.get(name) or "https://default"
        if not re.fullmatch(r"https?://[^/\s]\S*", address) or not _is_address(address):
            raise UserError(f"{name} is not an address; give one line that begins with http:// or https://")
        for kind, proxy in getproxies().items():
            if kind != "no" and not _is_address(proxy):
                raise UserError(f"the proxy variable {kind.upper()}_PROXY is not an address; set it again")
        try:
            client = openai.AsyncAzureOpenAI if azure else openai.AsyncOpenAI
            made = client(timeout=self.time_limit, max_retries=MAX_RETRIES)
        except openai.OpenAIError:
            raise UserError(
                "the endpoint needs a key; set OPENAI_API_KEY, or for Azure AZURE_OPENAI_API_KEY or "
                "AZURE_OPENAI_AD_TOKEN"
            ) from None
        except ImportError:
            raise UserError(
                "the endpoint is behind a SOCKS proxy; set HTTPS_PROXY and ALL_PROXY to an HTTP one, or install socksio"
            ) from None
        except ValueError:
            lacks = azure and not os.environ.get("OPENAI_API_VERSION")
            what = "OPENAI_API_VERSION" if lacks else f"{name} and the proxy variables (HTTPS_PROXY, ALL_PROXY)"
            raise UserError(f"the endpoint cannot be reached as the variables are set; set {what}") from None
        except OSError as error:
            raise UserError(
                f"the certificates for the endpoint cannot be read ({error.strerror}); set SSL_CERT_FILE again"
            ) from None
        keys = ("authorization", "api-key")  # which are checked by themselves
        told = [value for name, value in made.default_headers.items() if name.lower() not in keys]
        if not all(value.isascii() and value.isprintable() for value in told if isinstance(value, str)):
            raise UserError(
                "the endpoint cannot be sent what the variables say; set OPENAI_ORG_ID, OPENAI_PROJECT_ID and "
                "OPENAI_CUSTOM_HEADERS again, in ASCII"
            )
        return made

    def ask(self, calls: Iterable[tuple[int, Call | Outcome]], probe: Call) -> Iterator[tuple[int, Outcome]]:
        """(row, outcome) in any order; a row that comes with an outcome has it. Calls are read as they are needed.

        Rows whose calls failed come last, so that an interrupted run asks them again. `probe`, which nobody forbids,
        tells a bad key from forbidden rows.
        Raises UserError if the endpoint refuses the key or the model, fails for many rows in a row, or for all.
        """
        reasons: Counter[str] = Counter()  # why rows have nothing
        failed: list[tuple[int, Outcome]] = []
        refused: list[tuple[int, Outcome]] = []  # since a row got through
        n_through = failures_in_a_row = 0
        pending: dict[Future, int] = {}

        def finished(most_left: int) -> Iterator[tuple[int, Outcome]]:
            nonlocal failures_in_a_row, n_through
            while len(pending) > most_left:
                for future in wait(pending, return_when=FIRST_COMPLETED).done:
                    row, outcome = pending.pop(future), future.result()
                    reasons.update(filter(None, [outcome.reason]))
                    if outcome.failed:
                        failed.append((row, outcome))
                        failures_in_a_row += 1
                        if failures_in_a_row >= max(LEAST_FAILURES, 2 * self.concurrency):
                            raise UserError(self._failure(f"for {failures_in_a_row} rows in a row", reasons))
                    elif outcome.reason == REFUSED:
                        refused.append((row, outcome))
                    else:
                        n_through, failures_in_a_row = n_through + 1, 0
                        yield from refused
                        refused.clear()
                        yield row, outcome

        # The event loop has a thread of its own, so that this also works in a notebook, which already runs a loop.
        with start_blocking_portal() as portal:
            client = self._client()
            try:
                for row, call in calls:
                    if isinstance(call, Call):
                        pending[portal.start_task_soon(self._ask, client, call)] = row
                        yield from finished(self.concurrency - 1)
                    else:
                        yield row, call
                yield from finished(0)
                # Is it the key, or these rows?
                asks_why = refused and (not n_through or len(refused) >= LEAST_FAILURES)
                if asks_why and portal.call(self._ask, client, probe).reason == REFUSED:
                    raise UserError(self._refusal(REFUSED))
            finally:
                for future in pending:
                    future.cancel()
                portal.call(client.close)
        if failed and not n_through:
            raise UserError(self._failure(f"for all {len(failed)} rows", reasons))
        yield from refused
        yield from failed

    def _refusal(self, reason: str) -> str:
        """The sentence for an endpoint that takes no row."""
        return (
            f"{self.description}: the endpoint replied with {reason}; check its key, its address (mostly one that ends "
            "in /v1), its quota and the model's name, and run the same command again, as what it gave so far is kept"
        )

    def _failure(self, rows: str, reasons: Counter[str]) -> str:
        """The sentence for an endpoint that is down."""
        reason = reasons.most_common(1)[0][0]
        hint = HINTS.get(reason) or (self._wait and f"its reply says {self._wait}")
        return (
            f"{self.description}: the endpoint failed {rows} ({reason}{f'; {hint}' if hint else ''}); what it gave so "
            "far is kept, so run the same command again once it is back"
        )

    async def _ask(self, client: openai.AsyncOpenAI, call: Call) -> Outcome:
        names, form = self._names, self._form
        n_broken = n_without = 0
        while True:
            failed, filtered, reason, said, reply = False, False, "", "", None
            options = {name: value for own, value in call.options.items() if (name := names.get(own, own))}
            try:
                # The client's limit is for each wait on the network; this one is for a whole call with its retries.
                async with asyncio.timeout(self.time_limit * (MAX_RETRIES + 1)):
                    body = {"model": self.model} | call.bodies[form] | options
                    # `client.chat.completions.create` without its type checks, which take a third of the time.
                    reply = _completion(await client.post(self.path, cast_to=str, body=body, options=NO_REDIRECT))
                self._is_reached = True
                outcome = call.read(reply)
            except openai.APIStatusError as error:
                self._is_reached = True
                whole = f"{error.code} {error.param} {error.body}".casefold()
                reason, said = f"status {error.status_code}", str(error.body or "")
                is_malformed = error.status_code in (400, 422)
                if error.status_code < 400:
                    raise UserError(self._refusal(f"{reason}, a redirect, which is not followed")) from None
                if error.status_code in NO_SUCH or "insufficient_quota" in whole:
                    raise UserError(self._refusal(reason)) from None
                if wait := error.response.headers.get("retry-after"):
                    self._wait = form_of(f"Retry-After: {wait}", self.key)
                if error.status_code in PASSING or error.status_code >= 500:
                    failed = True
                elif FILTER.search(whole):
                    filtered = True
                elif is_malformed and (refused := _refused(options, whole)):
                    called = {own: names.get(own, own) for own in call.options}
                    names = names | {own: refused[name] for own, name in called.items() if name in refused}
                    continue
                elif is_malformed and form + 1 < len(call.bodies):
                    form += 1
                    continue
            except (openai.APITimeoutError, TimeoutError):
                reason, failed = "time limit", True
            except openai.APIConnectionError as error:
                reason, failed = NO_CONNECTION, True
                # Of an address where nobody listens, or with a bad certificate, no row would fare better.
                if not self._is_reached and type(error.__cause__).__name__ == "ConnectError":
                    why = form_of(str(error.__cause__), self.key)
                    raise UserError(self._failure(f"from the start, with {why}", Counter([reason]))) from None
            except (openai.OpenAIError, ValueError, LookupError, AttributeError, TypeError, RecursionError):
                n_broken += 1
                if FILTER.search(str(reply).casefold()):
                    filtered = True
                elif n_broken < BROKEN_REPLIES:
                    await asyncio.sleep(0.1 * 2**n_broken)
                    continue
                elif isinstance(reply, dict) and reply.get("choices", True) in ([], None):
                    reason = NO_CHOICE
                else:
                    reason, failed = BROKEN, True
            else:
                self._names, self._form = names, form  # those that the model takes
                n_without += outcome.value is None
                if n_without == 1 and outcome.value is None and not outcome.filtered:
                    continue
                return outcome
            return Outcome(
                reason="" if filtered else reason, filtered=filtered, failed=failed, said=f"{reason}, {said}"
            )

    def version(self) -> str | None:
        """The server's version where it tells it at /version, as vLLM does."""

        async def ask(client: openai.AsyncOpenAI) -> object:
            address = str(client.base_url).rstrip("/").removesuffix("/v1") + "/version"
            return await client.get(address, cast_to=object, options={"max_retries": 0, "timeout": 10})

        with start_blocking_portal() as portal:
            client = self._client()
            try:
                told = portal.call(ask, client)
            except (openai.OpenAIError, ValueError):
                told = None
            finally:
                portal.call(client.close)
        version = told.get("version") if isinstance(told, dict) else None
        return version if isinstance(version, str) else None


def _is_address(address: str) -> bool:
    """Whether an address, with or without its http://, has a host, a port that there is, and no control characters."""
    with suppress(ValueError):
        parts = urlsplit(address if "://" in address else f"http://{address}")
        return bool(parts.hostname) and parts.port != 0 and address.isprintable() and len(address) <= MOST_ADDRESS
    return False


def _completion(reply: str) -> dict:
    """What a reply holds, whatever type it is sent as: JSON, or an event stream, whose pieces are put together.

    Raises ValueError for one that is neither, and for one that would take minutes to read.
    """
    if len(reply) > MOST_REPLY:
        raise ValueError("the reply is too long")
    reply = reply.removeprefix("\ufeff")
    events = [line[5:].strip() for line in reply.split("\n") if line.startswith("data:")]
    if not events:
        return json.loads(reply)
    message, finish = {}, None
    for chunk in map(json.loads, filter(lambda event: event != "[DONE]", events)):
        if chunk.get("error"):
            return chunk
        for choice in chunk.get("choices") or []:
            if not choice.get("index"):
                finish = choice.get("finish_reason") or finish
                for name, piece in (choice.get("delta") or choice.get("message") or {}).items():
                    if isinstance(piece, str):
                        message[name] = message.get(name, "") + piece
    if finish is None and events[-1] != "[DONE]":
        raise ValueError("the stream broke off")
    return {"choices": [{"finish_reason": finish, "message": message}]}


def is_filtered(choice: dict) -> bool:
    """Whether a content filter ended a choice."""
    return bool(FILTERED_END.search(str(choice.get("finish_reason")).casefold()))


def text_of(content: str | list | None) -> str:
    """A message's text; of a list of parts, those that are text, and not those that are thinking."""
    if isinstance(content, list):
        parts = [{"type": "text", "text": part} if isinstance(part, str) else part for part in content]
        return "\n".join(part["text"] for part in parts if part.get("type", "text") in ("text", "output_text"))
    return content or ""


def _refused(options: dict, said: str) -> dict[str, str | None]:
    """The options that an endpoint's refusal names, each with its other name, or None.

    Reasoning models have another name for the limit.
    """
    refused: dict[str, str | None] = {name: None for name in options if name in said}
    if "max_tokens" in refused and "max_completion_tokens" in said:
        refused["max_tokens"] = "max_completion_tokens"
    return refused
