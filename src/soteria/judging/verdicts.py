"""Judging a CSV of answers: reading the answers, journaling verdicts as they come, and writing or reusing them.

In: `<answers>.csv` and a judge. Out: the CSV with verdict columns, a JSON beside it, and while judging a journal. The
journal of verdicts on the base model's answers is kept in `base_verdicts/`, shared by every scaling factor.
"""

import hashlib
import logging
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NotRequired

from pydantic import AfterValidator
from tqdm import tqdm
from typing_extensions import TypedDict

from soteria.answering.facts import check_answers, check_one_base, column_digest, hashed, read_answer_facts
from soteria.answering.questions import CATEGORY_COLUMNS
from soteria.answering.thinking import split_thinking
from soteria.errors import UserError
from soteria.judging.formats import CONTROVERSIAL
from soteria.judging.interface import (
    BLANK_ANSWER,
    CONTENT_FILTER,
    EMPTY,
    FAILED,
    FILTERED,
    LABELS,
    Judge,
    label_of,
    reason_of,
    refusal_of,
    unjudged,
    with_refusal,
    word_of,
)
from soteria.judging.judges import judge_basis
from soteria.judging.presets import JudgeSettings
from soteria.storage import files, paths
from soteria.storage.csv_files import CsvFile, has_return, read_table, write_rows
from soteria.storage.journal import Journal
from soteria.storage.paths import (
    ANSWER_COLUMNS,
    BASE_ANSWER,
    REFUSAL_COLUMNS,
    SAFE_ANSWER,
    THINKING_COLUMNS,
    facts_file,
)
from soteria.storage.side_files import Count, Text, read_noted, side_file

UNREAD_ROWS = 16  # rows without one verdict, for whatever reason, after which a run stops: no row would fare better
_TOLD = {True: "yes", False: "no", None: ""}  # in the columns of refusals
FAILED_CALLS = "failed_calls"  # in the JSON of a run whose failed calls the same command asks again

_log = logging.getLogger(__name__)


def _known(verdict: str) -> str:
    if label_of(verdict) == EMPTY and not verdict.startswith(EMPTY):
        raise ValueError("not what a judge gives")
    return verdict


@side_file
class VerdictCounts(TypedDict, total=False):
    unjudged: dict[Text, Count]


@side_file
class VerdictFacts(TypedDict):
    """The JSON beside a CSV of verdicts."""

    judge: Text
    rows: Count
    judge_description: Text
    inputs_sha256: str
    verdicts_sha256: NotRequired[str]
    safe: NotRequired[VerdictCounts]
    base: NotRequired[VerdictCounts]


class AnswerFile:
    """A CSV of answers, which is never in memory whole.

    Raises UserError if a column is missing, it has no rows, or the facts beside it are those of other answers.
    """

    def __init__(self, path: Path):
        self.path, self.table = path, CsvFile.open(path, ["Question"])
        # Answer column -> verdict column
        self.columns = {name: verdict for name, (verdict, _) in ANSWER_COLUMNS.items() if name in self.table.columns}
        if "Question" not in self.table.columns or not self.columns:
            raise UserError(f"{path} needs the column Question and one of {', '.join(ANSWER_COLUMNS)}")
        self.n_rows, self.has_return, categories = 0, False, []
        self._hashes: array[int] | None = None
        hashes = array("q")
        digests = {column: hashlib.sha256() for column in self.columns}
        filed = next((name for name in CATEGORY_COLUMNS if name in self.table.columns), None)
        for row in self.rows():
            self.n_rows += 1
            hashes.append(hash(tuple(row.values())))
            self.has_return = self.has_return or has_return(list(row.values()))
            for column, digest in digests.items():
                digest.update(hashed(row["Question"], row[column]))
            if filed:
                categories.append(row[filed])
        if not self.n_rows:
            raise UserError(f"{path} has no rows to judge")
        self.digests = {column: digest.hexdigest() for column, digest in digests.items()}
        self._hashes, facts = hashes, read_answer_facts(path)
        check_answers(path, facts, self.digests, self.n_rows)
        check_one_base(path, facts.get("columns", {}))
        noted = facts.get("categories") or []
        self.categories = categories or (noted if len(noted) == self.n_rows else None)

    def rows(self) -> Iterator[dict[str, str]]:
        """Each row's texts by column. Raises UserError if the file was changed since it was opened."""
        changed = UserError(f"{self.path} was changed while its answers were judged; run again")
        n_read = 0
        for n_read, fields in enumerate(self.table.rows(), 1):
            if self._hashes is not None and (n_read > self.n_rows or hash(tuple(fields)) != self._hashes[n_read - 1]):
                raise changed
            yield dict(zip(self.table.columns, fields, strict=True))
        if self._hashes is not None and n_read < self.n_rows:
            raise changed

    def texts(self, column: str) -> Iterator[tuple[int, str, str]]:
        """Number, question and answer of each row; what a model thought before it answered is not its answer."""
        return ((number, row["Question"], split_thinking(row[column])[1]) for number, row in enumerate(self.rows()))


def inputs_of(
    answers: AnswerFile, judge: str, settings: JudgeSettings | None = None, harmful_labels: Sequence[str] = ()
) -> dict:
    """What verdicts depend on; a finished run with the same inputs is reused."""
    return {
        "judge": judge,
        "rows": answers.n_rows,
        "judge_basis_sha256": judge_basis(judge, settings, harmful_labels),
        "inputs_sha256": hashlib.sha256(str(answers.digests).encode()).hexdigest(),
    }


@dataclass(frozen=True)
class Judged:
    """What a judge gave per answer column, which `write` puts on disk."""

    answers: AnswerFile
    output: Path
    given: dict[str, list[str]]
    reasons: dict[str, Counter[str]]  # why rows have no verdict, per answer column
    description: str  # the judge's
    n_failed: int = 0  # calls that got no reply
    is_new: bool = True  # False: a finished run's verdicts

    @property
    def verdicts(self) -> dict[str, list[str]]:
        """Labels, or EMPTY, per answer column."""
        return {column: list(map(label_of, given)) for column, given in self.given.items()}

    def refusals(self, column: str) -> dict:
        """How many answers refuse, of those of which the judge tells; empty where it does not tell of any."""
        told = [refused for refused in map(refusal_of, self.given[column]) if refused is not None]
        return {"refused": sum(told), "refusal_told": len(told)} if told else {}

    def write(self, summary: dict) -> None:
        """Write the CSV and the summary beside it, each if it is new, and remove the journal of the safe answers.

        Old facts never stand beside new rows, whenever a run is killed. Where calls failed, the journal stays.
        """
        summary |= {"verdicts_sha256": _digest(self.given)}
        if self.n_failed:
            summary |= {FAILED_CALLS: self.n_failed}
        with files.held(self.output.parent):  # another judge may be writing the same files
            self._write(summary)

    def _write(self, summary: dict) -> None:
        if self.is_new:
            files.write_json(facts_file(self.output), {"inputs_sha256": ""})  # ours, and of no inputs yet
            told = [column for column in self.given if self.refusals(column)]
            names = [*self.answers.columns.values(), *(REFUSAL_COLUMNS[column] for column in told)]
            written = {*names, *REFUSAL_COLUMNS.values()}
            kept = [name for name in self.answers.table.columns if name not in written]
            words = [map(word_of, given) for given in self.given.values()]
            words += [[_TOLD[refusal_of(verdict)] for verdict in self.given[column]] for column in told]
            every = zip(self.answers.rows(), *words, strict=True)
            rows = ([row[name] for name in kept] + given for row, *given in every)
            write_rows(self.output, kept + names, rows, quote_all=self.answers.has_return, like=self.answers.path)
        if summary != files.read_json(facts_file(self.output)):
            files.write_json(facts_file(self.output), summary)
        if not self.n_failed:
            paths.verdict_journal(self.output).unlink(missing_ok=True)


def judge_answers(
    answers: AnswerFile, output: Path, inputs: dict, get_judge: Callable[[], Judge], *, retry_empty: bool = False
) -> Judged:
    """Verdicts on every answer column, from a finished run if there is one. `get_judge` is called only if needed.

    With `retry_empty`, rows that a run left without a verdict are judged again; those whose calls failed always are.
    Raises UserError as `check_columns` does, and after `UNREAD_ROWS` rows without one verdict.
    """
    known = _finished(output, inputs, answers)
    if known and not (retry_empty and any(reason_of(verdict) for given in known.values() for verdict in given)):
        facts, reasons = read_noted(facts_file(output), VerdictFacts), {}
        for column, given in known.items():
            noted = facts.get(ANSWER_COLUMNS[column][1], {}).get("unjudged")
            reasons[column] = Counter(noted or filter(None, map(reason_of, given)))
        return Judged(answers, output, known, reasons, facts["judge_description"], is_new=False)
    check_columns(output, answers)
    judge, every, reasons, n_failed = get_judge(), {}, {}, 0
    for column in answers.columns:
        settings = {name: inputs[name] for name in ("judge", "judge_basis_sha256")}
        settings["answers_sha256"] = answers.digests[column]
        path = paths.verdict_journal(output)
        if column == BASE_ANSWER:
            path = paths.base_verdict_journal(output, hashlib.sha256(str(settings).encode()).hexdigest()[:16])
        journal = Journal(path, settings, Annotated[Text, AfterValidator(_known)], range(answers.n_rows))
        with journal:
            # Another process that was waited for may be done meanwhile, and have removed what it had noted.
            known = known or _finished(output, inputs, answers)
            every[column] = _judge_column(judge, answers, column, journal, known.get(column, []), retry_empty)
        reasons[column] = Counter(filter(None, map(reason_of, every[column])))
        n_failed += sum(verdict.startswith(FAILED) for verdict in every[column])
    return Judged(answers, output, every, reasons, judge.description, n_failed)


def check_columns(output: Path, answers: AnswerFile) -> None:
    """Raise UserError for an earlier output with a column of the user's, which new verdicts would be written over."""
    if not output.exists():
        return
    known = {"Question", *ANSWER_COLUMNS, *THINKING_COLUMNS.values(), *REFUSAL_COLUMNS.values()}
    known |= {verdict for verdict, _ in ANSWER_COLUMNS.values()} | {*answers.table.columns}
    if others := [name for name in CsvFile.open(output, ["Question"]).columns if name not in known]:
        raise UserError(
            f"{output} has a column {others[0]!r:.80} that new verdicts would overwrite; give another --output"
        )


def _judge_column(
    judge: Judge, answers: AnswerFile, column: str, journal: Journal, known: list[str], retry_empty: bool
) -> list[str]:
    """What the judge gives for each row of a column, journaled as it comes, but for calls that failed.

    Rows without a verdict are held back until there is a verdict. `known` verdicts are reused. `journal` is entered.
    """
    blank, n_unread = unjudged(BLANK_ANSWER), 0
    held: dict[int, str] = {}
    failed: dict[int, str] = {}
    with tqdm(total=answers.n_rows, desc=column, unit="verdict", leave=None, disable=None) as bar:
        kept = {row: verdict for row, verdict in enumerate(known) if not reason_of(verdict)}
        if missing := {row: verdict for row, verdict in kept.items() if row not in journal.done}:
            journal.add(missing)
        done = {row for row, verdict in journal.done.items() if not (retry_empty and reason_of(verdict))}
        is_read = any(map(_is_read, journal.done.values()))
        bar.update(len(done))
        with closing(judge.judge(texts for texts in answers.texts(column) if texts[0] not in done)) as judged:
            for row, verdict in judged:
                bar.update()
                if verdict.startswith(FAILED):
                    failed[row] = verdict
                    continue
                held[row] = verdict
                is_read = is_read or _is_read(verdict)
                n_unread += verdict != blank
                if is_read:
                    journal.add(held)
                    held.clear()
                elif n_unread == UNREAD_ROWS:
                    reasons = Counter(reason_of(each) for each in held.values() if each != blank).most_common()
                    raise UserError(
                        f"{judge.description}: the first {UNREAD_ROWS} replies gave no verdict "
                        f"({', '.join(f'{n} × {reason}' for reason, n in reasons)}), such as {judge.unread}; "
                        "give another judge, --judge_format or --judge_prompt"
                    )
        if n_unread and held:
            _log.warning("%s: no verdict at all on %s; a reply was %s", judge.description, column, judge.unread)
        if held:
            journal.add(held)
        every = journal.done | failed
        return [every[row] for row in range(answers.n_rows)]


def _digest(given: dict[str, list[str]]) -> str:
    """The hash of what the file of verdicts says."""
    words = [(column, [(word_of(each), refusal_of(each)) for each in given[column]]) for column in sorted(given)]
    return hashlib.sha256(str(words).encode()).hexdigest()


def _is_read(verdict: str) -> bool:
    return reason_of(verdict) in (None, CONTROVERSIAL)


def given_verdicts(output: Path, inputs: dict, answers: AnswerFile) -> dict[str, list[str]]:
    """The labels, or EMPTY, of a run on the same inputs, also of one whose calls failed, per answer column.

    Nothing if there is no such run. Raises UserError for verdicts that were changed since.
    """
    return {column: list(map(label_of, given)) for column, given in _given(output, inputs, answers).items()}


def _finished(output: Path, inputs: dict, answers: AnswerFile) -> dict[str, list[str]]:
    """What a finished run on the same inputs was given, per answer column; nothing if there is no such run.

    Raises UserError as `given_verdicts` does.
    """
    is_part = FAILED_CALLS in read_noted(facts_file(output), VerdictFacts)
    return {} if is_part else _given(output, inputs, answers)


def _given(output: Path, inputs: dict, answers: AnswerFile) -> dict[str, list[str]]:
    facts = read_noted(facts_file(output), VerdictFacts)
    if not (output.exists() and inputs.items() <= facts.items()):
        return {}
    table, names = read_table(output, ["Question"]), answers.columns
    if not {"Question", *names, *names.values()} <= set(table.columns):
        return {}
    known = {*LABELS, EMPTY, FILTERED}
    if any(
        column_digest(table, column) != answers.digests[column] or {*table[names[column]]} - known for column in names
    ):
        return {}  # another's, or not what was written
    told = {word: refused for refused, word in _TOLD.items()}
    found = {}
    for column, name in names.items():
        refusals = table.get(REFUSAL_COLUMNS[column], [""] * len(table))
        found[column] = [
            unjudged(CONTENT_FILTER) if word == FILTERED else with_refusal(word, told.get(refused))
            for word, refused in zip(table[name], refusals, strict=True)
        ]
    if facts.get("verdicts_sha256", digest := _digest(found)) != digest:  # earlier versions did not note it
        raise UserError(f"{output} has other verdicts than the judge gave; put these back, or remove it to judge again")
    return found


def read_verdicts(path: Path, answers: AnswerFile) -> dict[str, list[str]]:
    """Another judge's verdicts per answer column, on the same questions in the same order.

    Raises UserError for other questions, for verdicts that stand beside other answers, for a file without verdicts,
    and, naming the row, for an unknown verdict.
    """
    other, names = read_table(path, ["Question"]), answers.columns
    if list(other.get("Question", [])) != [question for _, question, _ in answers.texts(next(iter(names)))]:
        raise UserError(f"{path} does not have the same questions in the same order; give verdicts on {answers.path}")
    known = {verdict.casefold(): verdict for verdict in (*LABELS, EMPTY)}
    known |= dict.fromkeys(("", FILTERED.casefold()), EMPTY)
    found = {column: [] for column, name in names.items() if name in other.columns}
    if not found:
        raise UserError(f"{path} has no column {' or '.join(names.values())}")
    for column, verdicts in found.items():
        if column in other.columns and column_digest(other, column) != answers.digests[column]:
            raise UserError(f"{path} has verdicts on another {column} than {answers.path}; give verdicts on the same")
        for row, word in enumerate(other[names[column]]):
            if (verdict := known.get(word.strip().casefold())) is None:
                where = f"{path}: {names[column]} in row {row}"
                raise UserError(f"{where} is {word!r}, not {', '.join(LABELS)} or {EMPTY}")
            verdicts.append(verdict)
    return found


def describe(answers: Path) -> dict:
    """Model, language, dataset and scaling factor as generate.py noted them beside the answers, None if unknown."""
    facts = read_answer_facts(answers)
    safe, base = (facts.get("columns", {}).get(column, {}) for column in (SAFE_ANSWER, BASE_ANSWER))
    steered = safe.get("steered") or {}
    return {
        "model": steered.get("base_model") or base.get("model") or safe.get("model"),
        "language": facts.get("language"),
        "dataset": facts.get("dataset"),
        "scaling_factor": steered.get("scaling_factor"),
    }
