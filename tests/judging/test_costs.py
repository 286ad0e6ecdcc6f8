"""What steering costs: in-context accuracy against decoding token by token, on rows that step 1 never draws from."""

import pytest
import torch

from soteria.judging import costs
from soteria.judging.statistics import Rate
from soteria.languages import find_language
from soteria.storage import paths


@torch.no_grad()
def greedy(loaded, ids: list[int], n: int) -> list[int]:
    """The oracle: one full forward pass per token."""
    for _ in range(n):
        ids = [*ids, int(loaded.model(torch.tensor([ids])).logits[0, -1].argmax())]
    return ids


def test_an_answer_is_right_in_full_where_greedy_decoding_gives_it(tiny_loaded):
    for loaded in map(tiny_loaded, ("llama", "gpt2", "mistral-sliding", "gemma2")):
        prompts = [loaded.tokenizer(text).input_ids for text in ("Q: hot\nA:", "Q: the big old city\nA:", "no")]
        rows = []
        for prompt, n in zip(prompts, [3, 1, 4], strict=True):
            answer = greedy(loaded, prompt, n)
            for wrong in (None, len(answer) - 1, len(prompt)):  # none, the last, the first token
                rows.append([(token + 1) % 400 if at == wrong else token for at, token in enumerate(answer)])
        n_prompt = [len(prompt) for prompt in prompts for _ in range(3)]
        assert list(costs._answered_in_full(loaded, rows, n_prompt)) == [True, False, False] * 3


def test_accuracy_is_measured_on_rows_that_step_1_never_draws_from(tiny_loaded, monkeypatch):
    """With any seed and split of step 1: the queries are of its test rows, and as many per task as asked for."""
    asked, draw = [], costs.draw_prompt
    monkeypatch.setattr(costs, "draw_prompt", lambda *given, **kw: asked.append(draw(*given, **kw)) or asked[-1])
    monkeypatch.setattr(costs, "N_PROMPTS", 3)
    for test_split, seed in ((0.3, 42), (0.3, 7), (0.5, 42)):
        tasks = ("country-capital", "antonym")
        splits = costs.read_tasks(paths.DATA / "icl", tasks, find_language("hi"), test_split, seed)
        asked.clear()
        assert costs.icl_accuracy(tiny_loaded("llama"), splits, 1042).n == 2 * 3
        for prompts, split in zip((asked[:3], asked[3:]), splits.values(), strict=True):
            drawn = {row.input for row in (*split.train, *split.valid)}
            assert all(prompt.query.input not in drawn for prompt in prompts)


def test_refusals_and_changes_are_counted():
    answers = ["I'm sorry, but I can't help with that.", "Of course, gladly.", "Gladly."]
    questions = ["Why?", "Why?", "Is the whole house gladly painted?"]
    assert costs.refused_and_degenerate(answers, questions) == (Rate(1, 3), Rate(0, 3))
    assert costs.refused_and_degenerate([*answers[:2], questions[2]], questions) == (Rate(1, 3), Rate(1, 3))
    assert costs.changed(answers, [*answers[:2], "gladly."]) == Rate(1, 3)
    with pytest.raises(ValueError, match="zip"):
        costs.changed(answers, answers[:2])
