"""Step 2: from indirect effects to a language's functional heads, and from languages to groups of them.

Knows effects and lists of `[layer, head]`; knows nothing of models or text.
"""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from soteria.errors import UserError
from soteria.languages import PAPER_LANGUAGES, group_languages
from soteria.scoring.prompts import TOKEN_CLASSES
from soteria.scoring.run import load_tensor
from soteria.storage import files
from soteria.storage.paths import effect_path, group_file, language_file

Head = tuple[int, int]  # (layer, head), both from 0


def mean_effect(results: Path, language: str, tasks: list[str]) -> Tensor:
    """Effect of each head averaged over trials and tasks, (n_layers, n_heads), float64.

    A four-dimensional effect counts by its `query_predictive` class. Raises UserError for missing or misshapen files
    and for scores that are not numbers.
    """
    means = []
    for task in tasks:
        path = effect_path(results, f"{task}_{language}")
        effect = load_tensor(path)
        if effect.ndim == 4 and effect.shape[-1] == len(TOKEN_CLASSES):
            effect = effect[..., TOKEN_CLASSES.index("query_predictive")]
        if effect.ndim != 3 or not effect.numel():
            raise UserError(f"{path} has shape {tuple(effect.shape)}, expected (trials, layers, heads[, 10])")
        if not torch.isfinite(effect).all():
            raise UserError(f"{path} holds effects that are not finite numbers; score it again")
        means.append(effect.double().mean(dim=0))
        if means[-1].shape != means[0].shape:
            raise UserError(f"{path} is of another model: {tuple(means[-1].shape)} heads, not {tuple(means[0].shape)}")
    return torch.stack(means).mean(dim=0)


def scored_languages(results: Path, tasks: list[str]) -> list[str]:
    """The paper's languages of which every task has been scored, in the group rule's order."""
    return [
        language.name
        for language in PAPER_LANGUAGES
        if all(effect_path(results, f"{task}_{language.name}").exists() for task in tasks)
    ]


def rank_heads(effect: Tensor) -> list[Head]:
    """All heads by effect (n_layers, n_heads), largest first, ties by layer, then head."""
    order = torch.argsort(effect.flatten(), descending=True, stable=True).tolist()
    return [divmod(index, effect.shape[1]) for index in order]


def count_top(top: float, n_heads_total: int) -> int:
    """How many heads `top` means: a fraction below 1 of all heads, rounded down, or a whole number of them."""
    if 0 < top < 1:
        return max(1, int(top * n_heads_total + 1e-9))
    if top >= 1 and float(top).is_integer() and top <= n_heads_total:
        return int(top)
    raise UserError(f"--top {top:g} is neither a fraction between 0 and 1 nor a number of heads up to {n_heads_total}")


def count_share(share: float, n_heads_total: int) -> int:
    """How many heads a share of all is, above 0 and up to 1, which here means all of them."""
    return n_heads_total if share == 1 else count_top(share, n_heads_total)


def group_heads(lists: list[list[Head]]) -> list[Head]:
    """Heads in more than half of the lists, most frequent first, equal counts in order of first appearance."""
    counts = Counter(head for heads in lists for head in dict.fromkeys(heads))
    return [head for head, count in counts.most_common() if count > len(lists) / 2]


def random_heads(n_layers: int, n_heads: int, count: int, seed: int) -> list[Head]:
    """A control: `count` different heads drawn at random."""
    picked = np.random.default_rng(seed).choice(n_layers * n_heads, count, replace=False)
    return [divmod(int(index), n_heads) for index in picked]


def read_heads(path: Path) -> list[Head]:
    """A head list, as written here or by the original release. Raises UserError naming the file and what is wrong."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no head list {path}; make it with select_heads.py or give another head folder") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is no JSON head list ({error})") from None
    if not isinstance(rows, list) or not rows:
        raise UserError(f"{path} is no list of [layer, head]")
    for i, row in enumerate(rows):
        if not isinstance(row, list) or len(row) != 2 or not all(type(x) is int and x >= 0 for x in row):
            raise UserError(f"{path}: entry {i} is {row!r}, not [layer, head]")
    heads = [(layer, head) for layer, head in rows]
    if len(set(heads)) < len(heads):
        twice = next(head for head, count in Counter(heads).items() if count > 1)
        raise UserError(f"{path} names head {list(twice)} twice")
    return heads


def write_heads(path: Path, heads: list[Head]) -> None:
    """Write a head list as JSON, whole or not at all."""
    files.write_text(path, json.dumps([list(head) for head in heads]) + "\n")


def write_group(folder: Path, group: str) -> list[Head]:
    """Write the group's list from its languages' lists in the same folder. Raises UserError where one is missing."""
    heads = group_heads([read_heads(folder / language_file(language)) for language in group_languages(group)])
    if not heads:
        raise UserError(f"no head is in more than half of the lists of group {group!r} in {folder}")
    write_heads(folder / group_file(group), heads)
    return heads


def check_heads(heads: list[Head], n_layers: int, n_heads: int, source: object, model: str) -> None:
    """Raise UserError where a head lies outside the model."""
    for layer, head in heads:
        if layer >= n_layers or head >= n_heads:
            raise UserError(
                f"{source} names head [{layer}, {head}], but {model} has {n_layers} layers of {n_heads} heads"
            )
