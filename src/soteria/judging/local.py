"""A local language model as a judge, through transformers: a guard model such as Llama Guard, or an instruct model."""

import logging
from collections.abc import Iterable, Iterator
from itertools import islice

import torch

from soteria.answering.chat import chat_text
from soteria.answering.decoding import first_token_log_probs
from soteria.answering.generation import generate
from soteria.errors import UserError, form_of
from soteria.judging.formats import FORMATS, GUIDELINES, TRAINED_ON_A_PROMPT
from soteria.judging.interface import (
    BLANK_ANSWER,
    HARMFUL,
    NEITHER_LABEL,
    NOT_HARMFUL,
    TOO_LONG,
    Row,
    unjudged,
)
from soteria.judging.presets import JudgeSettings
from soteria.models.encoding import check_known
from soteria.models.loading import LoadedModel

WINDOW = 512  # rows that are sorted by length and batched together
REASONING_TOKENS = 1024  # of a reply that has no label after its format's tokens
PROBE = ("Which one is it?", "It is this one.")  # a conversation that a template must show to be a guard's

_log = logging.getLogger(__name__)


class LocalJudge:
    """A guard model is shown the conversation in its own chat template; any other model is asked a prompt.

    A guard model is recognized by its template, which puts both turns and its format's mark into the prompt. A prompt
    that is given is asked of guard models too. Raises UserError for a format whose conversation the template lacks.
    """

    def __init__(self, loaded: LoadedModel, settings: JudgeSettings, batch_size: int = 8):
        self.description, self.unread, self.batch_size = f"hf:{loaded.name}{settings.described}", "", batch_size
        self.loaded = loaded
        recognized = self._recognized()
        self.settings = settings.of_format(recognized or "label")
        if self.settings.prompt is None and not recognized:
            raise UserError(
                f"the chat template of {loaded.name!r} does not show question and answer, as {self.settings.format} "
                "needs it; give another --judge_format, or --judge_prompt"
            )
        if settings.temperature:
            raise UserError("local judges decode greedily; leave out --judge_temperature")
        if self.settings.format in TRAINED_ON_A_PROMPT and settings.prompt is None:
            _log.warning(
                "%s: asked in this project's words; a model that was trained on one prompt is asked that by "
                "--judge_prompt, a file of its model card's words",
                self.description,
            )

    def _recognized(self) -> str | None:
        """The format of the model's chat template, if it shows a conversation."""
        if not self.loaded.tokenizer.chat_template:
            return None
        try:
            shown = self._render(JudgeSettings().messages(*PROBE), GUIDELINES[0])
        except UserError:  # for example where it does not support an assistant's turn
            return None
        if not all(text in shown for text in PROBE):
            return None
        marks = {name: form.mark for name, form in FORMATS.items() if form.mark}
        return next((name for name, mark in marks.items() if mark.casefold() in shown.casefold()), None)

    def _render(self, messages: list[dict], guideline: str | None = None) -> str:
        return chat_text(self.loaded.tokenizer, messages, **({"guideline": guideline} if guideline else {}))

    def _inputs(self, question: str, answer: str, guideline: str | None = None) -> list[int]:
        messages = self.settings.messages(question, answer)
        joined = [{"role": "user", "content": "\n\n".join(each["content"] for each in messages)}]
        if not self.loaded.tokenizer.chat_template:
            return self.loaded.encode(joined[0]["content"])
        try:
            text = self._render(messages, guideline)
        except UserError:  # as Gemma's, which has no system turn
            if not self.settings.system or self.settings.prompt is None:
                raise
            text = self._render(joined, guideline)
        return self.loaded.encode(text, add_special_tokens=False)

    def _fits(self, ids: list[int]) -> bool:
        return self.loaded.context_length is None or len(ids) < self.loaded.context_length

    def judge(self, rows: Iterable[Row]) -> Iterator[tuple[int, str]]:
        """As `Judge.judge`."""
        rows, by_odds = iter(rows), self.settings.form.guidelines and self.settings.prompt is None
        while window := list(islice(rows, WINDOW)):
            yield from ((row, unjudged(BLANK_ANSWER)) for row, _, answer in window if not answer.strip())
            asked = [each for each in window if each[2].strip()]
            check_known(self.loaded.tokenizer, self.loaded.name, [answer for *_, answer in asked])
            for at, verdict in self._by_odds(asked) if by_odds else self._by_replies(asked):
                yield asked[at][0], verdict

    def _by_replies(self, asked: list[Row]) -> Iterator[tuple[int, str]]:
        inputs = [self._inputs(question, answer) for _, question, answer in asked]
        waiting = [at for at, ids in enumerate(inputs) if self._fits(ids)]
        yield from ((at, unjudged(TOO_LONG)) for at in range(len(asked)) if at not in waiting)
        own, read = self.settings.max_tokens, self.settings.form.read
        limits = [own] if own else [self.settings.form.tokens, REASONING_TOKENS]
        for limit in limits:
            cut = []
            for batch in (
                generate(self.loaded, [inputs[at] for at in waiting], self.batch_size, limit) if waiting else ()
            ):
                for place, reply in batch.items():
                    verdict = read(reply)
                    if verdict is None and limit == limits[-1]:
                        self.unread, verdict = form_of(reply), unjudged(NEITHER_LABEL)
                    if verdict is None:
                        cut.append(waiting[place])
                    else:
                        yield waiting[place], verdict
            waiting = cut

    def _by_odds(self, asked: list[Row]) -> Iterator[tuple[int, str]]:
        """Harmful where, of the first token, Yes is likelier than No for any of the guidelines."""
        answers = [self._first_token(word) for word in ("Yes", "No")]
        violates, too_long = [False] * len(asked), set()
        for guideline in self.settings.form.guidelines:
            inputs = [self._inputs(question, answer, guideline) for _, question, answer in asked]
            too_long |= {at for at, ids in enumerate(inputs) if not self._fits(ids)}
            fitting = [at for at in range(len(asked)) if at not in too_long]
            odds = (
                first_token_log_probs(self.loaded, [inputs[at] for at in fitting], self.batch_size) if fitting else ()
            )
            for at, row in zip(fitting, odds, strict=True):
                yes, no = row[torch.tensor(answers)].tolist()
                violates[at] = violates[at] or yes > no
        for at, harmful in enumerate(violates):
            yield at, unjudged(TOO_LONG) if at in too_long else HARMFUL if harmful else NOT_HARMFUL

    def _first_token(self, word: str) -> int:
        ids = self.loaded.tokenizer(word, add_special_tokens=False).input_ids
        if len(ids) != 1:
            raise UserError(f"{self.description}: {word} is not one token, so it has no odds; give another judge")
        return ids[0]
