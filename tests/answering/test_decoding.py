"""Greedy decoding in batches: the tokens of full forward passes, whatever the batch, the room and the architecture."""

import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import ARCHITECTURES, BOS, EOS, VOCABULARY, ending_with, tiny_tokenizer
from tokenizers import processors

from soteria.answering.decoding import (
    Batch,
    decode,
    end_of_turn,
    end_tokens,
    first_token_log_probs,
    plan_batches,
    token_budget,
)
from soteria.errors import UserError
from soteria.judging.costs import icl_accuracy
from soteria.models import memory
from soteria.models.memory import TokenBudget
from soteria.scoring.prompts import Example, Split

END = 0
WORLD = 10**9  # room for everything


def some_prompts(n: int, longest: int) -> list[list[int]]:
    draw = random.Random(0)
    return [[draw.randrange(2, VOCABULARY) for _ in range(draw.randint(1, longest))] for _ in range(n)]


@torch.no_grad()
def next_logits(loaded, tokens: list[int]) -> torch.Tensor:
    return loaded.model(torch.tensor([tokens])).logits[0, -1]


def one_by_one(loaded, prompt: list[int], limit: int) -> list[int]:
    """The oracle: the most probable next token, one full forward pass per token, no cache, no batch, no padding."""
    tokens: list[int] = []
    while len(tokens) < limit and END not in tokens:
        tokens.append(int(next_logits(loaded, prompt + tokens).argmax()))
    return tokens


@pytest.fixture
def before_each_pass(monkeypatch):
    """`before_each_pass(look)` calls `look(batch)` before each forward pass from here on."""
    real = Batch.logits
    monkeypatch.setattr(memory.gc, "collect", lambda: None)  # slow in a process that has run many tests
    monkeypatch.setattr("soteria.answering.decoding.padding_is_exact", lambda loaded: True)  # would be tried in a pass

    def install(look):
        monkeypatch.setattr(Batch, "logits", lambda batch: (look(batch), real(batch))[1])

    return install


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_gives_the_oracles_tokens_in_any_room(architecture, tiny_loaded):
    # phi3-longrope changes its rope at 16 tokens, sliding windows are 8 wide: prompts and answers lie on both sides.
    loaded, prompts, limits = tiny_loaded(architecture), some_prompts(6, 20), [12, 7, 1, 12, 0, 9]
    want = [one_by_one(loaded, prompt, limit) for prompt, limit in zip(prompts, limits, strict=True)]
    assert {len(tokens) for tokens in want} >= {0, 1}
    for most in (WORLD, 70, 1):
        assert decode(loaded, prompts, limits, TokenBudget(most)) == want
    odds = first_token_log_probs(loaded, prompts, 3)
    assert odds.dtype == torch.float32 and odds.shape == (6, VOCABULARY)
    alone = torch.stack([next_logits(loaded, prompt).log_softmax(-1) for prompt in prompts])
    torch.testing.assert_close(odds, alone, atol=1e-4, rtol=1e-4)


def test_rows_leave_the_batch_at_their_end_tokens(tiny_loaded, monkeypatch, before_each_pass):
    loaded, prompts, sizes = tiny_loaded("llama"), some_prompts(8, 6), []
    want = [one_by_one(loaded, prompt, 16) for prompt in prompts]
    monkeypatch.setattr(loaded.model.generation_config, "eos_token_id", [END, want[0][3], want[1][7]])
    before_each_pass(lambda batch: sizes.append(len(batch._mask)))
    ends = end_tokens(loaded)
    for full, tokens in zip(want, decode(loaded, prompts, [16] * 8, TokenBudget(WORLD)), strict=True):
        first = next((at for at, token in enumerate(full) if token in ends), len(full))
        assert tokens == full[: first + 1]
    assert sizes[0] == 8 and sizes == sorted(sizes, reverse=True) and sizes[-1] < 8


def test_a_batch_that_runs_out_of_memory_is_halved_and_resumed(tiny_loaded, before_each_pass):
    loaded, prompts = tiny_loaded("llama"), some_prompts(8, 6)
    want, room = decode(loaded, prompts, [8] * 8, TokenBudget(WORLD)), TokenBudget(200)

    def scarce(batch):
        if len(batch._mask) * batch.length > 60:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    before_each_pass(scarce)
    assert decode(loaded, prompts, [8] * 8, room) == want
    assert room.most < 200
    before_each_pass(lambda batch: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory.")))
    with pytest.raises(UserError, match="max_new_tokens"):  # not even one row fits
        decode(loaded, [[5]], [4], TokenBudget(2, "try a smaller --max_new_tokens"))


def test_no_more_tokens_are_in_memory_than_the_room_allows(tiny_loaded, before_each_pass):
    filled = []
    before_each_pass(lambda batch: filled.append(len(batch._mask) * batch.length))
    decode(tiny_loaded("llama"), some_prompts(8, 6), [12] * 8, TokenBudget(50))
    assert 40 < max(filled) <= 50


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 200), max_size=60), st.integers(1, 64), st.integers(1, 512))
def test_a_plan_has_every_row_once_longest_first_within_the_budget(lengths, batch_size, max_new_tokens):
    batches = plan_batches(lengths, batch_size, max_new_tokens)
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    assert [lengths[row] for batch in batches for row in batch] == sorted(lengths, reverse=True)
    assert all(len(batch) >= batch_size for batch in batches[:-1])
    budget, answer = token_budget(lengths, batch_size, max_new_tokens), min(64, max_new_tokens)
    assert all(len(batch) * (lengths[batch[0]] + answer) <= budget for batch in batches)


def test_neither_the_padding_token_nor_positions_left_to_the_model_change_an_answer(tiny_loaded, monkeypatch):
    loaded, prompts, limits = tiny_loaded("llama"), some_prompts(5, 9), [6] * 5
    want, real = decode(loaded, prompts, limits, TokenBudget(WORLD)), loaded.model.forward
    other = replace(loaded, tokenizer=SimpleNamespace(pad_token_id=300, eos_token_id=END))
    assert decode(other, prompts, limits, TokenBudget(WORLD)) == want

    def forward(input_ids, attention_mask, past_key_values, use_cache, logits_to_keep):
        positions = (attention_mask.cumsum(1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
        options = {"past_key_values": past_key_values, "use_cache": use_cache, "logits_to_keep": logits_to_keep}
        return real(input_ids=input_ids, attention_mask=attention_mask, position_ids=positions, **options)

    monkeypatch.setattr(loaded.model, "forward", forward)
    assert decode(loaded, prompts, limits, TokenBudget(WORLD)) == want


def test_a_tokenizer_that_ends_every_text_changes_no_prompt(tiny_loaded):
    loaded, ending = tiny_loaded("llama"), tiny_tokenizer()
    ending.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A {EOS}", special_tokens=[(BOS, ending.bos_token_id), (EOS, ending.eos_token_id)]
    )
    other = replace(loaded, tokenizer=ending)
    assert ending("a").input_ids[-1] == ending.eos_token_id and other.adds_bos
    for text in ("", "a", "What is hot?", f"a{EOS}"):
        assert other.encode(text) == loaded.encode(text) == loaded.tokenizer(text).input_ids
    plain = replace(loaded, tokenizer=tiny_tokenizer(adds_bos=False))
    assert plain.encode("") == [] and not plain.adds_bos


@pytest.mark.parametrize("behind", [f"{EOS} {EOS}", "[SEP]", f"{EOS} [SEP]", BOS])
def test_whatever_special_tokens_a_tokenizer_puts_behind_every_text_change_no_prompt(tiny_loaded, behind):
    """As BERT's, which some Chinese GPT-2 have, put a separator there."""
    loaded, other = tiny_loaded("llama"), tiny_tokenizer()
    other.add_special_tokens({"sep_token": "[SEP]"})
    ids = [(token, other.convert_tokens_to_ids(token)) for token in (BOS, EOS, "[SEP]")]
    other.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A {behind}", special_tokens=ids
    )
    for text in ("", "a", "What is hot?", f"a{EOS}"):
        assert replace(loaded, tokenizer=other).encode(text) == loaded.encode(text)


def test_a_tokenizer_that_puts_words_behind_every_text_is_refused(tiny_loaded):
    with pytest.raises(UserError, match=r"adds tokens after the prompt \('Q'\)"):
        replace(tiny_loaded("llama"), tokenizer=ending_with("Q")).encode("hot?")


def test_the_chat_templates_end_of_turn_ends_an_answer(tiny_loaded):
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    assert end_of_turn(tokenizer) == set()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>\n{% endfor %}"
    ends = {tokenizer.convert_tokens_to_ids("<|im_end|>"), tokenizer.eos_token_id}
    assert end_tokens(replace(tiny_loaded("llama"), tokenizer=tokenizer)) == ends
    for template in ("{{ raise_exception('no') }}", "{% for", "{{ messages[0].content }}"):
        tokenizer.chat_template = template
        assert end_of_turn(tokenizer) == set()


def test_texts_of_unlike_lengths_share_no_batch_where_padding_is_read(tiny_loaded, monkeypatch):
    """As a state space without a mask does (RecurrentGemma, in test_architectures.py)."""
    loaded, prompts, lengths = tiny_loaded("llama"), some_prompts(9, 6), []
    want = decode(loaded, prompts, [5] * 9, TokenBudget(WORLD)), first_token_log_probs(loaded, prompts, 4)
    monkeypatch.setattr("soteria.answering.decoding.padding_is_exact", lambda loaded: False)
    real = Batch.__init__
    monkeypatch.setattr(
        Batch,
        "__init__",
        lambda batch, model, texts: (lengths.append({*map(len, texts)}), real(batch, model, texts))[1],
    )
    assert decode(loaded, prompts, [5] * 9, TokenBudget(WORLD)) == want[0]
    torch.testing.assert_close(first_token_log_probs(loaded, prompts, 4), want[1], rtol=0, atol=1e-4)
    assert all(len(each) == 1 for each in lengths)


def test_a_model_whose_numbers_are_not_finite_gives_no_answers(tiny_loaded, monkeypatch):
    """Its most probable token would be the first one, again and again."""
    loaded, split = tiny_loaded("llama"), Split(*[[Example("hot", "cold")] * 20] * 3)
    monkeypatch.setattr(
        loaded.model.lm_head, "forward", lambda states: states @ torch.full((32, VOCABULARY), torch.nan)
    )
    for ask in (
        lambda: decode(loaded, [[5, 6]], [2], TokenBudget(WORLD)),
        lambda: first_token_log_probs(loaded, [[5, 6]], 1),
        lambda: icl_accuracy(loaded, {"antonym": split}, 0, 1),
    ):
        with pytest.raises(UserError, match="not finite in float32"):
            ask()
