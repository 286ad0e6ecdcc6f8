"""In-context prompts: task data and its splits, the sampling protocol, and the role of every token of a prompt.

Input: the `<task>_<Language>.json` files and a tokenizer. Output: a `Prompt`, a `TokenRole` for each of its tokens, and
the slot that holds each token's mean activation. The sampling protocol is the original release's, draw by draw (after
Todd et al., 2024, *Function Vectors in Large Language Models*), so a seed gives the same prompts.
"""

import fnmatch
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from sklearn.model_selection import train_test_split

from soteria import disk
from soteria.errors import UserError
from soteria.models.encoding import encode
from soteria.storage.csv_files import is_text

TASKS = ("antonym", "country-capital", "country-currency", "sentiment", "ag_news")
TEST_SPLIT, SEED = 0.3, 42  # the original release's
FIRST, WHOLE = ANSWERS = ("first", "whole")  # what of the query's answer is scored: its first token, or all of it

# The last dimension of a four-dimensional effect.
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
PARTS = ("input", "output", "instructions")  # of a prompt, which have a prefix and a separator each
WORD_CLASSES = ("demonstration", "label", "query_demonstration")  # the texts that come from the data


@dataclass(frozen=True)
class Example:
    """One input of a task and its output."""

    input: str
    output: str


@dataclass(frozen=True)
class PromptForm:
    """How examples are written: `Q: input\\nA: output\\n\\n` by default.

    Raises UserError for keys other than the default's, what is not text, and nothing between the parts of examples.
    """

    prefixes: dict[str, str] = field(default_factory=lambda: {"input": "Q:", "output": "A:", "instructions": ""})
    separators: dict[str, str] = field(default_factory=lambda: {"input": "\n", "output": "\n\n", "instructions": ""})

    def __post_init__(self):
        for what, texts in (("prefixes", self.prefixes), ("separators", self.separators)):
            if unknown := {*texts} - {*PARTS}:
                raise UserError(f"{what} has {min(unknown)!r}; its keys are {', '.join(PARTS)}")
            if wrong := [key for key, text in texts.items() if not is_text(text)]:
                raise UserError(f"{what} has no valid text for {wrong[0]!r}")
        if empty := [key for key in PARTS[:2] if not self.separators.get(key)]:
            raise UserError(f"the separator {empty[0]!r} is empty, which leaves the parts of an example undivided")

    def starting_with(self, bos_text: str) -> "PromptForm":
        """The same form after a beginning-of-text marker, for tokenizers that add none themselves."""
        return replace(self, prefixes={**self.prefixes, "instructions": bos_text + self.prefixes["instructions"]})


@dataclass(frozen=True)
class Prompt:
    """Demonstrations, then a query without its output."""

    demonstrations: Sequence[Example]
    query: Example
    form: PromptForm

    @property
    def parts(self) -> list[tuple[str, str]]:
        """The pieces of the text in order, each with the class of its tokens (`a+b`: see `token_roles`)."""
        prefix, separator = self.form.prefixes, self.form.separators
        parts = [(prefix["instructions"], "bos"), (separator["instructions"], "separator")]
        for example in self.demonstrations:
            parts += [
                (prefix["input"], "structural"),
                (" " + example.input, "demonstration"),
                (separator["input"], "separator"),
                (prefix["output"], "structural+predictive"),
                (" " + example.output, "label"),
                (separator["output"], "end_of_example+separator"),
            ]
        return [
            *parts,
            (prefix["input"], "query_structural"),
            (" " + self.query.input, "query_demonstration"),
            (separator["input"], "query_separator"),
            (prefix["output"], "query_structural+query_predictive"),
        ]

    @property
    def text(self) -> str:
        return "".join(text for text, _ in self.parts)

    @property
    def answer(self) -> str:
        """The text that continues the prompt if the query is answered correctly."""
        return " " + self.query.output


def expand_datasets(patterns: list[str], root: Path) -> list[str]:
    """Dataset names for names or globs, in the order given; the matches of a glob are in alphabetical order.

    Raises UserError for a pattern that matches no `<root>/<name>.json`.
    """
    if not root.is_dir():
        raise UserError(f"no folder {root}; --root_data_dir must be the folder of the <task>_<Language>.json files")
    known = sorted(path.stem for path in root.glob("*.json"))
    names: dict[str, None] = {}
    for pattern in patterns:
        found = [pattern] if pattern in known else [name for name in known if fnmatch.fnmatchcase(name, pattern)]
        if not found:
            raise UserError(f"no dataset {pattern!r} in {root}, which has {', '.join(known[:5]) or 'none'} …")
        names.update(dict.fromkeys(found))
    return list(names)


def load_examples(path: Path) -> list[Example]:
    """Read a task file, a JSON list of `{"input", "output"}`. Raises UserError naming the file and the row."""
    rows = disk.load_json(path, f"no dataset file {path}; check the name of the dataset and its folder")
    if not isinstance(rows, list):
        raise UserError(f"{path} is not a JSON list of {{'input', 'output'}}")
    for i, row in enumerate(rows):
        if not isinstance(row, dict) or any(not isinstance(row.get(key), str) for key in ("input", "output")):
            raise UserError(f"{path}: row {i} must have the texts 'input' and 'output'")
        if empty := next((key for key in ("input", "output") if not row[key].strip()), None):
            raise UserError(f"{path}: row {i} has an empty {empty!r}; fill it in, or remove the row")
        if row["output"][0].isspace():  # which would be the first token of the answer
            raise UserError(f"{path}: the 'output' of row {i} begins with white space; remove that")
    return [Example(row["input"], row["output"]) for row in rows]


@dataclass(frozen=True)
class Split:
    train: list[Example]
    test: list[Example]
    valid: list[Example]


def split_examples(examples: list[Example], test_split: float = TEST_SPLIT, seed: int = SEED) -> Split:
    """Rows split into train and rest, and the rest by the same call into test and valid, as in the original release.

    Raises UserError for a share that is none, and one that leaves a part without rows.
    """
    if not 0 < test_split < 1:
        raise UserError(f"--test_split {test_split} is not between 0 and 1; give a share such as {TEST_SPLIT}")
    try:
        train, rest = train_test_split(examples, test_size=test_split, random_state=seed)
        return Split(train, *train_test_split(rest, test_size=test_split, random_state=seed))
    except ValueError:  # of scikit-learn, in words of its own
        fix = "give more rows, or a share nearer to one half"
        raise UserError(f"{len(examples)} rows are too few for --test_split {test_split}; {fix}") from None


def draw_prompt(split: Split, n_shots: int, form: PromptForm, *, shuffle_labels: bool) -> Prompt:
    """Draw `n_shots` demonstrations from `train` and a query from `valid`, with numpy's global generator.

    The order of the draws is part of the sampling protocol. Raises UserError if there are fewer rows than shots.
    """
    check_shots(split, n_shots)
    shown = [split.train[i] for i in np.random.choice(len(split.train), n_shots, replace=False)]
    query = split.valid[np.random.choice(np.arange(len(split.valid)), 1, replace=False)[0]]
    if shuffle_labels:
        outputs = np.random.permutation([example.output for example in shown]).tolist()
        shown = [Example(example.input, output) for example, output in zip(shown, outputs, strict=True)]
    return Prompt(shown, query, form)


def check_shots(split: Split, n_shots: int) -> None:
    """Raise UserError if there are fewer training rows than shots."""
    if n_shots > len(split.train):
        raise UserError(f"--n_shots {n_shots} is more than the {len(split.train)} training rows")


class TokenRole(NamedTuple):
    """A token's class (`bos` or one of TOKEN_CLASSES), the index of its part of the prompt, and its place in the part.

    All tokens of a text from the data have place 0, so they share one mean slot.
    """

    token_class: str
    part: int
    place: int


def token_roles(prompt: Prompt, tokenizer) -> list[TokenRole]:
    """The role of each token of the encoded prompt, including a beginning-of-text token that is added (`bos`).

    A part's tokens are those by which the tokenized text grows when the part is appended. In a part of class `a+b`, one
    token stands out: the last one of a prefix is `predictive`, the first one of a separator is `end_of_example`.
    """
    roles = [TokenRole("bos", -1, i) for i in range(len(encode(tokenizer, "")))]
    n_special, text = len(roles), ""
    for part, (piece, name) in enumerate(prompt.parts):
        if not piece:
            continue
        text += piece
        n_before, n_now = len(roles) - n_special, len(tokenizer.tokenize(text))
        del roles[n_special + n_now :]  # a piece may merge with the token before it
        first, _, last = name.partition("+")
        n_own = max(0, n_now - n_before)
        classes = [first] * n_own
        if last == "separator":
            classes[1:] = [last] * (n_own - 1)
        elif last:
            classes[-1:] = [last] * min(n_own, 1)
        roles += [TokenRole(own, part, 0 if name in WORD_CLASSES else place) for place, own in enumerate(classes)]
    if roles:  # a tokenizer may merge the last prefix whole into the token before it, which then predicts the answer
        roles[-1] = roles[-1]._replace(token_class="query_predictive")
    return roles


class MeanSlots:
    """Slots for the means of tokens' activations: one for each token of the prompt whose every text is `a`.

    Prompts of one form differ in the tokens of their texts, which share a slot, and sometimes in a separator that a
    tokenizer merges with the text before it. A token without a slot of its own uses the last slot before it.
    """

    def __init__(self, n_shots: int, form: PromptForm, tokenizer):
        roles = token_roles(Prompt([Example("a", "a")] * n_shots, Example("a", "a"), form), tokenizer)
        self._places = sorted({(role.part, role.place) for role in roles})

    def __len__(self) -> int:
        return len(self._places)

    def of(self, role: TokenRole) -> int:
        return max(0, bisect_right(self._places, (role.part, role.place)) - 1)


def answer_tokens(prompt: Prompt, tokenizer, scored: str) -> list[int]:
    """The ids of the query's answer in context: its `first` token or the `whole`.

    Raises UserError where the tokenizer merges the answer into the prompt.
    """
    own, ids = encode(tokenizer, prompt.text), encode(tokenizer, prompt.text + prompt.answer)
    if len(ids) <= len(own) or ids[: len(own)] != own:
        raise UserError(f"the tokenizer merges the answer {prompt.answer!r} into the prompt; it cannot be scored")
    return ids[len(own) :] if scored == WHOLE else [ids[len(own)]]


def count_first_tokens(examples: Sequence[Example], form: PromptForm, tokenizer) -> dict[str, int]:
    """How many different `answers` a task has, and how many different `first_tokens` these have in context."""
    prompts = [Prompt([], Example("a", output), form) for output in {example.output for example in examples}]
    first = {token for prompt in prompts for token in answer_tokens(prompt, tokenizer, FIRST)}
    return {"answers": len(prompts), "first_tokens": len(first)}
