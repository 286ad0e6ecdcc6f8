"""What steering costs: benign questions refused, answers changed, first tokens moved, in-context accuracy lost."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from soteria.answering.columns import read_first_tokens
from soteria.answering.decoding import padding_is_exact
from soteria.answering.facts import check_answers, check_one_base, column_digest, read_answer_facts
from soteria.answering.thinking import split_thinking
from soteria.errors import UserError
from soteria.judging.interface import DEGENERATE, NOT_HARMFUL
from soteria.judging.refusal import RefusalJudge
from soteria.judging.statistics import Rate, bootstrap_interval
from soteria.languages import Language
from soteria.models.batches import left_padded, positions, takes_positions
from soteria.models.loading import BOS_TEXT, LoadedModel
from soteria.scoring.prompts import SEED, TEST_SPLIT, PromptForm, Split, draw_prompt, load_examples, split_examples
from soteria.scoring.run import seed_everything
from soteria.storage import paths
from soteria.storage.csv_files import read_table

N_SHOTS, N_PROMPTS = 10, 25  # demonstrations in a prompt, and prompts per task, that in-context accuracy is measured on


def refused_and_degenerate(answers: Sequence[str], questions: Sequence[str]) -> tuple[Rate, Rate]:
    """How many answers decline, and how many are damaged instead (both by the refusal judge, a proxy).

    What was thought before an answer does not count.
    """
    judge, rows = RefusalJudge(), zip(answers, questions, strict=True)
    verdicts = [judge.verdict(split_thinking(answer)[1], question) for answer, question in rows]
    return Rate(verdicts.count(NOT_HARMFUL), len(answers)), Rate(verdicts.count(DEGENERATE), len(answers))


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


def icl_accuracy(loaded: LoadedModel, tasks: dict[str, Split], seed: int, n_prompts: int | None = None) -> Rate:
    """How many in-context prompts the model answers in full by greedy decoding.

    `n_prompts` (default: N_PROMPTS) are drawn per task. The queries are rows of each split's `test` part, which step 1
    never draws from.
    """
    form = PromptForm() if loaded.adds_bos else PromptForm().starting_with(BOS_TEXT)
    right = []
    for split in tasks.values():
        seed_everything(seed)
        unseen = replace(split, valid=split.test)
        prompts = [draw_prompt(unseen, N_SHOTS, form, shuffle_labels=False) for _ in range(n_prompts or N_PROMPTS)]
        n_prompt = [len(loaded.encode(prompt.text)) for prompt in prompts]
        ids = [loaded.encode(prompt.text + prompt.answer) for prompt in prompts]
        rows = list(zip(ids, n_prompt, strict=True))
        for part in [rows] if padding_is_exact(loaded) else [[row] for row in rows]:
            right += _answered_in_full(loaded, *map(list, zip(*part, strict=True)))
    return Rate(sum(right), len(right))


@torch.inference_mode()
def _answered_in_full(loaded: LoadedModel, ids: list[list[int]], n_prompt: list[int]) -> Iterator[bool]:
    """Whether each row's tokens from `n_prompt` on are the model's greedy choices: one forward pass shows it."""
    tokens, mask = (each.to(loaded.model.device) for each in left_padded(ids, 0))
    given = {"position_ids": positions(mask)} if takes_positions(loaded.model) else {}
    n_answers = [len(row) - start for row, start in zip(ids, n_prompt, strict=True)]
    keep = {"logits_to_keep": max(n_answers) + 1}
    logits = loaded.model(input_ids=tokens, attention_mask=mask, **given, **keep).logits
    choices = loaded.finite(logits).argmax(-1).cpu()
    for chosen, row, n in zip(choices, ids, n_answers, strict=True):
        yield chosen[-n - 1 : -1].tolist() == row[-n:]


def measure_damage(answers: Path) -> dict:
    """What generate.py's answers to harmless questions show, as JSON: refusals, `changed` and `kl_first_token`.

    Of each model the refusals are a rate, and degenerate answers, which are no refusals, a count of their own.
    `kl_first_token` is the mean over questions of KL(base || safe) of the first answer token, in nats, with a bootstrap
    95 % interval; None where the log-probabilities of one of the two are missing.
    """
    table, both = read_table(answers, ["Question"]), (paths.BASE_ANSWER, paths.SAFE_ANSWER)
    facts, answered = read_answer_facts(answers), [column for column in both if column in table.columns]
    if "Question" not in table.columns:
        raise UserError(f"{answers} needs the column Question; give answers that generate.py wrote")
    check_answers(answers, facts, {column: column_digest(table, column) for column in answered}, len(table))
    check_one_base(answers, facts.get("columns", {}))
    found = {"dataset": facts.get("dataset"), "rows": len(table), "judge": RefusalJudge.description}
    for column, (_, short) in paths.ANSWER_COLUMNS.items():
        if column in table.columns:
            rate, degenerate = refused_and_degenerate(list(table[column]), list(table["Question"]))
            found[short] = {"refusal_rate": rate.value, "ci95": rate.interval, "refused": rate.count}
            found[short]["degenerate"] = degenerate.count
    if set(both) <= set(table.columns):
        rate = changed(list(table[paths.SAFE_ANSWER]), list(table[paths.BASE_ANSWER]))
        found["changed"] = {"rate": rate.value, "ci95": rate.interval, "count": rate.count}
    first_tokens = [paths.first_token_file(answers, column) for column in both]
    found["kl_first_token"] = None
    if all(path.exists() for path in first_tokens):
        log_probs = [read_first_tokens(path, len(table)) for path in first_tokens]
        if any(each is None for each in log_probs) or len({each.shape for each in log_probs}) > 1:
            raise UserError(f"{first_tokens[0]} and {first_tokens[1].name} are not of these answers; remove both")
        nats = kl_divergence(*(each.numpy() for each in log_probs))
        interval = bootstrap_interval(nats, np.ones_like(nats))
        # The last digits depend on how many threads computed them.
        found["kl_first_token"] = {"mean": round(float(nats.mean()), 6), "ci95": [round(x, 6) for x in interval]}
    return found
