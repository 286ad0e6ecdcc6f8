"""Step 3.3's files: answers read row by row, their verdicts written down as they come, and verdicts of before.

Knows file layouts and the interface of a judge; counts nothing.
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from soteria.answering.questions import CATEGORY_COLUMNS
from soteria.errors import UserError
from soteria.judging.interface import EMPTY, HARMFUL, NOT_HARMFUL, Judge
from soteria.judging.judges import judge_basis
from soteria.storage import files, paths
from soteria.storage.csv_files import CsvFile, has_return, read_table, write_rows
from soteria.storage.journal import Journal
from soteria.storage.paths import ANSWER_COLUMNS, BASE_ANSWER


class Answers:
    """The CSV of the answers: read through once for what is to be known of it, and then row by row again."""

    def __init__(self, path: Path):
        self.path, self.table = path, CsvFile.open(path, ["Question"])
        self.columns = [column for column in ANSWER_COLUMNS if column in self.table.columns]
        if "Question" not in self.table.columns or not self.columns:
            raise UserError(f"{path} needs the column Question and one of {', '.join(ANSWER_COLUMNS)}")
        self.n_rows, self.has_return = 0, False
        digests = {column: hashlib.sha256() for column in self.columns}
        filed = next((name for name in CATEGORY_COLUMNS if name in self.table.columns), None)
        categories = []
        for fields in self.table.rows():
            self.n_rows += 1
            self.has_return = self.has_return or has_return(fields)
            for column, digest in digests.items():
                for text in (fields[self.place("Question")], fields[self.place(column)]):
                    digest.update(f"{len(text)} {text}".encode())
            if filed:
                categories.append(fields[self.place(filed)])
        if not self.n_rows:
            raise UserError(f"{path} has no rows to judge")
        self.digests = {column: digest.hexdigest() for column, digest in digests.items()}
        self.sha256 = hashlib.sha256(str(self.digests).encode()).hexdigest()
        noted = files.read_facts(path.with_suffix(".json")).get("categories") or []
        self.categories = categories or (noted if len(noted) == self.n_rows else None)

    def place(self, column: str) -> int:
        return self.table.columns.index(column)

    def texts(self, column: str) -> Iterator[tuple[int, str, str]]:
        """Number, question and answer of each row."""
        question, answer = self.place("Question"), self.place(column)
        return ((row, fields[question], fields[answer]) for row, fields in enumerate(self.table.rows()))

    def write_with(self, verdicts: dict[str, list[str]], path: Path) -> None:
        """Write the CSV with verdict columns behind the others."""
        names = [ANSWER_COLUMNS[column][0] for column in verdicts]
        kept = [place for place, name in enumerate(self.table.columns) if name not in names]
        rows = (
            [fields[place] for place in kept] + [given[row] for given in verdicts.values()]
            for row, fields in enumerate(self.table.rows())
        )
        write_rows(path, [self.table.columns[place] for place in kept] + names, rows, quote_all=self.has_return)


def inputs_of(answers: Answers, judge: str, judge_prompt: str | None = None) -> dict:
    """What verdicts depend on: the same inputs, the same verdicts."""
    return {
        "judge": judge,
        "rows": answers.n_rows,
        "judge_basis_sha256": judge_basis(judge, judge_prompt),
        "inputs_sha256": answers.sha256,
    }


@dataclass(frozen=True)
class Judged:
    """Verdicts per answer column, and what is left to do to have them on disk."""

    answers: Answers
    output: Path
    verdicts: dict[str, list[str]]
    description: str  # the judge's
    journals: list[Journal] | None  # None where a finished run gave the verdicts

    def write(self, summary: dict) -> None:
        """Write the CSV and the summary beside it, each if it is new; the journals are not needed any more."""
        if self.journals is not None:
            self.answers.write_with(self.verdicts, self.output)
        if summary != files.read_json(self.output.with_suffix(".json")):
            files.write_json(self.output.with_suffix(".json"), summary)
        for journal in self.journals or ():
            journal.remove()


def judge_answers(
    answers: Answers, output: Path, inputs: dict, get_judge: Callable[[], Judge], *, retry_empty: bool = False
) -> Judged:
    """Verdicts on every answer column, a finished run's where there is one. `get_judge` makes the judge, if needed.

    `retry_empty`: ask again for what a finished run left without a verdict.
    """
    known = read_finished(output, inputs, answers)
    if known and not (retry_empty and any(EMPTY in given for given in known.values())):
        _own_journal(output).unlink(missing_ok=True)  # left by a run that was killed at its very end
        return Judged(answers, output, known, files.read_json(output.with_suffix(".json"))["judge_description"], None)
    judge = get_judge()
    verdicts, journals = judge_all(judge, answers, output, inputs, known or {})
    return Judged(answers, output, verdicts, judge.description, journals)


def _own_journal(output: Path) -> Path:
    """Where verdicts on the safe model's answers are written down as they come."""
    return output.with_name(f".{output.name}.journal")


def judge_all(
    judge: Judge, answers: Answers, output: Path, inputs: dict, known: dict[str, list[str]]
) -> tuple[dict[str, list[str]], list[Journal]]:
    """The verdicts on each column, and the journals to remove once they are written down elsewhere.

    What `known` holds already is not asked again, unless it is EMPTY. The base's verdicts are made once for all scaling
    factors: their journal stays, in `base_verdicts/` beside the output.
    """
    verdicts, journals = {}, []
    for column in answers.columns:
        settings = {name: inputs[name] for name in ("judge", "judge_basis_sha256")} | {
            "answers_sha256": answers.digests[column]
        }
        if column == BASE_ANSWER:
            name = hashlib.sha256(str(settings).encode()).hexdigest()[:16]
            journal = Journal(output.parent / "base_verdicts" / f"{name}.jsonl", settings)
        else:
            journal = Journal(_own_journal(output), settings)
            journals.append(journal)
        with (
            journal,
            tqdm(total=answers.n_rows, desc=column, unit="verdict", leave=None, disable=None) as progress,
        ):
            given = known.get(column, [])
            again = {row for row, verdict in enumerate(given) if verdict == EMPTY}
            missing = set(range(len(given))) - again - journal.done.keys()
            if missing:
                journal.add({row: given[row] for row in sorted(missing)})
            done = set(journal.done) - again
            progress.update(len(done))
            pending = (texts for texts in answers.texts(column) if texts[0] not in done)
            with closing(judge.judge(pending)) as judged:
                for row, verdict in judged:
                    journal.add({row: verdict})
                    progress.update()
            verdicts[column] = [journal.done[row] for row in range(answers.n_rows)]
    return verdicts, journals


def read_finished(output: Path, inputs: dict, answers: Answers) -> dict[str, list[str]] | None:
    """The verdicts of a finished run on the same answers by the same judge, per answer column; None without one."""
    if not (output.exists() and inputs.items() <= files.read_facts(output.with_suffix(".json")).items()):
        return None
    table = read_table(output, ["Question"])
    names = {column: ANSWER_COLUMNS[column][0] for column in answers.columns}
    if len(table) != answers.n_rows or not set(names.values()) <= set(table.columns):
        return None
    return {column: list(table[name]) for column, name in names.items()}


def read_verdicts(path: Path, answers: Answers) -> dict[str, list[str]]:
    """Another judge's verdicts per answer column, for the same questions in the same order.

    Raises UserError for other questions, no verdicts, or a word that is no verdict, by its row.
    """
    other = read_table(path, ["Question"])
    if list(other.get("Question", [])) != [question for _, question, _ in answers.texts(answers.columns[0])]:
        raise UserError(f"{path} is not of the same questions in the same order; it cannot be compared")
    names = {column: ANSWER_COLUMNS[column][0] for column in answers.columns}
    wanted = {column: name for column, name in names.items() if name in other.columns}
    if not wanted:
        raise UserError(f"{path} has no column {' or '.join(names.values())}")
    known = {verdict.casefold(): verdict for verdict in (HARMFUL, NOT_HARMFUL, EMPTY)} | {"": EMPTY}
    for name in wanted.values():
        for row, word in enumerate(other[name]):
            if word.strip().casefold() not in known:
                raise UserError(f"{path}: {name} of row {row} is {word!r}, not {HARMFUL}, {NOT_HARMFUL} or {EMPTY}")
    return {column: [known[word.strip().casefold()] for word in other[name]] for column, name in wanted.items()}


def describe(answers: Path) -> dict:
    """What generate.py noted beside the answers: model, language, dataset, scaling factor; None where unknown."""
    facts = files.read_facts(answers.with_suffix(".json"))
    made = facts.get("columns", {})
    safe, base = made.get(paths.SAFE_ANSWER, {}), made.get(paths.BASE_ANSWER, {})
    return {
        "model": safe.get("steered", {}).get("base_model") or base.get("model") or safe.get("model"),
        "language": facts.get("language"),
        "dataset": facts.get("dataset"),
        "scaling_factor": safe.get("steered", {}).get("scaling_factor"),
    }
