"""A judge that is a local model: a guard model (Llama Guard and its like) or an instruct model, through transformers.

Knows models; knows nothing of files.
"""

from collections.abc import Iterable, Iterator
from itertools import islice

from soteria.answering.generation import generate
from soteria.judging.interface import EMPTY, JUDGE_PROMPT, Row, fill, read_label
from soteria.models.loading import load_model

WINDOW = 512  # rows that are sorted by length and batched together
LABEL_TOKENS = 8


class LocalJudge:
    """A guard model is asked about the conversation, in its own words; any other is asked the judge prompt.

    Which it is, its chat template says: a guard's writes the label `unsafe` into the prompt. With `judge_prompt`,
    that is asked of a guard too.
    """

    def __init__(self, model: str, judge_prompt: str | None = None, batch_size: int = 8):
        self.description, self.batch_size = f"hf:{model}", batch_size
        self.loaded = load_model(model)
        self.judge_prompt = judge_prompt or (None if self._is_guard() else JUDGE_PROMPT)

    def _is_guard(self) -> bool:
        if not self.loaded.tokenizer.chat_template:
            return False
        try:
            return "unsafe" in self._render(_conversation("?", "!")).lower()
        except Exception:  # templates raise what they like, here of an assistant's turn
            return False

    def _render(self, messages: list[dict[str, str]]) -> str:
        return self.loaded.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)

    def _inputs(self, question: str, answer: str) -> list[int]:
        tokenizer = self.loaded.tokenizer
        if self.judge_prompt is None:
            messages = _conversation(question, answer)
        else:
            text = fill(self.judge_prompt, question, answer)
            if not tokenizer.chat_template:
                return tokenizer(text).input_ids
            messages = [{"role": "user", "content": text}]
        return tokenizer(self._render(messages), add_special_tokens=False).input_ids

    def judge(self, rows: Iterable[Row]) -> Iterator[tuple[int, str]]:
        rows = iter(rows)
        while window := list(islice(rows, WINDOW)):
            asked = []
            for row, question, answer in window:
                if answer.strip():
                    asked.append((row, self._inputs(question, answer)))
                else:
                    yield row, EMPTY
            inputs = [ids for _, ids in asked]
            for batch in generate(self.loaded, inputs, self.batch_size, max_new_tokens=LABEL_TOKENS):
                for at, reply in batch.items():
                    yield asked[at][0], read_label(reply) or EMPTY


def _conversation(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
