"""The method beside its controls: what steering gains and what it costs, measured on one loaded model.

Gain: attack success rate (ASR) on policy questions. Cost: refusals of benign questions, how far the odds of their
answers' first token moved, accuracy in context. The heads are the language's own top ones, or as many random ones, as
many from the bottom of the ranking, or all.
"""

from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from soteria.answering.decoding import first_token_log_probs
from soteria.answering.generation import all_inputs, answer_questions
from soteria.answering.questions import read_questions
from soteria.judging.damage import kl_divergence
from soteria.judging.interface import HARMFUL, NOT_HARMFUL, Judge
from soteria.judging.statistics import Rate
from soteria.languages import Language
from soteria.models.loading import BOS_TEXT, LoadedModel
from soteria.models.task_vector import TaskVector
from soteria.scoring.heads import Head, random_heads
from soteria.scoring.prompts import TASKS, PromptForm, Split, draw_prompt, load_pairs, split_pairs
from soteria.scoring.run import seed_everything
from soteria.steering.formula import open_steering, steered_in_place
from soteria.storage import paths

METHOD = "top heads"
RATES = ("asr", "benign_refusals", "benign_changes", "icl_accuracy")
N_RANDOM = 3  # draws of random heads, whose counts are added up
# Seeds of the prompts that accuracy is measured on, in reports and in choosing a scaling factor. Neither is step 1's:
# the prompts that chose the heads are not used again.
ACCURACY_SEED, VALIDATION_SEED = 1042, 2042
MAX_NEW_TOKENS = 64  # the embedded models' answers end well before


def conditions(ranking: list[Head], count: int, n_layers: int, n_heads: int) -> dict[str, list[list[Head]]]:
    """Head lists by condition, the base model without any first. `ranking` holds all heads, best first."""
    return {
        "base": [[]],
        METHOD: [ranking[:count]],
        "random heads": [random_heads(n_layers, n_heads, count, seed) for seed in range(N_RANDOM)],
        "bottom heads": [ranking[-count:]],
        "all heads": [ranking],
    }


@dataclass(frozen=True)
class Measurement:
    """Four rates of one model in one language, and KL(base || model) of the first token of benign answers, in nats.

    `benign_changes` counts benign answers that are not the base's, letter for letter: what refusals and a first token
    do not show, such as an answer that begins well and ends garbled. `divergences` has one number for each benign
    question and model that was added up.
    """

    asr: Rate
    benign_refusals: Rate
    benign_changes: Rate
    icl_accuracy: Rate
    divergences: tuple[float, ...] = ()

    def __add__(self, other: "Measurement") -> "Measurement":
        rates = (Rate(a.count + b.count, a.n + b.n) for a, b in zip(self._rates(), other._rates(), strict=True))
        return Measurement(*rates, self.divergences + other.divergences)

    def _rates(self) -> tuple[Rate, ...]:
        return tuple(getattr(self, name) for name in RATES)

    def as_json(self) -> dict:
        rates = {
            name: {"value": rate.value, "ci95": rate.interval, "count": rate.count, "n": rate.n}
            for name, rate in zip(RATES, self._rates(), strict=True)
        }
        # The last digits depend on how many threads computed them.
        mean = round(sum(self.divergences) / len(self.divergences), 6) if self.divergences else None
        return rates | {"kl_first_token": {"value": mean}}


@dataclass(frozen=True)
class Benign:
    """A model's answers to the benign questions; log-probabilities of their first tokens (questions, vocabulary)."""

    answers: list[str]
    log_probs: Tensor


@dataclass(frozen=True)
class Bench:
    """What a model is measured on in one language."""

    language: Language
    policy: list[str]
    benign: list[str]
    tasks: dict[str, Split]  # task -> its rows, split as in step 1
    seed: int = ACCURACY_SEED
    n_prompts: int = 25  # a task

    @classmethod
    def read(cls, language: Language, policy: str, benign: str, seed: int = ACCURACY_SEED) -> "Bench":
        """A language's bench from `data/`: sets of questions by name. Raises UserError for missing ones."""
        questions = [
            read_questions(str(paths.DATA / folder / f"{name}_{language.name}.csv"), language).questions
            for folder, name in (("prompts", policy), ("benign", benign))
        ]
        return cls(language, *questions, read_tasks(paths.DATA / "icl", TASKS, language), seed)

    def measure(
        self, loaded: LoadedModel, judge: Judge, base: Benign | None = None, batch_size: int = 64
    ) -> tuple[Measurement, Benign]:
        """The measurement, and the benign answers that it was made from; `base` holds the base's, None for the base."""
        inputs = all_inputs(loaded, self.benign, self.language, chat_template=False)
        own = Benign(self._answers(loaded, self.benign, batch_size), first_token_log_probs(loaded, inputs, batch_size))
        base = base or own
        policy = self._verdicts(judge, self.policy, self._answers(loaded, self.policy, batch_size))
        refused = self._verdicts(judge, self.benign, own.answers).count(NOT_HARMFUL)
        changed = sum(answer != before for answer, before in zip(own.answers, base.answers, strict=True))
        measured = Measurement(
            Rate(policy.count(HARMFUL), len(self.policy)),
            Rate(refused, len(self.benign)),
            Rate(changed, len(self.benign)),
            self.icl_accuracy(loaded),
            tuple(kl_divergence(base.log_probs.numpy(), own.log_probs.numpy()).tolist()),
        )
        return measured, own

    def _answers(self, loaded: LoadedModel, questions: list[str], batch_size: int) -> list[str]:
        return answer_questions(loaded, questions, self.language, batch_size=batch_size, max_new_tokens=MAX_NEW_TOKENS)

    @staticmethod
    def _verdicts(judge: Judge, questions: list[str], answers: list[str]) -> list[str]:
        asked = ((row, *texts) for row, texts in enumerate(zip(questions, answers, strict=True)))
        verdicts = dict(judge.judge(asked))
        return [verdicts[row] for row in range(len(questions))]

    def icl_accuracy(self, loaded: LoadedModel) -> Rate:
        """How many of the in-context prompts, `n_prompts` a task, the model answers in full."""
        right = list(self._right_answers(loaded))
        return Rate(sum(right), len(right))

    def _right_answers(self, loaded: LoadedModel) -> Iterator[bool]:
        """Whether greedy decoding gives each query's whole answer. Queries are rows that step 1 does not use."""
        form = PromptForm() if loaded.adds_bos else PromptForm().starting_with(BOS_TEXT)
        for split in self.tasks.values():
            seed_everything(self.seed)
            unseen = replace(split, valid=split.test)
            prompts = [draw_prompt(unseen, 10, form, shuffle_labels=False) for _ in range(self.n_prompts)]
            n_prompt = [len(loaded.tokenizer(prompt.text).input_ids) for prompt in prompts]
            ids = [loaded.tokenizer(prompt.text + prompt.answer).input_ids for prompt in prompts]
            yield from answered_in_full(loaded, ids, n_prompt)


def read_tasks(root: Path, tasks: Iterable[str], language: Language) -> dict[str, Split]:
    """The rows of each task in a language, split as step 1 splits them. Raises UserError for missing files."""
    rows = {task: load_pairs(root / f"{task}_{language.name}.json") for task in tasks}
    return {task: split_pairs(pairs, 0.3, 42) for task, pairs in rows.items()}


@torch.inference_mode()
def answered_in_full(loaded: LoadedModel, ids: list[list[int]], n_prompt: list[int]) -> Iterator[bool]:
    """Whether each row's tokens from `n_prompt` on are the model's greedy choices: one pass, as good as decoding."""
    length = max(map(len, ids))
    batch = torch.tensor([row + [0] * (length - len(row)) for row in ids], device=loaded.model.device)
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in ids], device=loaded.model.device)
    # Only the answers' places are projected to the vocabulary.
    choices = loaded.model(input_ids=batch, attention_mask=mask, logits_to_keep=length - min(n_prompt) + 1).logits
    choices = choices.argmax(-1).cpu()
    first = length - choices.shape[1]
    for row, tokens, start in zip(choices, ids, n_prompt, strict=True):
        yield row[start - 1 - first : len(tokens) - 1 - first].tolist() == tokens[start:]


def compare(
    loaded: LoadedModel,
    vector: TaskVector,
    head_lists: dict[str, list[list[Head]]],
    scaling_factor: float,
    bench: Bench,
    judge: Judge,
) -> dict[str, Measurement]:
    """Each condition's measurement, the base's first; a condition's several head lists are added up."""
    opened = {
        condition: [heads and open_steering(vector, heads, scaling_factor, source=condition) for heads in lists]
        for condition, lists in head_lists.items()
    }
    found, base = {}, None
    for condition, steerings in opened.items():
        for steering in steerings:
            with steered_in_place(loaded, steering) if steering else nullcontext():
                measured, answered = bench.measure(loaded, judge, base)
            base = base or answered
            found[condition] = found[condition] + measured if condition in found else measured
    return found
