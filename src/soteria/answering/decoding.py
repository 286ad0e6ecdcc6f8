"""Greedy decoding of many prompts at once.

In: prompts as token ids. Out: each one's answer as token ids. Batches are planned by tokens; a row leaves its batch
when its answer ends, and a batch is halved when it outgrows the memory it may use.
"""

import math
from collections.abc import Callable, Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from soteria.answering.chat import chat_text
from soteria.errors import UserError
from soteria.models.batches import left_padded, logits_off, most_rounding, positions, takes_positions
from soteria.models.loading import LoadedModel
from soteria.models.memory import TokenBudget

# The answer length that batches are planned for. A model that refuses mostly answers in fewer tokens; a batch whose
# answers outgrow its room is halved.
EXPECTED_TOKENS = 64
SAID = "Soteria"
_padding_is_exact: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def token_budget(lengths: Sequence[int], batch_size: int, max_new_tokens: int) -> int:
    """How many tokens may be in memory at once: `batch_size` of the longest prompts, with full-length answers."""
    return batch_size * (max(lengths, default=0) + max_new_tokens)


def plan_batches(lengths: Sequence[int], batch_size: int, max_new_tokens: int) -> list[list[int]]:
    """Batches of rows, longest prompts first (if memory runs out, it does so early), each but the last of at least
    `batch_size` rows.

    A batch has as many rows as fit `token_budget` with its longest prompt and EXPECTED_TOKENS of answer. The plan
    depends on nothing else, so a run resumed after an interruption computes the same batches.
    """
    budget = token_budget(lengths, batch_size, max_new_tokens)
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    batches, start = [], 0
    while start < len(order):
        n_rows = budget // (lengths[order[start]] + min(EXPECTED_TOKENS, max_new_tokens))
        batches.append(order[start : start + n_rows])
        start += n_rows
    return batches


def end_tokens(loaded: LoadedModel) -> set[int]:
    """The tokens that end an answer: those of the generation config, the tokenizer's, and the chat template's."""
    found = getattr(loaded.model.generation_config, "eos_token_id", None)
    ends = {*found} if isinstance(found, list) else {found}
    return (ends | {loaded.tokenizer.eos_token_id} | end_of_turn(loaded.tokenizer)) - {None}


def end_of_turn(tokenizer) -> set[int]:
    """The special token, if any, that the chat template puts behind what the assistant says."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {token for token in behind_answer(tokenizer)[:1] if token in added and added[token].special}


def behind_answer(tokenizer) -> list[int]:
    """The tokens, if any, that the chat template puts behind what the assistant says."""
    if not getattr(tokenizer, "chat_template", None):
        return []
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": SAID}]
    try:
        text = chat_text(tokenizer, turns, add_generation_prompt=False)
    except UserError:  # where it matters, asking shows it
        return []
    _, said, after = text.rpartition(SAID)
    return tokenizer(after.lstrip(), add_special_tokens=False).input_ids if said else []


def pad_token(loaded: LoadedModel) -> int:
    """The tokenizer's padding token, else its end-of-text token; it is masked, so the choice does not matter.

    One that was added to the tokenizer alone, the model has no embedding of.
    """
    tokens = (loaded.tokenizer.pad_token_id, loaded.tokenizer.eos_token_id, 0)
    return next(token for token in tokens if token is not None and token < loaded.vocabulary)


def rope_boundary(loaded: LoadedModel) -> float:
    """The length beyond which all positions of a text are embedded differently (longrope, as in Phi-3.5), else inf.

    Keys cached before the boundary are useless beyond it, and texts on either side of it cannot share a batch.
    """
    parameters = getattr(loaded.model.config.get_text_config(), "rope_parameters", None) or {}
    # Either one set of parameters for all layers, or one for each kind of layer.
    kinds = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    found = [kind.get("original_max_position_embeddings") for kind in kinds if kind.get("rope_type") == "longrope"]
    return min(filter(None, found), default=math.inf)


def padding_is_exact(loaded: LoadedModel) -> bool:
    """Whether a text in a batch comes out as by itself. Some state spaces read the padding before it, too."""
    if loaded.model not in _padding_is_exact:
        _padding_is_exact[loaded.model] = _try_padding(loaded)
    return _padding_is_exact[loaded.model]


def _try_padding(loaded: LoadedModel) -> bool:
    longer = [token % loaded.vocabulary for token in range(7, 19)]
    alone, beside = Batch(loaded, [longer[:5]]).logits()[0], Batch(loaded, [longer, longer[:5]]).logits()[1]
    return logits_off(beside, alone) <= most_rounding(loaded.model.dtype)


class Batch:
    """The rows of a batch being decoded: their key-value cache, padded on the left, and the tokens to feed next."""

    def __init__(self, loaded: LoadedModel, texts: list[list[int]]):
        """`texts`: token ids of each row."""
        self.loaded, self.length = loaded, max(map(len, texts))
        self._ids, self._mask = left_padded(texts, pad_token(loaded))
        self._cache = None
        self._takes_positions = takes_positions(loaded.model)

    def __len__(self) -> int:
        return len(self._mask)

    @property
    def drops_rows(self) -> bool:
        """Whether rows can leave: those of transformers' own caches can, a model's special ones are not relied on."""
        return self._cache is None or type(self._cache) is DynamicCache

    def logits(self) -> Tensor:
        """Feed the new tokens; returns logits (rows, vocabulary) at each row's last token. Raises UserError for NaN."""
        device, at = self.loaded.model.device, positions(self._mask)[:, -self._ids.shape[1] :]
        output = self.loaded.model(
            input_ids=self._ids.to(device),
            attention_mask=self._mask.to(device),
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
            **({"position_ids": at.to(device)} if self._takes_positions else {}),
        )
        self._cache = getattr(output, "past_key_values", None)
        return self.loaded.finite(output.logits[:, -1])

    def extend(self, kept: list[int], tokens: list[int]) -> None:
        """Drop all rows but `kept` (indices into this batch) and give each of those one more token."""
        new = torch.tensor(tokens)[:, None]
        if len(kept) < len(self._mask):
            index = torch.tensor(kept)  # on the CPU: layers may be on several devices
            if self._cache is not None:
                self._cache.reorder_cache(index)  # of every kind of layer, state spaces' too
            self._mask, self._ids = self._mask[index], self._ids[index]
        # Old models give no cache: they read the whole text again.
        self._ids = torch.cat([self._ids, new], dim=1) if self._cache is None else new
        self._mask = torch.cat([self._mask, torch.ones_like(new)], dim=1)
        self.length += 1


@torch.inference_mode()
def decode(
    loaded: LoadedModel,
    prompts: list[list[int]],
    limits: list[int],
    room: TokenBudget,
    told: Callable[[int, list[tuple[int, int]]], object] = lambda n_tokens, ended: None,
) -> list[list[int]]:
    """The greedy continuation of each prompt as token ids, including the end token if one was generated.

    `limits` are the most new tokens of each prompt. `room` is how many tokens may be in memory at once: rows that need
    more are set aside with the tokens they have, and resumed later. A row's tokens do not depend on the other rows.
    `told` gets the number of new tokens as they come, and the length and limit of each answer that ended with one.
    Raises UserError if memory cannot hold a single row.
    """
    ends, boundary, pads = end_tokens(loaded), rope_boundary(loaded), padding_is_exact(loaded)
    answers: list[list[int]] = [[] for _ in prompts]

    def length(row: int) -> int:
        return len(prompts[row]) + len(answers[row])

    def is_unfinished(row: int) -> bool:
        return len(answers[row]) < limits[row] and not (answers[row] and answers[row][-1] in ends)

    def advance(rows: list[int], most: int) -> list[list[int]]:
        """Decode rows until all have ended or they must be split; returns the parts that are left."""
        batch = None
        while kept := [place for place, row in enumerate(rows) if is_unfinished(row)]:
            rows = [rows[place] for place in kept]
            if not batch and not pads and len({length(row) for row in rows}) > 1:
                return [[row for row in rows if length(row) == one] for one in sorted({*map(length, rows)})]
            beyond, half = [row for row in rows if length(row) > boundary], len(rows) // 2
            if 0 < len(beyond) < len(rows):
                return [beyond, [row for row in rows if row not in beyond]]
            if half and len(rows) * (batch.length + 1 if batch else max(map(length, rows))) > most:
                return [rows[:half], rows[half:]]
            if batch and any(length(row) - 1 == boundary for row in rows):
                return [rows]
            if batch and len(kept) < len(batch) and not batch.drops_rows:
                batch = None
            if batch:
                batch.extend(kept, [answers[row][-1] for row in rows])
            else:
                batch = Batch(loaded, [prompts[row] + answers[row] for row in rows])
            for row, token in zip(rows, batch.logits().argmax(-1).tolist(), strict=True):
                answers[row].append(token)
            told(len(rows), [(len(answers[row]), limits[row]) for row in rows if not is_unfinished(row)])
        return []

    waiting = [list(range(len(prompts)))]
    while waiting:
        rows = waiting.pop()
        waiting += reversed(room.fit(lambda most, rows=rows: advance(rows, most)))
    return answers


@torch.inference_mode()
def first_token_log_probs(loaded: LoadedModel, prompts: list[list[int]], batch_size: int) -> Tensor:
    """Log-probabilities of the first token of each prompt's answer, float32 (prompts, vocabulary), on the CPU."""
    boundary, pads, found = rope_boundary(loaded), padding_is_exact(loaded), {}
    for batch in plan_batches(list(map(len, prompts)), batch_size, max_new_tokens=1):
        lengths = {row: len(prompts[row]) for row in batch}
        kinds = {row: length > boundary if pads else length for row, length in lengths.items()}
        for kind in dict.fromkeys(kinds.values()):
            rows = [row for row in batch if kinds[row] == kind]
            logits = Batch(loaded, [prompts[row] for row in rows]).logits()
            found |= zip(rows, logits.float().log_softmax(-1).cpu(), strict=True)
    return torch.stack([found[row] for row in range(len(prompts))])
