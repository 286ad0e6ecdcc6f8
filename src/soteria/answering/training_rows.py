"""Training rows: prompts and answers as tokens, in the form in which step 3 asks, with a loss on the answers only.

In: (prompt, answer) pairs by language. Out: rows of `input_ids` and `labels`, and batches of them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from soteria.answering.decoding import behind_answer, end_tokens
from soteria.answering.generation import prompt_text
from soteria.errors import UserError
from soteria.languages import Language
from soteria.models.batches import left_padded, positions
from soteria.models.encoding import warn_of_special
from soteria.models.loading import LoadedModel

IGNORED = -100  # the label of tokens without loss, by torch's cross_entropy

Pairs = Mapping[Language, Sequence[tuple[str, str]]]


@dataclass(frozen=True)
class FineTuning:
    """How a model is tuned; the result depends on nothing else but the model, the pairs and the number of processes.

    `batch_size` is in pairs per process and forward pass, `max_tokens` that of a prompt with its answer.
    `target_modules` are PEFT's; `layers` is the first and the last layer changed, from 0. `max_steps`, in optimizer
    steps, replaces `epochs`. The learning rate rises over `warmup_steps` and then falls linearly to 0. `dtype` is that
    of the frozen base in memory (auto: bfloat16, on a CPU float32); the adapter is float32.
    """

    rank: int = 16
    alpha: int = 32
    target_modules: tuple[str, ...] = ("all-linear",)
    layers: tuple[int, int] | None = None
    learning_rate: float = 2e-4
    epochs: int = 1
    max_steps: int | None = None
    batch_size: int = 8
    gradient_accumulation: int = 1
    warmup_steps: int = 0
    max_tokens: int = 1024
    seed: int = 42
    dtype: str = "auto"
    chat_template: bool = False


def training_rows(
    loaded: LoadedModel, pairs: Pairs, settings: FineTuning
) -> tuple[list[dict[str, list[int]]], dict[str, int]]:
    """The `input_ids` and `labels` of each pair, and how many pairs were left out, and answers cut, for their length.

    Labels are IGNORED on the prompt. The answer, without white space around it, follows as it does in text, and then
    the end token. An answer that is too long is cut, without an end token; a pair whose prompt is too long is left out.
    Texts that hold special tokens are warned of: an answer with its own end token would be learned to end twice.
    """
    texts = [text for theirs in pairs.values() for pair in theirs for text in pair]
    warn_of_special(loaded.tokenizer, loaded.name, texts)
    limit = min(settings.max_tokens, loaded.context_length or settings.max_tokens)
    end, rows, n_cut = _end_token(loaded, settings.chat_template), [], 0
    for language, question, answer in ((language, *pair) for language, theirs in pairs.items() for pair in theirs):
        text = prompt_text(loaded, question, language, settings.chat_template)
        prompt, answered = _tokens(loaded, text, answer.strip(), settings.chat_template)
        ids = [*prompt, *answered, end][:limit]
        if len(prompt) < limit:
            n_cut += len(prompt) + len(answered) + 1 > limit
            rows.append({"input_ids": ids, "labels": [IGNORED] * len(prompt) + ids[len(prompt) :]})
    if not rows:
        raise UserError(f"no prompt is shorter than {limit} tokens; give a larger --max_tokens or shorter prompts")
    return rows, {"rows": len(rows), "rows_left_out": sum(map(len, pairs.values())) - len(rows), "answers_cut": n_cut}


def _tokens(loaded: LoadedModel, prompt: str, answer: str, chat_template: bool) -> tuple[list[int], list[int]]:
    """The token ids of a prompt, the same as when it is asked, and of the answer that follows it."""
    special, answer = {"add_special_tokens": not chat_template}, answer if chat_template else f" {answer}"
    asked, whole = (loaded.encode(text, **special) for text in (prompt, prompt + answer))
    if whole[: len(asked)] == asked:
        return asked, whole[len(asked) :]
    return asked, loaded.encode(answer, add_special_tokens=False)  # a token spans the boundary


def _end_token(loaded: LoadedModel, chat_template: bool) -> int:
    """The token to end answers with: one that ends a generation, if possible that of the chat template's answers."""
    ends, tokenizer = end_tokens(loaded), loaded.tokenizer
    if not ends:
        raise UserError(f"{loaded.name!r} has no token that ends a text; set eos_token in its tokenizer_config.json")
    after = behind_answer(tokenizer) if chat_template else []
    preferred = [*after, tokenizer.eos_token_id, min(ends)]
    return next(token for token in preferred if token in ends)


def collate(rows: list[dict[str, list[int]]], pad: int) -> dict[str, Tensor | int]:
    """A batch, (rows, longest row), padded on the left. `labels` and logits are those of the last tokens only, (rows,
    longest answer + 1).
    """
    n_kept = 1 + max(sum(label != IGNORED for label in row["labels"]) for row in rows)
    ids, mask = left_padded([row["input_ids"] for row in rows], pad)
    labels, _ = left_padded([row["labels"] for row in rows], IGNORED)
    own = {"labels": labels[:, -n_kept:], "logits_to_keep": n_kept}
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions(mask)} | own
