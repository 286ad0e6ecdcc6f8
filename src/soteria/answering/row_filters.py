"""Which rows of a question set are asked: conditions on columns, and sets that mix harmful and harmless rows.

In: rows as dicts. Out: whether a row is kept, or a UserError.
"""

import ast
import math
import re
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress

from soteria.errors import UserError

# Columns that say whether a question is harmful, human labels first. `type` is XSTest's: "contrast_…" are harmful.
HARM_COLUMNS = (
    "label", "prompt_harm_label", "prompt_label", "harm_label", "harmful", "is_harmful", "toxic", "is_safe", "safe",
    "level", "type",
)  # fmt: skip
_HARMFUL = ("unsafe", "harmful", "toxic", "malicious")
_HARMLESS = ("safe", "unharmful", "harmless", "not harmful", "benign")
_YES, _NO = ("yes", "true", "1"), ("no", "false", "0")


def items(value: object) -> list[str]:
    """A cell as texts: the elements of a list, even of one written as text, or else the one value."""
    if isinstance(value, str) and value.strip().startswith("["):
        with suppress(ValueError, SyntaxError):
            value = ast.literal_eval(value.strip())
    if isinstance(value, list | tuple):
        return [text for each in value for text in items(each)]
    if isinstance(value, float):  # a column of whole numbers with gaps
        value = None if math.isnan(value) else int(value) if value.is_integer() else value
    return ["" if value is None else str(value).strip()]


class RowFilter:
    """Conditions `column=value` or `column!=value`; a row must meet those of every column.

    Several values of a column mean any of them. Case does not matter, and a cell that holds a list has each element.
    Raises UserError for one that is malformed or names a column that is not there.
    """

    def __init__(self, dataset: str, columns: Sequence[str], where: Sequence[str]):
        self._dataset, self._wanted = dataset, {}
        self._seen: dict[str, Counter] = {}
        for condition in where:
            match = re.fullmatch(r"(.+?)\s*(!?=)\s*(.*)", condition.strip(), re.S)
            if not match:
                raise UserError(f"the condition {condition!r} must be column=value or column!=value")
            if match[1] not in columns:
                named = ", ".join(map(str, columns))
                raise UserError(f"{dataset} has no column {match[1]!r} for {condition!r}; its columns are {named}")
            self._wanted.setdefault((match[1], match[2]), set()).add(match[3].casefold())
        self.columns = list(dict.fromkeys(column for column, _ in self._wanted))
        # A user who chooses by such a column knows of the mix.
        watched = [] if set(self.columns) & set(HARM_COLUMNS) else [each for each in HARM_COLUMNS if each in columns]
        self._labels = {column: Counter() for column in watched}

    def keeps(self, values: dict) -> bool:
        """Whether a row meets all conditions."""
        for column in self.columns:
            self._seen.setdefault(column, Counter()).update(items(values.get(column)))
        kept = all(
            bool(wanted & {text.casefold() for text in items(values.get(column))}) == (sign == "=")
            for (column, sign), wanted in self._wanted.items()
        )
        if kept:
            for column, labels in self._labels.items():
                labels.update(items(values.get(column)))
        return kept

    def check(self) -> None:
        """Raise UserError, after all rows, for a value that no row has, and for a set that mixes harmful and harmless.

        A mistyped value would leave out rows, or none, without a word.
        """
        for (column, _), wanted in self._wanted.items():
            seen = self._seen.get(column, Counter())
            if missing := sorted(wanted - {text.casefold() for text in seen}):
                raise UserError(f"{self._dataset} has no row with {column}={missing[0]}; it has {_counted(seen)}")
        for column, labels in self._labels.items():
            harmful, harmless = (
                [each for each in labels if _is_harmful(column, each) is kind] for kind in (True, False)
            )
            if harmful and harmless:
                one = f"{column}={harmful[0]}" if len(harmful) == 1 else f"{column}!={harmless[0]}"
                raise UserError(
                    f"{self._dataset} mixes harmful and harmless questions, by its column {column!r} "
                    f"({_counted(labels)}); choose rows by a condition (where), such as {one}"
                )


def _is_harmful(column: str, text: str) -> bool | None:
    """What a label says of its question; None where it says nothing of harm."""
    text = text.casefold()
    if column == "type":
        return text.startswith("contrast_")
    if column == "level":  # of severity, as in LinguaSafe
        return text.removeprefix("l") != "0" if re.fullmatch(r"l?\d", text) else None
    if text in _HARMFUL or text in _HARMLESS:
        return text in _HARMFUL
    if text in _YES or text in _NO:
        return (text in _YES) != (column in ("is_safe", "safe"))
    return None


def _counted(values: Counter) -> str:
    return ", ".join(f"{n} × {value!r}" for value, n in values.most_common(20))
