"""Engines that answer in place of our own decoding: any OpenAI-compatible server, or vLLM in this process.

In: prompts with their limits. Out: greedy answers by row, in any order. The prompts are the same, token for token: they
are sent as token ids, or the engine's count of their tokens is compared with our tokenizer's.
"""

import gc
import importlib.util
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from soteria.answering.decoding import end_tokens
from soteria.answering.thinking import opened_thinking, texts_of, thinking_tokens
from soteria.errors import UserError, form_of
from soteria.models.loading import LoadedModel
from soteria.storage.csv_files import is_text

OPENAI, VLLM = "openai", "vllm"
TIME_LIMIT_S = 600.0  # per request: a busy server lets it wait
LOST_ROWS = 16  # rows without one answer, after which a run stops: no row would fare better
PROBE = "What is two and two?"  # a question that nobody forbids
CHUNK = 256  # prompts that vLLM gets at once, and whose answers a kill may lose


@dataclass(frozen=True)
class Asked:
    """A prompt: its token ids, its text, its messages if a chat template makes it of them, and the most new tokens."""

    ids: list[int]
    text: str
    messages: list[dict] | None
    limit: int


class Engine(Protocol):
    """What answers. `name` is what answers depend on, beside the model."""

    name: str

    def answers(self, described: LoadedModel, asked: dict[int, Asked]) -> Iterator[dict[int, str]]:
        """Greedy answers as {row: answer}, as `generation.generate`. `described` has the model's tokenizer and configs.

        Raises UserError where the engine would read another prompt, or end answers elsewhere.
        """

    def facts(self) -> dict:
        """What is noted beside answers: the engine, its version, and where it is."""


def make_engine(name: str, model: str, concurrency: int) -> Engine:
    """The engine of a name: `openai`, `openai:<name on the server>` (default: the model's), or `vllm`.

    Raises UserError for other names, for variables that lead to no endpoint, and where vLLM is not installed.
    """
    kind, _, served = name.partition(":")
    if kind == OPENAI:
        engine = ServerEngine(served or model, concurrency)
        engine.endpoint()
        return engine
    if name == VLLM:
        if importlib.util.find_spec("vllm") is None:
            raise UserError("vLLM is not installed here; pip install vllm, or serve the model and give openai")
        return VllmEngine(model)
    raise UserError(f"unknown engine {name!r}; give openai, openai:<name on the server> or vllm")


@dataclass
class ServerEngine:
    """A model served under a name behind an OpenAI-compatible endpoint."""

    served: str
    concurrency: int

    @property
    def name(self) -> str:
        return f"{OPENAI}:{self.served}"

    def endpoint(self, path: str | None = None):
        from soteria.models.endpoint import COMPLETIONS, Endpoint

        return Endpoint(self.name, self.served, self.concurrency, TIME_LIMIT_S, path or COMPLETIONS)

    def answers(self, described: LoadedModel, asked: dict[int, Asked]) -> Iterator[dict[int, str]]:
        from soteria.models.endpoint import CHAT, COMPLETIONS, Call, Outcome

        chats = any(each.messages for each in asked.values())
        fixed = _sampling(described)
        if not chats and thinking_tokens(described.tokenizer):
            raise UserError(
                f"{described.name!r} marks its thinking by special tokens, which servers leave out of completions; "
                "ask it through its chat template, or with the engine vllm"
            )

        def call(row: int, each: Asked) -> Call:
            if chats:
                forms = ({"messages": each.messages} | _without_thinking(described),)
            else:
                forms = ({"prompt": each.ids}, {"prompt": each.text})  # some servers take only text
            body = fixed | {"max_tokens": each.limit}
            options = {name: body.pop(name) for name in ("max_tokens", "repetition_penalty") if name in body}
            return Call(tuple(body | form for form in forms), self._reader(row, each, described), options)

        form = {"messages": [{"role": "user", "content": PROBE}]} if chats else {"prompt": PROBE}
        probe = Call((form | {"max_tokens": 1},), lambda reply: Outcome(""))
        endpoint, lost, is_answered = self.endpoint(CHAT if chats else COMPLETIONS), [], False
        calls = ((row, call(row, each)) for row, each in asked.items())
        with closing(endpoint.ask(calls, probe)) as outcomes:
            for row, outcome in outcomes:
                if outcome.value is not None:
                    is_answered = True
                    yield {row: outcome.value}
                    continue
                lost.append(outcome)
                if len(lost) == LOST_ROWS and not is_answered:
                    break
        if lost:
            reasons = Counter("content filter" if each.filtered else each.reason for each in lost)
            said = next((f", such as {form_of(each.said, endpoint.key)}" for each in lost if each.said), "")
            raise UserError(
                f"{self.name}: {len(lost)} questions got no answer "
                f"({', '.join(f'{n} × {reason}' for reason, n in reasons.most_common())}){said}; "
                "the answers so far are kept, and the same command asks the others again"
            )

    def _reader(self, row: int, asked: Asked, described: LoadedModel):
        from soteria.models.endpoint import Outcome, is_filtered, text_of

        def read(reply: dict) -> Outcome:
            choice, usage = reply["choices"][0], reply.get("usage") or {}
            finish, n_new = choice.get("finish_reason"), usage.get("completion_tokens", 0)
            if is_filtered(choice):
                return Outcome(filtered=True)
            if usage.get("prompt_tokens") != len(asked.ids):
                raise UserError(
                    f"{self.name}: question {row} is {len(asked.ids)} tokens for the tokenizer of {described.name!r}, "
                    f"and {usage.get('prompt_tokens', 'an unknown number')} for the server; serve that model with its "
                    "own tokenizer and chat template"
                )
            if finish not in ("stop", "length"):
                return Outcome(reason=f"finish reason {finish}")
            if n_new > asked.limit or (finish == "length" and n_new < asked.limit):
                raise UserError(
                    f"{self.name}: the answer to question {row} was cut off at {n_new} tokens, not at {asked.limit}; "
                    "serve the model with a longer context, or give --max_new_tokens that the server keeps to"
                )
            message = choice["message"] if asked.messages else {}
            thought = message.get("reasoning_content") or message.get("reasoning")
            text = text_of(message["content"] if asked.messages else choice["text"])
            if not thought and thinking_tokens(described.tokenizer):
                return Outcome(reason="thinking and answer not told apart; serve the model with a reasoning parser")
            opened = f"<think>{thought}</think>" if thought else opened_thinking(described.tokenizer, [asked.ids])[0]
            answer = f"{opened}{text}".strip()
            return Outcome(answer) if is_text(answer) else Outcome(reason="half a character, a lone surrogate")

        return read

    def facts(self) -> dict:
        endpoint = self.endpoint()
        return {"engine": OPENAI, "model": self.served, "host": endpoint.host, "version": endpoint.version()}


def _sampling(described: LoadedModel) -> dict:
    """What a server is told so that it decodes greedily and ends where we do.

    Servers take from the generation config where answers end, and a penalty on repetition, which greedy decoding has
    not. They are told only what differs: not every server takes these.
    """
    config, told = described.model.generation_config, {"temperature": 0}
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    if end_tokens(described) - {*ends}:
        told["stop_token_ids"] = sorted(end_tokens(described))
    if (getattr(config, "repetition_penalty", None) or 1) != 1:
        told |= {"repetition_penalty": 1.0, "frequency_penalty": 0}
    return told


def _without_thinking(described: LoadedModel) -> dict:
    """The body's part that switches thinking off where the chat template can."""
    template = described.tokenizer.chat_template or ""
    return {"chat_template_kwargs": {"enable_thinking": False}} if "enable_thinking" in str(template) else {}


@dataclass
class VllmEngine:
    """vLLM in this process, by its offline interface. `adapter`: the folder of a LoRA of the model.

    Written after vLLM's documentation: https://docs.vllm.ai/en/latest/serving/offline_inference.html. Engines made of
    this one by `dataclasses.replace` share the model in memory, of which there is one.
    """

    model: str
    adapter: Path | None = None
    dtype: str = "auto"
    _held: dict = field(default_factory=dict)
    name = VLLM

    def _loaded(self):
        from vllm import LLM

        rank, of = _rank(self.adapter) if self.adapter else 0, (self.model, self.dtype)
        if self._held.get("of") != of or self._held["rank"] < rank:
            self._held.clear()  # the memory of the one before
            gc.collect()
            adapters = {"enable_lora": True, "max_lora_rank": rank} if rank else {}
            self._held |= {"of": of, "rank": rank, "model": LLM(model=self.model, dtype=self.dtype, **adapters)}
        return self._held["model"]

    def answers(self, described: LoadedModel, asked: dict[int, Asked]) -> Iterator[dict[int, str]]:
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt
        from vllm.lora.request import LoRARequest

        model, ends = self._loaded(), sorted(end_tokens(described))
        lora = LoRARequest(str(self.adapter), self._number(), str(self.adapter)) if self.adapter else None
        every = list(asked)
        for rows in (every[at : at + CHUNK] for at in range(0, len(every), CHUNK)):
            prompts = [TokensPrompt(prompt_token_ids=asked[row].ids) for row in rows]
            sampling = [
                SamplingParams(temperature=0.0, max_tokens=asked[row].limit, stop_token_ids=ends) for row in rows
            ]
            found = model.generate(prompts, sampling, use_tqdm=False, lora_request=lora)
            for row, output in zip(rows, found, strict=True):
                finish = output.outputs[0].finish_reason
                if list(output.prompt_token_ids) != asked[row].ids or finish not in ("stop", "length"):
                    raise UserError(f"vLLM did not answer question {row} as it was asked (finish reason {finish})")
            tokens = [list(output.outputs[0].token_ids) for output in found]
            texts = texts_of(described.tokenizer, [asked[row].ids for row in rows], tokens)
            yield {row: text.strip() for row, text in zip(rows, texts, strict=True)}

    def _number(self) -> int:
        """vLLM tells adapters apart by numbers from 1 on."""
        numbers = self._held.setdefault("numbers", {})
        return numbers.setdefault(self.adapter, len(numbers) + 1)

    def facts(self) -> dict:
        import vllm

        return {"engine": VLLM, "version": vllm.__version__}


def _rank(adapter: Path) -> int:
    from soteria.models.checkpoints import ADAPTER_CONFIG
    from soteria.storage.files import read_facts

    needed = read_facts(adapter / ADAPTER_CONFIG)["r"]
    return next(rank for rank in (8, 16, 32, 64, 128, 256, 320, 512) if rank >= needed)  # those that vLLM knows
