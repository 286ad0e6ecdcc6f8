"""A model's answers as one column of a CSV: what they depend on, whether they are complete, and how they are written.

In: a question set and the settings its answers depend on. Out: `<answers>.csv`, with `<answers>.json` saying how each
column was made, and a journal while one is being generated. The base model's journal is kept for other scaling factors.
What a model thinks before it answers stands in a column of its own.
"""

import hashlib
import json
import logging
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pandas as pd
import safetensors.torch
from torch import Tensor

from soteria import disk
from soteria.answering.chat import DATE
from soteria.answering.facts import AnswerFacts, SteeredNote, check_answers, column_digest, same_base
from soteria.answering.questions import QuestionSet
from soteria.answering.thinking import split_thinking
from soteria.errors import UserError
from soteria.languages import Language
from soteria.models.checkpoints import Checkpoint, model_digest, small_files
from soteria.models.tensors import tensor_bytes
from soteria.storage import files, paths
from soteria.storage.csv_files import read_table, write_table
from soteria.storage.journal import Journal
from soteria.storage.paths import (
    ANSWER_COLUMNS,
    BASE_ANSWER,
    FACTS,
    THINKING_COLUMNS,
    facts_file,
    first_token_file,
)
from soteria.storage.side_files import Text, read_noted

_log = logging.getLogger(__name__)


def read_first_tokens(path: Path, n_rows: int) -> Tensor | None:
    """Log-probabilities (n_rows, vocabulary) of first tokens; None where they are missing, broken or of other rows."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            found, noted = file.get_tensor("log_probs"), (file.metadata() or {}).get("sha256")
    except (OSError, KeyError, safetensors.SafetensorError):
        return None
    is_sound = found.ndim == 2 and len(found) == n_rows and found.is_floating_point() and (found < 1e-3).all()
    return found if is_sound and noted in (None, _digest(found)) else None


def _digest(log_probs: Tensor) -> str:
    return hashlib.sha256(tensor_bytes(log_probs)).hexdigest()


def model_settings(
    name: str,
    language: Language,
    max_new_tokens: int,
    chat_template: bool,
    preset: str | None = None,
    engine: str | None = None,
) -> dict:
    """What answers depend on besides the questions. Raises UserError if `name` is not a model."""
    checkpoint = Checkpoint.open(name, whole=True)
    contents = [path.read_bytes() for path in small_files(checkpoint)]
    can_think, says_date = (any(mark in each for each in contents) for mark in (b"enable_thinking", b"strftime_now"))
    settings = {
        "model_sha256": model_digest(checkpoint),
        "language": language.name,  # its instruction is part of the prompt
        "max_new_tokens": max_new_tokens,
        "chat_template": chat_template,
    }
    settings |= {"preset": preset} if preset else {}
    settings |= {"engine": engine} if engine else {}
    if not chat_template:
        return settings
    # Answers of versions that let such a model think, or said the date of the day, are not kept.
    settings |= {"enable_thinking": False} if can_think else {}
    return settings | ({"template_date": DATE} if says_date else {})


def _without_path(name: str, value: object) -> object:
    """A fact of a steered model as it may be published; earlier versions noted paths."""
    if not isinstance(value, str) or name not in ("base_model", "finetune_model", "head_list"):
        return value
    return paths.list_name(value) if name == "head_list" else paths.model_name(value)


@dataclass(frozen=True)
class AnswerColumn:
    """One model's answers to a set of questions. `settings` are what they depend on, `model` is the model's name.

    `steered` says how a model steered in place was steered; for a steered model's folder, its facts file says so.
    """

    output: Path
    column: str
    questions: QuestionSet
    model: str
    settings: dict
    with_first_tokens: bool = False
    steered: dict | None = None

    @cached_property
    def _made_from(self) -> dict:
        asked = hashlib.sha256(json.dumps(self.questions.questions).encode()).hexdigest()
        return self.settings | {"questions_sha256": asked}

    @cached_property
    def _files(self) -> tuple[Path, Path]:
        """The journal and the first-token file that this run writes."""
        if self.column != BASE_ANSWER:
            return paths.answer_journal(self.output, self.column), first_token_file(self.output, self.column)
        digest = hashlib.sha256(json.dumps(self._made_from, sort_keys=True).encode()).hexdigest()[:12]
        name = f"{paths.model_slug(self.model)}_{self.settings['language']}_{self.questions.name}_{digest}"
        return paths.base_answer_files(self.output, name)

    def journal(self) -> Journal:
        """The rows answered so far."""
        return Journal(self._files[0], self._made_from, Text, range(len(self.questions.questions)))

    def forget_journal(self) -> None:
        """Remove the journal of a complete column; the base model's stays, for the next run to find."""
        if self.column != BASE_ANSWER:
            self._files[0].unlink(missing_ok=True)

    @property
    def lacks_first_tokens(self) -> bool:
        """Whether they are wanted and must be computed. Only the shared file's name says what they were made from."""
        n_rows = len(self.questions.questions)
        is_there = self.column == BASE_ANSWER and read_first_tokens(self._files[1], n_rows) is not None
        return self.with_first_tokens and not is_there

    def is_complete(self) -> bool:
        """Whether the column was made with the same settings.

        Raises UserError if the file has other questions, answers of another model's, or answers that were changed, or
        if it or one beside it cannot be written.
        """
        disk.check_output(self.output)
        for path in (facts_file(self.output), *self._files):
            disk.check_output(path, longest=files.LONGEST)
        if not self.output.exists():
            return False
        found = read_table(self.output, ["Question"])
        if list(found.get("Question", [])) != self.questions.questions:
            raise UserError(f"{self.output} has answers to other questions; remove it, or write to another place")
        facts = read_noted(facts_file(self.output), AnswerFacts)
        made = facts.get("columns", {}).get(self.column)
        self._check_base(facts)
        # Earlier versions did not note the dtype.
        made = made and {"dtype": self.settings.get("dtype")} | made
        complete = self.column in found.columns and bool(made) and self.settings.items() <= made.items()
        complete = complete and all(made.get(key) == self.settings.get(key) for key in ("preset", "engine"))
        if complete:
            check_answers(self.output, facts, {self.column: column_digest(found, self.column)}, len(found))
        first_tokens = first_token_file(self.output, self.column)
        return complete and (not self.with_first_tokens or read_first_tokens(first_tokens, len(found)) is not None)

    @cached_property
    def _steered_as(self) -> dict:
        """How the model was steered; nothing for one that was not, or whose weights are not those that were written."""
        if self.steered:
            return self.steered
        found = read_noted(Path(self.model) / FACTS, SteeredNote)
        if "scaling_factor" not in found:  # a fine-tuned model has facts too
            return {}
        return found if found.get("weights") in (None, self._weights) else {}

    @cached_property
    def _weights(self) -> str:
        return Checkpoint.open(self.model).fingerprint

    @property
    def _made(self) -> dict:
        """How the column is made, as facts."""
        steered = {name: _without_path(name, value) for name, value in self._steered_as.items()}
        made = self.settings | {"model": paths.model_name(self.model), "steered": steered and steered | {"heads": None}}
        return made | ({"weights": self._weights} if self.column == BASE_ANSWER else {})

    def _check_base(self, facts: dict) -> bool:
        """Whether the other column's answers are of the same base, as far as that is noted.

        Raises UserError if they are another model's.
        """
        others = {column: made for column, made in facts.get("columns", {}).items() if column != self.column}
        return not others or same_base(self.output, others | {self.column: self._made})

    def save(self, answers: list[str], log_probs: Tensor | None, served: dict | None = None) -> None:
        """Write the column to the CSV, beside what other columns it has, and its facts to the JSON.

        `answers` are as `generate` gives them; what is thinking goes to the column's own.
        `log_probs` (questions, vocabulary) are those of each answer's first token, if the column lacks them. `served`:
        the facts of the engine that answered.
        """
        with files.held(self.output.parent):  # the other column's process reads and writes the same files
            noted = read_noted(facts_file(self.output), AnswerFacts)
            if noted.get("columns", {}).pop(self.column, None):  # else a killed run leaves old facts beside new files
                files.write_json(facts_file(self.output), noted)
            if log_probs is not None:
                with files.whole_file(self._files[1]) as sibling:
                    sums = {"sha256": _digest(log_probs)}
                    sibling.write_bytes(safetensors.torch.save({"log_probs": log_probs}, sums))  # save_file replaces it
            if self.with_first_tokens and self.column == BASE_ANSWER:
                with files.whole_file(first_token_file(self.output, self.column)) as sibling:
                    sibling.write_bytes(self._files[1].read_bytes())
            self._write(answers, noted.get("columns", {}), served)
        self.forget_journal()

    def _write(self, answers: list[str], others: dict[str, dict], served: dict | None) -> None:
        """`others`: how the other columns were made."""
        new = not self.output.exists()
        table = pd.DataFrame({"Question": self.questions.questions}) if new else read_table(self.output, ["Question"])
        thinking, table[self.column] = zip(*map(split_thinking, answers), strict=True)
        table[THINKING_COLUMNS[self.column]] = thinking
        if not any(thinking):
            del table[THINKING_COLUMNS[self.column]]
        if unanswered := sum(
            bool(own) and not answer for own, answer in zip(thinking, table[self.column], strict=True)
        ):
            _log.warning(
                "%s: %d of %d answers are thinking only, and count as blank; give more --max_new_tokens",
                *(self.output, unanswered, len(answers)),
            )
        if not self._check_base({"columns": others}):
            for other in others:
                print(f"{self.output}: {other} left out, which the base gave with other weights", file=sys.stderr)
                table = table.drop(columns=[other, THINKING_COLUMNS[other]], errors="ignore")
            others = {}
        own = [name for name in ("Question", *ANSWER_COLUMNS, *THINKING_COLUMNS.values()) if name in table.columns]
        facts = {"language": self.settings["language"], "dataset": self.questions.name, "rows": len(table)}
        facts["read"] = self.questions.read
        if self.questions.categories:
            facts["categories"] = self.questions.categories
        # A killed run leaves no rows that nobody claims.
        files.write_json(facts_file(self.output), facts | {"columns": others})
        write_table(table[[*own, *(name for name in table.columns if name not in own)]], self.output)
        made = self._made | {"answers_sha256": column_digest(table, self.column)}
        made |= {"served": served} if served else {}
        files.write_json(facts_file(self.output), facts | {"columns": others | {self.column: made}})
