"""The files of step 1: which datasets to score, what is done already, and where a run goes on after an interruption."""

import fnmatch
import hashlib
import json
import random
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from soteria.errors import UserError
from soteria.scoring.prompts import TOKEN_CLASSES, MeanSlots, PromptForm, draw_prompt, load_pairs, split_pairs
from soteria.storage import files
from soteria.storage.paths import effect_path

ARGUMENTS_FILE = "indirect_effect_args.txt"
# The arguments that the numbers depend on. A folder made with other values of these is neither skipped nor added to.
DECISIVE = (
    "model_name",
    "seed",
    "n_shots",
    "n_trials",
    "test_split",
    "last_token_only",
    "prefixes",
    "separators",
    "dtype",
    "mean_activations_path",
    "data_sha256",
)


def expand_datasets(patterns: list[str], root: Path) -> list[str]:
    """Dataset names for names or globs, in the order given and, within a glob, of the alphabet.

    Raises UserError for a pattern that fits no `<root>/<name>.json`.
    """
    if not root.is_dir():
        raise UserError(f"no folder {root}; --root_data_dir is the folder of the <task>_<Language>.json files")
    known = sorted(path.stem for path in root.glob("*.json"))
    names: dict[str, None] = {}
    for pattern in patterns:
        found = [name for name in known if fnmatch.fnmatchcase(name, pattern)]
        if not found:
            raise UserError(f"no dataset {pattern!r} in {root}; there are {', '.join(known[:5]) or 'none'} …")
        names.update(dict.fromkeys(found))
    return list(names)


def seed_everything(seed: int) -> None:
    """Seed python, numpy and torch, in the order of the original release. Raises UserError for no seed of numpy's."""
    random.seed(seed)
    try:
        np.random.seed(seed)
    except ValueError:
        raise UserError(f"--seed {seed} is not between 0 and 2**32 - 1") from None
    torch.manual_seed(seed)


def load_tensor(path: Path) -> Tensor:
    """A tensor saved by step 1, without running anything that a pickle may hold. Raises UserError if it is none."""
    try:
        tensor = torch.load(path, weights_only=True, map_location="cpu")
    except FileNotFoundError:
        raise UserError(f"no file {path}; run step 1 (compute_indirect_effect.py) first") from None
    except Exception as error:  # torch raises many kinds for a broken file
        raise UserError(f"{path} is no tensor file that can be read safely ({type(error).__name__})") from None
    if not isinstance(tensor, Tensor):
        raise UserError(f"{path} does not hold one tensor")
    return tensor


def save_tensor(tensor: Tensor, path: Path) -> None:
    """Save a tensor, whole or not at all; the same tensor gives the same bytes.

    It goes through an open file because torch writes a path's name, here a random one, into what it saves.
    """
    with files.whole_file(path) as sibling, sibling.open("wb") as file:
        torch.save(tensor, file)


class DatasetRun:
    """One dataset's scores under `root`, with the arguments of `compute_indirect_effect.py`."""

    def __init__(self, dataset: str, root: Path, arguments: Namespace):
        self.dataset, self.arguments = dataset, arguments
        self.effect_file = effect_path(root, dataset)
        self.means_file = self.effect_file.with_name(f"{dataset}_mean_head_activations.pt")
        self.partial_file = self.effect_file.with_name(f"{dataset}_indirect_effect.partial.pt")
        self.arguments_file = self.effect_file.with_name(ARGUMENTS_FILE)
        self.data_file = Path(arguments.root_data_dir) / f"{dataset}.json"
        self.pairs = load_pairs(self.data_file)

    def described(self) -> dict:
        """The arguments as written beside the scores."""
        described = {k: str(v) if isinstance(v, Path) else v for k, v in vars(self.arguments).items()}
        described["dataset_name"] = self.dataset
        described["data_sha256"] = hashlib.sha256(self.data_file.read_bytes()).hexdigest()
        return described

    def is_finished(self) -> bool:
        """Whether the scores are there. Raises UserError where they, or a part of them, came from other arguments."""
        found = files.read_json(self.arguments_file)
        if not isinstance(found, dict):
            if any(path.exists() for path in (self.effect_file, self.means_file, self.partial_file)):
                raise UserError(
                    f"{self.effect_file.parent} holds scores but no readable {ARGUMENTS_FILE}; "
                    "give another --save_path_root or remove that folder"
                )
            return False
        for name in DECISIVE:
            was, now = found.get(name), self.described().get(name)
            if name == "model_name" and was and Path(was).exists() and Path(was).resolve() == Path(now).resolve():
                continue
            if was != now:
                raise UserError(
                    f"{self.effect_file.parent} was made with {name} {was!r}, not {now!r}; "
                    "give another --save_path_root or remove that folder"
                )
        scored = self.effect_file.exists() and self.means_file.exists()
        return scored and not self.partial_file.exists()  # the partial file goes last: killed before that, go on

    def score(self, sweep, processes, progress) -> None:
        """Score the dataset with a `ForkingSweep`, going on at the prompt where a killed run stopped.

        The prompts are shared out among `processes`. `progress` is told of every forward pass of work.
        """
        from soteria.models.loading import BOS_TEXT
        from soteria.models.memory import Rows, default_rows
        from soteria.scoring.indirect_effect import (
            LAST_TOKEN_CLASSES,
            check_sweep,
            forward_passes,
            indirect_effects,
            tokenize,
        )

        arguments, loaded, started = self.arguments, sweep.loaded, time.monotonic()
        form = PromptForm(
            {**PromptForm().prefixes, **arguments.prefixes}, {**PromptForm().separators, **arguments.separators}
        )
        if not loaded.adds_bos:
            form = form.starting_with(BOS_TEXT)
        seed_everything(arguments.seed)
        split = split_pairs(self.pairs, arguments.test_split, arguments.seed)
        slots = MeanSlots(arguments.n_shots, form, loaded.tokenizer)

        def draw(shuffle_labels: bool):
            prompts = [
                draw_prompt(split, arguments.n_shots, form, shuffle_labels=shuffle_labels)
                for _ in range(arguments.n_trials)
            ]
            return [tokenize(prompt, loaded, slots) for prompt in prompts]

        given = arguments.mean_activations_path
        clean = [] if given else draw(shuffle_labels=False)  # given means cost no draws, as in the original
        shuffled = draw(shuffle_labels=True)
        classes = LAST_TOKEN_CLASSES if arguments.last_token_only else TOKEN_CLASSES
        cost = [forward_passes(prompt, classes, loaded.geometry) for prompt in shuffled]
        progress.begin(len(clean) + sum(cost))

        # How many rows share a forward pass moves the last bits: a run that goes on keeps the number it began with.
        found = files.read_json(self.arguments_file)
        begun = found.get("max_rows") if isinstance(found, dict) else None
        wanted = arguments.max_rows or begun or default_rows(loaded)
        rows = Rows(processes.agree(wanted))
        described = self.described() | {"max_rows": rows.most}

        means = self._means(loaded, clean, len(slots), rows, processes)
        progress.done(len(clean))
        if processes.is_first:
            files.write_json(self.arguments_file, described)  # from here on, other arguments are refused
            save_tensor(means, self.means_file)

        def effects_of(index: int) -> Tensor:
            prompt = shuffled[index]
            effects = rows.fit(lambda most: indirect_effects(sweep, prompt, means, classes, most))
            if index == 0:
                check_sweep(sweep, prompt, means, effects, classes)
            return effects[..., 0] if arguments.last_token_only else effects

        effects = self._partial()
        progress.done(sum(cost[: len(effects)]))
        for own in processes.map(effects_of, range(len(effects), len(shuffled))):
            progress.done(cost[len(effects)])
            effects.append(own)
            if processes.is_first:
                save_tensor(torch.stack(effects), self.partial_file)
        if processes.is_first:
            save_tensor(torch.stack(effects), self.effect_file)
            files.write_json(self.arguments_file, described | self._circumstances(loaded, processes.count, started))
            self.partial_file.unlink(missing_ok=True)
            for left in self.effect_file.parent.glob(".*.tmp"):  # by runs that were killed while they wrote
                left.unlink()

    def _means(self, loaded, clean, n_slots: int, rows, processes) -> Tensor:
        from soteria.scoring.indirect_effect import mean_head_activations

        given = self.arguments.mean_activations_path or (self.means_file if self.means_file.exists() else None)
        means = (
            load_tensor(Path(given)) if given else mean_head_activations(loaded, clean, n_slots, rows, processes.map)
        )
        geometry = loaded.geometry
        expected = (geometry.n_layers, geometry.n_heads, n_slots, geometry.head_dim)
        if tuple(means.shape) != expected:
            raise UserError(f"mean activations in {given} have shape {tuple(means.shape)}, the model needs {expected}")
        return means

    def _partial(self) -> list[Tensor]:
        return list(load_tensor(self.partial_file)) if self.partial_file.exists() else []

    @staticmethod
    def _circumstances(loaded, n_processes: int, started: float) -> dict:
        import transformers

        return {
            "processes": n_processes,
            "device": str(loaded.model.device),
            "model_dtype": str(loaded.model.dtype).removeprefix("torch."),
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            "seconds": round(time.monotonic() - started, 2),
        }


class Progress:
    """One bar over all datasets, in forward passes: a prompt of the means costs one, a scored one what its sweep does.

    Datasets not begun yet are taken to cost what those begun did on average, so the time left is honest throughout.
    """

    def __init__(self, n_datasets: int, *, silent: bool = False):
        self.n_datasets, self.costs = n_datasets, []
        # smoothing=0: the rate is the average so far, not that of the last moment.
        self.bar = tqdm(desc="scoring", unit=" forwards", smoothing=0, disable=True if silent else None, total=0)

    def begin(self, cost: float) -> None:
        """A dataset begins, of `cost` forward passes."""
        self.costs.append(cost)
        self.bar.total = round(sum(self.costs) / len(self.costs) * self.n_datasets)
        self.bar.refresh()

    def done(self, cost: float) -> None:
        self.bar.update(cost)

    def close(self) -> None:
        self.bar.close()


def json_object(text: str) -> dict[str, str]:
    """A JSON object of texts, for --prefixes and --separators. Raises ValueError otherwise."""
    value = json.loads(text)
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        raise ValueError("expected a JSON object of texts")
    return value
