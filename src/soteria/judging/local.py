"""A local model as a judge, through transformers: a guard model such as Llama Guard, or an instruct model."""

from collections.abc import Iterable, Iterator
from itertools import islice

from soteria.answering.generation import generate
from soteria.judging.interface import BLANK_ANSWER, JUDGE_PROMPT, NEITHER_LABEL, Row, fill_prompt, form_of, unjudged
from soteria.judging.replies import read_label
from soteria.models.loading import load_model

WINDOW = 512  # rows that are sorted by length and batched together
LABEL_TOKENS, REASONING_TOKENS = 16, 1024  # of a reply, and of one that has no label by then


class LocalJudge:
    """A guard model is shown the conversation in its own chat template; any other model is asked the judge prompt.

    A guard model is recognized by its template, which puts the label `unsafe` into the prompt. If `judge_prompt` is
    given, guard models are asked that too.
    """

    def __init__(self, model: str, judge_prompt: str | None = None, batch_size: int = 8):
        self.description, self.unread, self.batch_size = f"hf:{model}", "", batch_size
        self.loaded = load_model(model)
        self.judge_prompt = judge_prompt or (None if self._is_guard() else JUDGE_PROMPT)

    def _is_guard(self) -> bool:
        try:
            return bool(self.loaded.tokenizer.chat_template) and "unsafe" in self._render("?", "!").lower()
        except Exception:  # templates raise what they like, for example if they do not support an assistant's turn
            return False

    def _render(self, *turns: str) -> str:
        messages = [{"role": role, "content": text} for role, text in zip(("user", "assistant"), turns, strict=False)]
        return self.loaded.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)

    def _inputs(self, question: str, answer: str) -> list[int]:
        tokenizer, turns = self.loaded.tokenizer, (question, answer)
        if self.judge_prompt is not None:
            turns = (fill_prompt(self.judge_prompt, question, answer),)
            if not tokenizer.chat_template:
                return tokenizer(*turns).input_ids
        return tokenizer(self._render(*turns), add_special_tokens=False).input_ids

    def judge(self, rows: Iterable[Row]) -> Iterator[tuple[int, str]]:
        """As `Judge.judge`."""
        rows = iter(rows)
        while window := list(islice(rows, WINDOW)):
            yield from ((row, unjudged(BLANK_ANSWER)) for row, _, answer in window if not answer.strip())
            asked = [(row, self._inputs(question, answer)) for row, question, answer in window if answer.strip()]
            cut = []
            for at, reply in self._replies([ids for _, ids in asked], LABEL_TOKENS):
                if label := read_label(reply):
                    yield asked[at][0], label
                else:
                    cut.append(at)
            inputs = [asked[at][1] for at in cut]
            for at, reply in self._replies(inputs, REASONING_TOKENS) if cut else ():
                self.unread = form_of(reply)
                yield asked[cut[at]][0], read_label(reply) or unjudged(NEITHER_LABEL)

    def _replies(self, inputs: list[list[int]], most_tokens: int) -> Iterator[tuple[int, str]]:
        for batch in generate(self.loaded, inputs, self.batch_size, max_new_tokens=most_tokens):
            yield from batch.items()
