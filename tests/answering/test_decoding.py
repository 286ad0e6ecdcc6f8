"""Greedy decoding in batches: the tokens of full forward passes, whatever the batch, the room and the architecture."""

import random

import pytest
import torch
from tiny_models import ARCHITECTURES, VOCABULARY

from soteria.answering import decoding
from soteria.answering.decoding import Batch, decode, end_tokens, first_token_log_probs, plan_batches, token_budget
from soteria.errors import UserError
from soteria.models.memory import Rows

END = 0
WORLD = 10**9  # room for everything


def some_prompts(n: int, longest: int, seed: int = 0) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(2, VOCABULARY) for _ in range(draw.randint(1, longest))] for _ in range(n)]


@torch.no_grad()
def one_by_one(loaded, prompt: list[int], limit: int) -> list[int]:
    """The oracle: the most probable next token, one full forward a token, no cache, no batch, no padding."""
    tokens: list[int] = []
    while len(tokens) < limit and END not in tokens:
        tokens.append(int(loaded.model(torch.tensor([prompt + tokens])).logits[0, -1].argmax()))
    return tokens


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("most", [WORLD, 90, 1])
def test_every_architecture_gives_the_oracles_tokens_in_whatever_room(architecture, most, tiny_loaded):
    # phi3-longrope changes its rope at 16 tokens, sliding windows are 8 wide: prompts and answers lie on both sides.
    loaded, prompts = tiny_loaded(architecture), some_prompts(7, 20)
    limits = [14, 9, 1, 14, 3, 0, 14]
    want = [one_by_one(loaded, prompt, limit) for prompt, limit in zip(prompts, limits, strict=True)]
    assert decode(loaded, prompts, limits, Rows(most)) == want
    assert {len(tokens) for tokens in want} >= {0, 1}


def test_rows_leave_the_batch_at_their_end_tokens(tiny_loaded, monkeypatch):
    loaded, prompts = tiny_loaded("llama"), some_prompts(12, 6)
    want = [one_by_one(loaded, prompt, 30) for prompt in prompts]
    monkeypatch.setattr(loaded.model.generation_config, "eos_token_id", [END, want[0][3], want[1][7]])
    sizes, real = [], Batch.logits

    def counted(batch):
        sizes.append(len(batch._mask))
        return real(batch)

    monkeypatch.setattr(Batch, "logits", counted)
    ends = end_tokens(loaded)
    got = decode(loaded, prompts, [30] * 12, Rows(WORLD))
    for full, tokens in zip(want, got, strict=True):
        first = next((at for at, token in enumerate(full) if token in ends), len(full))
        assert tokens == full[: first + 1]
    assert sizes[0] == 12 and sizes == sorted(sizes, reverse=True) and sizes[-1] < 12


def test_a_batch_that_memory_does_not_hold_is_halved_and_goes_on_from_where_it_was(tiny_loaded, monkeypatch):
    loaded, prompts = tiny_loaded("llama"), some_prompts(8, 6)
    want = decode(loaded, prompts, [12] * 8, Rows(WORLD))
    real, fed = Batch.logits, []

    def scarce(batch):
        fed.append(batch._ids.numel())
        if len(batch._mask) * batch.length > 60:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return real(batch)

    monkeypatch.setattr(Batch, "logits", scarce)
    room = Rows(200)
    assert decode(loaded, prompts, [12] * 8, room) == want
    assert room.most < 200


def test_a_memory_that_holds_no_row_is_said_in_a_sentence(tiny_loaded, monkeypatch):
    def never(batch):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(Batch, "logits", never)
    with pytest.raises(UserError, match=r"does not hold one prompt.*max_new_tokens"):
        decode(tiny_loaded("llama"), [[5]], [4], Rows(64, "try a smaller --max_new_tokens"))


def test_no_more_tokens_are_in_memory_than_there_is_room_for(tiny_loaded, monkeypatch):
    loaded, prompts = tiny_loaded("llama"), some_prompts(20, 10)
    most, real = 100, Batch.logits

    def checked(batch):
        assert len(batch._mask) * batch.length <= most
        return real(batch)

    monkeypatch.setattr(Batch, "logits", checked)
    decode(loaded, prompts, [40] * 20, Rows(most))


@pytest.mark.parametrize(("batch_size", "max_new_tokens"), [(1, 5), (8, 512), (3, 64), (64, 1)])
def test_a_plan_has_every_row_once_longest_first_and_keeps_to_the_room(batch_size, max_new_tokens):
    lengths = [len(prompt) for prompt in some_prompts(300, 200)]
    batches = plan_batches(lengths, batch_size, max_new_tokens)
    order = [lengths[row] for batch in batches for row in batch]
    assert sorted(row for batch in batches for row in batch) == list(range(300))
    assert order == sorted(lengths, reverse=True)
    assert all(len(batch) >= batch_size for batch in batches[:-1])
    budget = token_budget(lengths, batch_size, max_new_tokens)
    assert all(len(batch) * lengths[batch[0]] <= budget for batch in batches)


def test_a_plan_of_nothing_is_empty():
    assert plan_batches([], 8, 512) == []


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "phi3-longrope", "gemma3", "mistral-sliding"])
def test_the_first_tokens_odds_are_those_of_a_pass_alone(architecture, tiny_loaded):
    loaded, prompts = tiny_loaded(architecture), some_prompts(9, 24)
    found = first_token_log_probs(loaded, prompts, 3)
    assert found.dtype == torch.float32 and found.shape == (9, VOCABULARY)
    with torch.no_grad():
        want = torch.stack([loaded.model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1) for prompt in prompts])
    torch.testing.assert_close(found, want, atol=1e-4, rtol=1e-4)


def test_a_model_without_positions_in_its_forward_pass_is_given_none(tiny_loaded, monkeypatch):
    loaded, real = tiny_loaded("llama"), tiny_loaded("llama").model.forward

    def forward(input_ids, attention_mask, past_key_values, use_cache, logits_to_keep):
        return real(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=(attention_mask.cumsum(1) - 1).clamp(min=0)[:, -input_ids.shape[1] :],
            past_key_values=past_key_values,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
        )

    want = decode(loaded, [[5, 6], [7]], [5, 5], Rows(WORLD))
    monkeypatch.setattr(loaded.model, "forward", forward)
    assert decode(loaded, [[5, 6], [7]], [5, 5], Rows(WORLD)) == want


def test_what_is_expected_of_an_answer_changes_no_answer(tiny_loaded, monkeypatch):
    loaded, prompts = tiny_loaded("llama"), some_prompts(10, 8)
    lengths = list(map(len, prompts))

    def every() -> dict[int, list[int]]:
        found = {}
        for rows in plan_batches(lengths, 2, 20):
            room = Rows(token_budget(lengths, 2, 20))
            found |= zip(rows, decode(loaded, [prompts[row] for row in rows], [20] * len(rows), room), strict=True)
        return found

    want = every()
    monkeypatch.setattr(decoding, "EXPECTED_TOKENS", 1)
    assert every() == want
