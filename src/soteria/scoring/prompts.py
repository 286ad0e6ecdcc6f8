"""In-context-learning data: loading, splitting, sampling prompts, and which token of a prompt plays which role.

Knows text and tokenizers; knows nothing of models. The sampling protocol is the original release's (after Todd et al.,
2024, *Function Vectors in Large Language Models*), draw by draw, so that a seed means the same prompts.
"""

import json
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from sklearn.model_selection import train_test_split

from soteria.errors import UserError

TASKS = ("antonym", "country-capital", "country-currency", "sentiment", "ag_news")

# Index of each class in a four-dimensional effect, and the label that marks its tokens.
TOKEN_CLASSES = (
    "demonstration",
    "label",
    "separator",
    "predictive",
    "structural",
    "end_of_example",
    "query_demonstration",
    "query_structural",
    "query_separator",
    "query_predictive",
)
_NUMBERED = re.compile(r"demonstration_\d+(_label)?")


@dataclass(frozen=True)
class Pair:
    """One example of a task: `Q: {input}` is answered by `A: {output}`."""

    input: str
    output: str


@dataclass(frozen=True)
class PromptForm:
    """How examples are written: `Q: input\\nA: output\\n\\n`, the words of `--prefixes` and `--separators`."""

    prefixes: dict[str, str] = field(default_factory=lambda: {"input": "Q:", "output": "A:", "instructions": ""})
    separators: dict[str, str] = field(default_factory=lambda: {"input": "\n", "output": "\n\n", "instructions": ""})

    def starting_with(self, bos_text: str) -> "PromptForm":
        """The same form behind a beginning-of-text marker, for tokenizers that add none themselves."""
        return replace(self, prefixes={**self.prefixes, "instructions": bos_text + self.prefixes["instructions"]})


@dataclass(frozen=True)
class Prompt:
    """Demonstrations and a query. `parts` are its pieces of text in order, each with the role its tokens get."""

    demonstrations: Sequence[Pair]
    query: Pair
    form: PromptForm

    @property
    def parts(self) -> list[tuple[str, str]]:
        prefix, separator = self.form.prefixes, self.form.separators
        parts = [(prefix["instructions"], "bos"), (separator["instructions"], "separator")]
        for i, pair in enumerate(self.demonstrations, start=1):
            parts += [
                (prefix["input"], "structural"),
                (" " + pair.input, f"demonstration_{i}"),
                (separator["input"], "separator"),
                (prefix["output"], "structural+predictive"),
                (" " + pair.output, f"demonstration_{i}_label"),
                (separator["output"], "end_of_example+separator"),
            ]
        parts += [
            (prefix["input"], "query_structural"),
            (" " + self.query.input, "query_demonstration"),
            (separator["input"], "query_separator"),
            (prefix["output"], "query_structural+query_predictive"),
        ]
        return parts

    @property
    def text(self) -> str:
        return "".join(text for text, _ in self.parts)

    @property
    def answer(self) -> str:
        """What continues the prompt when the query is answered rightly."""
        return " " + self.query.output


def load_pairs(path: Path) -> list[Pair]:
    """Read a task file, a JSON list of `{"input", "output"}`. Raises UserError naming the file and the row."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no dataset file {path}; check --dataset_name and --root_data_dir") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); expected a list of {{'input', 'output'}}") from None
    if not isinstance(rows, list):
        raise UserError(f"{path} is not a JSON list of {{'input', 'output'}}")
    pairs = []
    for i, row in enumerate(rows):
        if not isinstance(row, dict) or any(not isinstance(row.get(key), str) for key in ("input", "output")):
            raise UserError(f"{path}: row {i} needs the texts 'input' and 'output'")
        pairs.append(Pair(row["input"], row["output"]))
    return pairs


@dataclass(frozen=True)
class Split:
    train: list[Pair]
    test: list[Pair]
    valid: list[Pair]


def split_pairs(pairs: list[Pair], test_split: float, seed: int) -> Split:
    """Rows into train and rest, the rest by the same call into test and valid, as the original does."""
    try:
        train, rest = train_test_split(pairs, test_size=test_split, random_state=seed)
        test, valid = train_test_split(rest, test_size=test_split, random_state=seed)
    except ValueError as error:
        raise UserError(f"{len(pairs)} rows cannot be split with --test_split {test_split}: {error}") from None
    return Split(train, test, valid)


def draw_prompt(split: Split, n_shots: int, form: PromptForm, *, shuffle_labels: bool) -> Prompt:
    """One prompt from numpy's global generator: demonstrations of `train`, a query of `valid`, shuffled labels or not.

    The order of the draws is part of the sampling protocol. Raises UserError if there are fewer rows than shots.
    """
    if n_shots > len(split.train):
        raise UserError(f"--n_shots {n_shots} is more than the {len(split.train)} training rows")
    shown = [split.train[i] for i in np.random.choice(len(split.train), n_shots, replace=False)]
    query = split.valid[np.random.choice(np.arange(len(split.valid)), 1, replace=False)[0]]
    if shuffle_labels:
        outputs = np.random.permutation([pair.output for pair in shown]).tolist()
        shown = [Pair(pair.input, output) for pair, output in zip(shown, outputs, strict=True)]
    return Prompt(shown, query, form)


@dataclass(frozen=True)
class TokenRole:
    """What one token is in a prompt: its label, the part it belongs to, and its place in that part.

    All tokens of a word of the data have place 0: they share one mean slot.
    """

    label: str
    part: int
    place: int

    @property
    def token_class(self) -> str:
        """The class in TOKEN_CLASSES (`demonstration_3_label` → `label`), or the label itself where it is in none."""
        numbered = _NUMBERED.fullmatch(self.label)
        return ("label" if numbered[1] else "demonstration") if numbered else self.label


def token_roles(prompt: Prompt, tokenizer) -> list[TokenRole]:
    """The role of each token of `tokenizer(prompt.text)`, a beginning-of-text token that it adds included (`bos`).

    A part's tokens are those by which the tokenized text grows when the part is appended. Of a part with the label
    `a+b` one token is set apart: the last of a prefix is `predictive`, the first of a separator is `end_of_example`.
    """
    roles = [TokenRole("bos", -1, i) for i in range(len(tokenizer("").input_ids))]
    n_special, text = len(roles), ""
    for index, (piece, label) in enumerate(prompt.parts):
        if not piece:
            continue
        text += piece
        n_before, n_now = len(roles) - n_special, len(tokenizer.tokenize(text))
        del roles[n_special + n_now :]  # a piece may melt into the token before it
        n_own = max(0, n_now - n_before)
        first, _, last = label.rpartition("+")
        labels = [first or last] * n_own
        if n_own and first == "end_of_example":
            labels = [first] + [last] * (n_own - 1)
        elif n_own and first:
            labels[-1] = last
        is_word = "demonstration" in label
        roles += [TokenRole(own, index, 0 if is_word else place) for place, own in enumerate(labels)]
    return roles


class MeanSlots:
    """Where the mean of a token's activations is kept: one slot a token of the prompt whose every word is `a`.

    Prompts of one form differ in the tokens of their words, which share a slot, and now and then in a separator that a
    tokenizer melts into the word before it. A token without a slot of its own uses the last one before it.
    """

    def __init__(self, n_shots: int, form: PromptForm, tokenizer):
        roles = token_roles(Prompt([Pair("a", "a")] * n_shots, Pair("a", "a"), form), tokenizer)
        places = sorted({(role.part, role.place) for role in roles})
        self._slot = {place: slot for slot, place in enumerate(places)}
        self._places = places

    def __len__(self) -> int:
        return len(self._places)

    def of(self, role: TokenRole) -> int:
        place = (role.part, role.place)
        return self._slot.get(place, max(0, bisect_right(self._places, place) - 1))


def answer_token(prompt: Prompt, tokenizer) -> int:
    """Id of the first token of the query's answer, as it is tokenized in context."""
    n_prompt = len(tokenizer(prompt.text).input_ids)
    return tokenizer(prompt.text + prompt.answer).input_ids[n_prompt]
