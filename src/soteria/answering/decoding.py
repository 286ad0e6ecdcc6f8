"""Greedy decoding of many prompts: batches by tokens, rows that leave when they end, halves where room runs out.

Knows models and token ids; knows nothing of questions, languages or files.
"""

import inspect
from collections.abc import Sequence

import torch
from torch import Tensor

from soteria.models.loading import LoadedModel
from soteria.models.memory import Rows

# How long an answer is taken to become when batches are planned. Most answers of a model that refuses are shorter; a
# batch whose answers grow beyond its room is halved.
EXPECTED_TOKENS = 64


def token_budget(lengths: Sequence[int], batch_size: int, max_new_tokens: int) -> int:
    """How many tokens may be in memory at once: as many as `batch_size` of the longest prompts with whole answers."""
    return batch_size * (max(lengths, default=0) + max_new_tokens)


def plan_batches(lengths: Sequence[int], batch_size: int, max_new_tokens: int) -> list[list[int]]:
    """Rows in batches, longest prompts first (memory runs out early if at all), none less than `batch_size` but the
    last.

    A batch takes as many rows as its longest prompt and EXPECTED_TOKENS of answer leave room for in `token_budget`. The
    plan depends on nothing else, so that a run that goes on after an interruption computes the same batches.
    """
    budget = token_budget(lengths, batch_size, max_new_tokens)
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    batches = []
    while order:
        n_rows = budget // (lengths[order[0]] + min(EXPECTED_TOKENS, max_new_tokens))
        batches.append(order[:n_rows])
        order = order[n_rows:]
    return batches


def end_tokens(loaded: LoadedModel) -> set[int]:
    """The tokens that end an answer: the generation config's, often several in chat models, else the tokenizer's."""
    found = getattr(loaded.model.generation_config, "eos_token_id", None)
    found = loaded.tokenizer.eos_token_id if found is None else found
    return set(found) if isinstance(found, list) else {found} - {None}


def pad_token(loaded: LoadedModel) -> int:
    """The tokenizer's own padding token, else its end-of-text token: it is masked, so its choice changes nothing."""
    for token in (loaded.tokenizer.pad_token_id, loaded.tokenizer.eos_token_id):
        if token is not None:
            return token
    return 0


def rope_boundary(loaded: LoadedModel) -> int | None:
    """The length beyond which a text's every position is embedded anew (longrope, as in Phi-3.5); None without one.

    Keys kept from before it are of no use beyond it, and texts of both sides cannot share a batch.
    """
    parameters = getattr(loaded.model.config.get_text_config(), "rope_parameters", None) or {}
    # One for all layers, or one for each kind of layer.
    kinds = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    found = [kind.get("original_max_position_embeddings") for kind in kinds if kind.get("rope_type") == "longrope"]
    return min((length for length in found if length), default=None)


class Batch:
    """The rows of one batch in flight: their keys and values, padded on the left, and what each is to be fed next."""

    def __init__(self, loaded: LoadedModel, texts: list[list[int]]):
        """`texts`: token ids of each row."""
        self.model, self.length = loaded.model, max(map(len, texts))
        pad = pad_token(loaded)
        self._ids = torch.tensor([[pad] * (self.length - len(text)) + text for text in texts])  # (rows, length)
        self._mask = torch.tensor([[0] * (self.length - len(text)) + [1] * len(text) for text in texts])
        self._cache = None
        self._takes_positions = "position_ids" in inspect.signature(loaded.model.forward).parameters

    def logits(self) -> Tensor:
        """Feed what is new; float logits (rows, vocabulary) at each row's last token."""
        device, positions = self.model.device, (self._mask.cumsum(1) - 1).clamp(min=0)[:, -self._ids.shape[1] :]
        output = self.model(
            input_ids=self._ids.to(device),
            attention_mask=self._mask.to(device),
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
            **({"position_ids": positions.to(device)} if self._takes_positions else {}),
        )
        self._cache = output.past_key_values
        return output.logits[:, -1]

    def go_on(self, rows: list[int], tokens: list[int]) -> None:
        """Keep only `rows` (places in this batch), each with a token more."""
        if len(rows) < len(self._mask):
            kept = torch.tensor(rows)  # on the CPU, for layers on whatever device
            self._cache.batch_select_indices(kept)
            self._mask = self._mask[kept]
        self._ids = torch.tensor(tokens)[:, None]
        self._mask = torch.cat([self._mask, torch.ones_like(self._ids)], dim=1)
        self.length += 1


@torch.inference_mode()
def decode(loaded: LoadedModel, prompts: list[list[int]], limits: list[int], room: Rows) -> list[list[int]]:
    """The model's greedy continuation of each prompt, as token ids; an end token, where one comes, is the last of them.

    `limits` are the most new tokens of each. `room` is how many tokens may be in memory at once: rows that need more
    are put off, with what they have so far, and computed again from there. A row's tokens depend on no other row's.
    Raises UserError where the memory does not hold a single row.
    """
    ends, boundary = end_tokens(loaded), rope_boundary(loaded)
    answers: list[list[int]] = [[] for _ in prompts]

    def length(row: int) -> int:
        return len(prompts[row]) + len(answers[row])

    def goes_on(row: int) -> bool:
        return len(answers[row]) < limits[row] and not (answers[row] and answers[row][-1] in ends)

    def parts(rows: list[int], longest: int, most: int) -> list[list[int]]:
        """The rows as they are, or in two: they lie on both sides of the boundary, or are too much for the room."""
        beyond = [row for row in rows if boundary and length(row) > boundary]
        if beyond and len(beyond) < len(rows):
            return [beyond, [row for row in rows if row not in beyond]]
        half = len(rows) // 2
        return [rows[:half], rows[half:]] if half and len(rows) * longest > most else [rows]

    def advance(rows: list[int], most: int) -> list[list[int]]:
        """Decode rows to their ends, or until they have to part; gives the parts that are left."""
        rows = [row for row in rows if goes_on(row)]
        if not rows:
            return []
        left = parts(rows, max(map(length, rows)), most)
        if len(left) > 1:
            return left
        batch = Batch(loaded, [prompts[row] + answers[row] for row in rows])
        while True:
            for row, token in zip(rows, batch.logits().argmax(-1).tolist(), strict=True):
                answers[row].append(token)
            kept = [place for place, row in enumerate(rows) if goes_on(row)]
            rows = [rows[place] for place in kept]
            if not rows:
                return []
            left, crossed = parts(rows, batch.length + 1, most), any(length(row) - 1 == boundary for row in rows)
            if crossed or len(left) > 1:
                return left
            batch.go_on(kept, [answers[row][-1] for row in rows])

    waiting = [list(range(len(prompts)))]
    while waiting:
        rows = waiting.pop()
        waiting += reversed(room.fit(lambda most, rows=rows: advance(rows, most)))
    return answers


@torch.inference_mode()
def first_token_log_probs(loaded: LoadedModel, prompts: list[list[int]], batch_size: int) -> Tensor:
    """Log-probabilities of the first token of each prompt's answer, float32 (prompts, vocabulary), on the CPU."""
    boundary = rope_boundary(loaded) or max(map(len, prompts), default=0)
    found: dict[int, Tensor] = {}
    for batch in plan_batches(list(map(len, prompts)), batch_size, max_new_tokens=1):
        for beyond in (True, False):
            rows = [row for row in batch if (len(prompts[row]) > boundary) == beyond]
            if rows:
                logits = Batch(loaded, [prompts[row] for row in rows]).logits()
                found |= zip(rows, logits.float().log_softmax(-1).cpu(), strict=True)
    return torch.stack([found[row] for row in range(len(prompts))])
