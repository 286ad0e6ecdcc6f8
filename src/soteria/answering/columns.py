"""Step 3.2's files: a model's answers as a column of a CSV, the facts of their making beside it, and what runs share.

Knows file layouts; loads no model. Beside `<answers>.csv` lie `<answers>.json` (facts), while it is being made a
journal, and in `base_answers/` the base's answers, which all scaling factors share.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import safetensors.torch
from torch import Tensor

from soteria.answering.questions import QuestionSet
from soteria.errors import UserError
from soteria.languages import Language
from soteria.models.checkpoints import Checkpoint
from soteria.steering.checkpoint import fingerprint
from soteria.storage import files, paths
from soteria.storage.csv_files import read_table, write_table
from soteria.storage.journal import Journal
from soteria.storage.paths import ANSWER_COLUMNS, BASE_ANSWER, FACTS, first_token_file

# Files beside the weights that say how text becomes tokens and when an answer ends.
SMALL_FILES = (".json", ".jinja", ".model", ".txt")


def model_settings(name: str, language: Language, max_new_tokens: int, chat_template: bool) -> dict:
    """What answers depend on beside the questions, the model by a hash of samples of its files.

    Raises UserError for what is no model.
    """
    checkpoint = Checkpoint.open(name)
    digest = hashlib.sha256(fingerprint(checkpoint).encode())
    for path in sorted(checkpoint.folder.iterdir()):
        if path.suffix in SMALL_FILES and path.name != FACTS:
            digest.update(path.name.encode() + path.read_bytes())
    return {
        "model_sha256": digest.hexdigest(),
        "language": language.name,  # the instruction is in it
        "max_new_tokens": max_new_tokens,
        "chat_template": chat_template,
    }


@dataclass(frozen=True)
class AnswerColumn:
    """One model's answers to a set of questions. `settings` is what they depend on, `model` the model's name.

    `steered` says how a model was steered in place; of a steered model's folder it is known.
    """

    output: Path
    column: str
    questions: QuestionSet
    model: str
    settings: dict
    with_first_tokens: bool = False
    steered: dict | None = None

    @property
    def facts_file(self) -> Path:
        return self.output.with_suffix(".json")

    @property
    def _made_from(self) -> dict:
        asked = hashlib.sha256(json.dumps(self.questions.questions).encode()).hexdigest()
        return self.settings | {"questions_sha256": asked}

    @property
    def _shared(self) -> Path:
        """The place, less its ending, of what the base's runs share."""
        name = f"{paths.model_slug(self.model)}_{self.settings['language']}_{self.questions.name}"
        digest = hashlib.sha256(json.dumps(self._made_from, sort_keys=True).encode()).hexdigest()[:12]
        return self.output.parent / "base_answers" / f"{name}_{digest}"

    @property
    def is_shared(self) -> bool:
        return self.column == BASE_ANSWER

    @property
    def _journal_file(self) -> Path:
        if self.is_shared:
            return self._shared.with_name(f"{self._shared.name}.jsonl")
        return self.output.with_name(f".{self.output.name}.{ANSWER_COLUMNS[self.column][1]}.journal")

    def journal(self) -> Journal:
        """The rows answered so far. The base's journal stays when the column is complete, and the next run finds it."""
        return Journal(self._journal_file, self._made_from)

    def forget_journal(self) -> None:
        """Remove the journal, once the column is complete."""
        if not self.is_shared:
            self._journal_file.unlink(missing_ok=True)

    @property
    def first_tokens(self) -> Path:
        return (
            self._shared.with_name(f"{self._shared.name}.first_token.safetensors")
            if self.is_shared
            else first_token_file(self.output, self.column)
        )

    @property
    def lacks_first_tokens(self) -> bool:
        """Whether they are wanted and have to be computed. Only the shared place says what they were made from."""
        return self.with_first_tokens and not (self.is_shared and self.first_tokens.exists())

    def save_first_tokens(self, log_probs: Tensor) -> None:
        with files.whole_file(self.first_tokens) as sibling:
            safetensors.torch.save_file({"log_probs": log_probs}, sibling)

    def is_complete(self) -> bool:
        """Whether the column is there, made with the same settings. Raises UserError where other questions are."""
        if not self.output.exists():
            return False
        found = read_table(self.output, ["Question"])
        if list(found.get("Question", [])) != self.questions.questions:
            raise UserError(f"{self.output} holds answers to other questions; give another --output or remove it")
        made = files.read_facts(self.facts_file).get("columns", {}).get(self.column)
        complete = self.column in found.columns and made is not None and self.settings.items() <= made.items()
        return complete and (not self.with_first_tokens or first_token_file(self.output, self.column).exists())

    def save(self, answers: list[str]) -> None:
        """Put the column into the CSV, beside the other one where it is there, and its facts into the JSON."""
        table = pd.DataFrame({"Question": self.questions.questions})
        if self.output.exists():
            table = read_table(self.output, ["Question"])
        table[self.column] = answers
        if self.with_first_tokens and self.is_shared:
            with files.whole_file(first_token_file(self.output, self.column)) as sibling:
                sibling.write_bytes(self.first_tokens.read_bytes())
        facts = files.read_facts(self.facts_file)
        steered = self.steered or files.read_facts(Path(self.model) / FACTS)
        made = self.settings | {"model": self.model, "steered": steered and steered | {"heads": None}}
        write_table(table[["Question", *(column for column in ANSWER_COLUMNS if column in table.columns)]], self.output)
        files.write_json(
            self.facts_file,
            {
                "language": self.settings["language"],
                "dataset": self.questions.name,
                "rows": len(table),
                **({"categories": self.questions.categories} if self.questions.categories else {}),
                "columns": facts.get("columns", {}) | {self.column: made},
            },
        )
