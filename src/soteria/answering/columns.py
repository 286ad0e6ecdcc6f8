"""A model's answers as one column of a CSV: what they depend on, whether they are complete, and how they are written.

In: a question set and the settings its answers depend on. Out: `<answers>.csv`, with `<answers>.json` saying how each
column was made, and a journal while one is being generated. The base model's journal is kept for other scaling factors.
What a model thinks before it answers stands in a column of its own.
"""

import hashlib
import json
import logging
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pandas as pd
import safetensors.torch
from torch import Tensor

from soteria.answering.chat import DATE
from soteria.answering.questions import QuestionSet
from soteria.answering.thinking import split_thinking
from soteria.errors import UserError
from soteria.languages import Language
from soteria.models.checkpoints import Checkpoint, model_digest, small_files
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

_log = logging.getLogger(__name__)


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
        return Journal(self._files[0], self._made_from)

    def forget_journal(self) -> None:
        """Remove the journal of a complete column; the base model's stays, for the next run to find."""
        if self.column != BASE_ANSWER:
            self._files[0].unlink(missing_ok=True)

    @property
    def lacks_first_tokens(self) -> bool:
        """Whether they are wanted and must be computed. Only the shared file's name says what they were made from."""
        return self.with_first_tokens and not (self.column == BASE_ANSWER and self._files[1].exists())

    def is_complete(self) -> bool:
        """Whether the column was made with the same settings. Raises UserError if the file has other questions."""
        if not self.output.exists():
            return False
        found = read_table(self.output, ["Question"])
        if list(found.get("Question", [])) != self.questions.questions:
            raise UserError(f"{self.output} has answers to other questions; remove it, or write to another place")
        made = files.read_facts(facts_file(self.output)).get("columns", {}).get(self.column)
        # Earlier versions did not note the dtype.
        made = made and {"dtype": self.settings.get("dtype")} | made
        complete = self.column in found.columns and bool(made) and self.settings.items() <= made.items()
        complete = complete and all(made.get(key) == self.settings.get(key) for key in ("preset", "engine"))
        return complete and (not self.with_first_tokens or first_token_file(self.output, self.column).exists())

    def save(self, answers: list[str], log_probs: Tensor | None, served: dict | None = None) -> None:
        """Write the column to the CSV, beside what other columns it has, and its facts to the JSON.

        `answers` are as `generate` gives them; what is thinking goes to the column's own.
        `log_probs` (questions, vocabulary) are those of each answer's first token, if the column lacks them. `served`:
        the facts of the engine that answered.
        """
        if log_probs is not None:
            with files.whole_file(self._files[1]) as sibling:
                sibling.write_bytes(safetensors.torch.save({"log_probs": log_probs}))  # save_file replaces the sibling
        if self.with_first_tokens and self.column == BASE_ANSWER:
            with files.whole_file(first_token_file(self.output, self.column)) as sibling:
                sibling.write_bytes(self._files[1].read_bytes())
        with files.held(self.output.parent):  # the other column's process reads and writes the same file
            self._write(answers, served)
        self.forget_journal()

    def _write(self, answers: list[str], served: dict | None) -> None:
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
        own = [name for name in ("Question", *ANSWER_COLUMNS, *THINKING_COLUMNS.values()) if name in table.columns]
        others = files.read_facts(facts_file(self.output)).get("columns", {})
        others = {name: made for name, made in others.items() if name != self.column}
        facts = {"language": self.settings["language"], "dataset": self.questions.name, "rows": len(table)}
        facts["read"] = self.questions.read
        if self.questions.categories:
            facts["categories"] = self.questions.categories
        # Without this column's: a killed run leaves no old facts beside new rows, and no rows that nobody claims.
        files.write_json(facts_file(self.output), facts | {"columns": others})
        write_table(table[[*own, *(name for name in table.columns if name not in own)]], self.output)
        found = files.read_facts(Path(self.model) / FACTS)
        steered = self.steered or (found if "scaling_factor" in found else {})  # a fine-tuned model has facts too
        steered = {name: _without_path(name, value) for name, value in steered.items()}
        made = self.settings | {"model": paths.model_name(self.model), "steered": steered and steered | {"heads": None}}
        made |= {"served": served} if served else {}
        files.write_json(facts_file(self.output), facts | {"columns": others | {self.column: made}})
