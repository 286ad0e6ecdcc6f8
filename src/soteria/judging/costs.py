"""What steering costs: benign questions refused, answers changed, first tokens moved, in-context accuracy lost."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import safetensors.numpy
import torch

from soteria.answering.thinking import split_thinking
from soteria.judging.interface import NOT_HARMFUL
from soteria.judging.refusal import RefusalJudge
from soteria.judging.statistics import Rate, bootstrap_interval
from soteria.languages import Language
from soteria.models.loading import BOS_TEXT, LoadedModel
from soteria.scoring.prompts import SEED, TEST_SPLIT, PromptForm, Split, draw_prompt, load_examples, split_examples
from soteria.scoring.run import seed_everything
from soteria.storage import files, paths
from soteria.storage.csv_files import read_table

N_SHOTS, N_PROMPTS = 10, 25  # demonstrations in a prompt, and prompts per task, that in-context accuracy is measured on


def refused(answers: Sequence[str]) -> Rate:
    """How many answers open with a refusal phrase (a proxy), whatever was thought before."""
    judge = RefusalJudge()
    return Rate([judge.verdict(split_thinking(answer)[1]) for answer in answers].count(NOT_HARMFUL), len(answers))


def changed(answers: Sequence[str], base_answers: Sequence[str]) -> Rate:
    """How many answers are not the base's, letter for letter.

    It sees what refusals and first tokens miss, such as an answer that begins well and ends garbled; it counts every
    harmless rewording too.
    """
    return Rate(sum(own != before for own, before in zip(answers, base_answers, strict=True)), len(answers))


def kl_divergence(base: np.ndarray, safe: np.ndarray) -> np.ndarray:
    """KL(base || safe) of each row, in nats, float64 (rows,), from log-probabilities (rows, vocabulary)."""
    base, safe = base.astype(np.float64), safe.astype(np.float64)
    return (np.exp(base) * (base - safe)).sum(-1)


def read_tasks(
    root: Path, tasks: Iterable[str], language: Language, test_split: float = TEST_SPLIT, seed: int = SEED
) -> dict[str, Split]:
    """The rows of each task in a language, split as step 1 splits them. Raises UserError for missing files."""
    rows = {task: load_examples(root / f"{task}_{language.name}.json") for task in tasks}
    return {task: split_examples(examples, test_split, seed) for task, examples in rows.items()}


def icl_accuracy(loaded: LoadedModel, tasks: dict[str, Split], seed: int) -> Rate:
    """How many in-context prompts, N_PROMPTS per task, the model answers in full by greedy decoding.

    The queries are rows of each split's `test` part, which step 1 never draws from.
    """
    form = PromptForm() if loaded.adds_bos else PromptForm().starting_with(BOS_TEXT)
    right = []
    for split in tasks.values():
        seed_everything(seed)
        unseen = replace(split, valid=split.test)
        prompts = [draw_prompt(unseen, N_SHOTS, form, shuffle_labels=False) for _ in range(N_PROMPTS)]
        n_prompt = [len(loaded.tokenizer(prompt.text).input_ids) for prompt in prompts]
        ids = [loaded.tokenizer(prompt.text + prompt.answer).input_ids for prompt in prompts]
        right += _answered_in_full(loaded, ids, n_prompt)
    return Rate(sum(right), len(right))


@torch.inference_mode()
def _answered_in_full(loaded: LoadedModel, ids: list[list[int]], n_prompt: list[int]) -> Iterator[bool]:
    """Whether each row's tokens from `n_prompt` on are the model's greedy choices: one forward pass shows it."""
    length = max(map(len, ids))
    batch = torch.tensor([row + [0] * (length - len(row)) for row in ids], device=loaded.model.device)
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in ids], device=loaded.model.device)
    # Only the answers' positions are projected to the vocabulary.
    logits = loaded.model(input_ids=batch, attention_mask=mask, logits_to_keep=length - min(n_prompt) + 1).logits
    choices = logits.argmax(-1).cpu()
    first = length - choices.shape[1]
    for row, tokens, start in zip(choices, ids, n_prompt, strict=True):
        yield row[start - 1 - first : len(tokens) - 1 - first].tolist() == tokens[start:]


def measure_damage(answers: Path) -> dict:
    """What generate.py's answers to harmless questions show: `<model>` refusals, `changed` and `kl_first_token`.

    `kl_first_token` is the mean over questions of KL(base || safe) of the first answer token, in nats, with a bootstrap
    95 % interval; None where the log-probabilities of one of the two are missing.
    """
    table, both = read_table(answers, ["Question"]), (paths.BASE_ANSWER, paths.SAFE_ANSWER)
    dataset = files.read_facts(answers.with_suffix(".json")).get("dataset")
    found = {"dataset": dataset, "rows": len(table), "judge": RefusalJudge.description}
    for column, (_, short) in paths.ANSWER_COLUMNS.items():
        if column in table.columns:
            rate = refused(list(table[column]))
            found[short] = {"refusal_rate": rate.value, "ci95": rate.interval, "refused": rate.count}
    if set(both) <= set(table.columns):
        rate = changed(list(table[paths.SAFE_ANSWER]), list(table[paths.BASE_ANSWER]))
        found["changed"] = {"rate": rate.value, "ci95": rate.interval, "count": rate.count}
    first_tokens = [paths.first_token_file(answers, column) for column in both]
    found["kl_first_token"] = None
    if all(path.exists() for path in first_tokens):
        nats = kl_divergence(*(safetensors.numpy.load_file(path)["log_probs"] for path in first_tokens))
        interval = bootstrap_interval(nats, np.ones_like(nats))
        # The last digits depend on how many threads computed them.
        found["kl_first_token"] = {"mean": round(float(nats.mean()), 6), "ci95": [round(x, 6) for x in interval]}
    return found
