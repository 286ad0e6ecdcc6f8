"""Head selection (step 2): rank heads by their mean indirect effect, and combine languages' lists into group lists.

Input: the effect files of step 1. Output: lists of `(layer, head)`, best first, and their JSON files.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from typing_extensions import TypedDict

from soteria import disk
from soteria.errors import UserError
from soteria.languages import PAPER_LANGUAGES, group_languages
from soteria.models.tensors import UNQUANTIZED, load_tensor
from soteria.scoring.notes import say_unsigned, scored_with
from soteria.scoring.prompts import TASKS, TOKEN_CLASSES
from soteria.storage import files, outputs
from soteria.storage.paths import FACTS, effect_path, language_file, names_another
from soteria.storage.side_files import Text, read_noted, side_file
from soteria.terminal import say_once

Head = tuple[int, int]  # (layer, head), both from 0
FORM = ("n_shots", "prefixes", "separators")  # settings of step 1 that make prompts unlike


@side_file
class ListFacts(TypedDict):
    """The facts of a folder of head lists: the hash of each list, by its file's name."""

    lists_sha256: dict[Text, Text]


def mean_effect(results: Path, language: str, tasks: list[str], model_sha256: str | None = None) -> Tensor:
    """The effect of each head averaged over trials, then tasks: (n_layers, n_heads), float64, NaN where there is none.

    A four-dimensional effect counts by its `query_predictive` class. Raises UserError for missing or misshapen files,
    effects that are not finite, tasks that were scored by first tokens and by whole answers, and, where that is noted,
    scores of several models or of another than `model_sha256` (a `model_digest`).
    """
    missing = [task for task in tasks if not effect_path(results, f"{task}_{language}").exists()]
    if missing:
        first, found = effect_path(results, f"{missing[0]}_{language}"), [task for task in tasks if task not in missing]
        go_on = f", or average over the others (select_heads.py --tasks {' '.join(found)})" if found else ""
        raise UserError(
            f"{results} has no scores of {language} on {', '.join(missing)} (no file {first.name}); run step 1 "
            f"(compute_indirect_effect.py) on these{go_on}"
        )
    means = []
    noted = {task: scored_with(results, f"{task}_{language}") for task in tasks}
    answers = {task: each["answer"] for task, each in noted.items()}
    if len(set(answers.values())) > 1:
        kinds = ", ".join(f"{task} by the {scored} answer" for task, scored in answers.items())
        raise UserError(f"{results} has scores of {language} that do not mix ({kinds}); score all tasks alike")
    _check_alike(results, language, noted, model_sha256)
    for task in tasks:
        path = effect_path(results, f"{task}_{language}")
        effect = load_tensor(path)
        if effect.dtype not in UNQUANTIZED:
            raise UserError(f"{path} holds {effect.dtype} numbers, not effects; delete it and run step 1 again")
        if effect.ndim == 4 and effect.shape[-1] == len(TOKEN_CLASSES):
            effect = effect[..., TOKEN_CLASSES.index("query_predictive")]
        if effect.ndim != 3 or not effect.numel():
            raise UserError(f"{path} has shape {tuple(effect.shape)}, expected (trials, layers, heads[, 10])")
        means.append(by_layer(effect, noted[task], path))
        if means[-1].shape != means[0].shape:
            shapes = f"{tuple(means[-1].shape)} heads, not {tuple(means[0].shape)}"
            raise UserError(f"{path} comes from a different model: {shapes}; score all tasks with one model")
    return torch.stack(means).mean(dim=0)


def _check_alike(results: Path, language: str, noted: dict[str, dict], model_sha256: str | None) -> None:
    """Raise UserError if tasks' scores are of several models, or of another than the given one, or another dataset's.

    Says where that cannot be told, and where their prompts were unlike.
    """
    for task, each in noted.items():
        if (scored := each.get("dataset_name", f"{task}_{language}")) != f"{task}_{language}":
            folder = effect_path(results, f"{task}_{language}").parent
            raise UserError(f"{folder} has the scores of {scored}; remove it and run step 1 again")
    digests = [each.get("model_sha256") for each in noted.values()]
    known = {*filter(None, [model_sha256, *digests])}
    names = [each["model_name"] for each in noted.values() if "model_name" in each]
    if len(known) > 1 or (None in digests and any(names_another(names[0], name) for name in names)):
        which = "several models" if model_sha256 is None else "a model with other weights, config or tokenizer"
        raise UserError(f"{results} has scores of {language} of {which}; remove them and run step 1 again")
    if known and any("model_name" in each and not each.get("model_sha256") for each in noted.values()):
        say_unsigned(results)
    for name in FORM:
        values = [each[name] for each in noted.values() if name in each]
        if any(value != values[0] for value in values):
            say_once(
                f"{results}: the tasks of {language} were scored with unlike {name}, and are averaged all the same"
            )


def by_layer(scores: Tensor, noted: dict, path: Path) -> Tensor:
    """The mean of scores (trials, n_rows, n_heads) by layer: (n_layers, n_heads), float64, NaN where there is no head.

    `noted` says which layers the rows are, and how many heads they have, where not all layers have heads alike. Raises
    UserError for other rows than noted, and for a head whose scores are not finite.
    """
    _, n_rows, n_heads = scores.shape
    layers, counts = noted.get("layers", list(range(n_rows))), noted.get("heads", [n_heads] * n_rows)
    if not len(layers) == len(counts) == n_rows:
        raise UserError(f"{path} has {n_rows} layers with heads, its settings note {len(layers)}; score it again")
    n_layers = noted.get("n_layers", max([n_rows, *(layer + 1 for layer in layers)]))
    if len({*layers}) < n_rows or max(layers) >= n_layers or max(counts) > n_heads:
        raise UserError(f"{path} has other layers or heads than its settings note; score it again")
    there = torch.arange(n_heads) < torch.tensor(counts)[:, None]
    if not scores[:, there].isfinite().all():
        raise UserError(f"{path} has effects that are not finite numbers; delete it and run step 1 again")
    found = torch.full((n_layers, n_heads), torch.nan, dtype=torch.float64)
    found[layers] = scores.double().mean(dim=0).masked_fill(~there, torch.nan)
    return found


def count_heads(effect: Tensor) -> int:
    """How many heads there are in (n_layers, n_heads), which is NaN where there is none."""
    return int((~effect.isnan()).sum())


def scored_languages(results: Path, tasks: list[str]) -> list[str]:
    """The paper's languages in which every task has been scored, in the order of the group rule."""
    names = [language.name for language in PAPER_LANGUAGES]
    return [name for name in names if all(effect_path(results, f"{task}_{name}").exists() for task in tasks)]


def scored_tasks(results: Path) -> tuple[list[str], list[str]]:
    """The tasks that have been scored in a language of the paper, and those of its languages in which all of them were.

    Raises UserError where there are no scores, or no language has all of these tasks.
    """
    tasks = [
        task for task in TASKS if any(effect_path(results, f"{task}_{each.name}").exists() for each in PAPER_LANGUAGES)
    ]
    if not tasks:
        raise UserError(f"{results} has no scores; run scripts/demo.sh, or step 1 for your own model")
    if not (languages := scored_languages(results, tasks)):
        raise UserError(f"{results} has no language in which all of {', '.join(tasks)} are scored; score one in all")
    return tasks, languages


def rank_heads(effect: Tensor) -> list[Head]:
    """All heads by effect (n_layers, n_heads), largest first, ties by layer, then head; NaN is no head."""
    order = torch.argsort(effect.nan_to_num(-torch.inf).flatten(), descending=True, stable=True).tolist()
    return [divmod(index, effect.shape[1]) for index in order[: count_heads(effect)]]


def count_top(top: float, n_heads_total: int) -> int:
    """The number of heads that `top` stands for: below 1 a fraction of all heads, rounded down, else the number."""
    if 0 < top < 1:
        return max(1, int(top * n_heads_total + 1e-9))
    if top >= 1 and float(top).is_integer() and top <= n_heads_total:
        return int(top)
    raise UserError(f"--top {top:g} is neither a fraction between 0 and 1 nor a number of heads up to {n_heads_total}")


def count_share(share: float, n_heads_total: int) -> int:
    """The number of heads in a share of all, which is above 0 and up to 1 (here: all of them)."""
    return n_heads_total if share == 1 else count_top(share, n_heads_total)


def group_heads(lists: list[list[Head]]) -> list[Head]:
    """Heads in more than half of the lists, most frequent first, equal counts in order of first appearance."""
    counts = Counter(head for heads in lists for head in dict.fromkeys(heads))
    return [head for head, count in counts.most_common() if count > len(lists) / 2]


def random_heads(heads: Sequence[Head], count: int, seed: int) -> list[Head]:
    """`count` distinct ones of the heads drawn at random, as a control."""
    picked = np.random.default_rng(seed).choice(len(heads), count, replace=False)
    return [heads[int(index)] for index in picked]


def read_heads(path: Path) -> list[Head]:
    """A head list of this project or the original release. Raises UserError naming the file and what is wrong."""
    rows = disk.load_json(path, f"no head list {path}; make it with select_heads.py or use another head folder")
    if not isinstance(rows, list) or not rows:
        raise UserError(f"{path} is not a list of [layer, head]")
    for i, row in enumerate(rows):
        if not isinstance(row, list) or len(row) != 2 or not all(type(x) is int and x >= 0 for x in row):
            raise UserError(f"{path}: entry {i} is {row!r:.80}, not [layer, head]")
    heads = [(layer, head) for layer, head in rows]
    head, count = Counter(heads).most_common(1)[0]
    if count > 1:
        raise UserError(f"{path} has head {list(head)} more than once")
    return heads


def check_list(path: Path, heads: list[Head]) -> None:
    """Raise UserError if a head list that `write_heads` did not write, or a link, is in the place of another one."""
    known = _noted_lists(path.parent)
    is_ours = path.is_file() and (
        path.read_bytes() == _as_json(heads) or _sha256(path.read_bytes()) == known.get(path.name)
    )
    outputs.check_file(path, is_ours, mend="give another --head_folder")


def write_heads(path: Path, heads: list[Head]) -> None:
    """Write a head list as JSON, whole or not at all, and note it in the folder's facts. Raises as `check_list` does.

    A list that somebody wrote or changed by hand, or that was published, is not in these facts.
    """
    with files.held(path.parent):
        check_list(path, heads)
        noted, content = _noted_lists(path.parent), _as_json(heads)
        outputs.check_file(path.parent / FACTS, bool(noted), mend="give another --head_folder")
        files.write_text(path, content.decode())
        if noted.get(path.name) != _sha256(content):
            files.write_json(path.parent / FACTS, {"lists_sha256": noted | {path.name: _sha256(content)}})


def _noted_lists(folder: Path) -> dict[str, str]:
    return read_noted(folder / FACTS, ListFacts).get("lists_sha256", {})


def _as_json(heads: list[Head]) -> bytes:
    return (json.dumps([list(head) for head in heads]) + "\n").encode()


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def group_list(folder: Path, group: str, new: Mapping[Path, list[Head]]) -> list[Head]:
    """A group's list from its languages' lists, the `new` ones by path and the others in the folder.

    Raises UserError if one of them is missing, or no head is in more than half of them.
    """
    of_language = [folder / language_file(language) for language in group_languages(group)]
    heads = group_heads([new[path] if path in new else read_heads(path) for path in of_language])
    if not heads:
        raise UserError(f"no head is in more than half of the lists of group {group!r} in {folder}; give longer lists")
    return heads


def check_heads(heads: list[Head], n_layers: int, n_heads: int, source: object, model: str) -> None:
    """Raise UserError for a head that the model does not have."""
    for layer, head in heads:
        if layer >= n_layers or head >= n_heads:
            geometry = f"{model} has {n_layers} layers of {n_heads} heads"
            raise UserError(f"{source} names head [{layer}, {head}], but {geometry}")
