"""A scoring run (step 1): which datasets are left to score, their files, and resuming after an interruption.

Input: `ScoringSettings`, names of datasets, and a model. Output, per dataset, in `<root>/<dataset>/`: the indirect
effects (n_trials, n_rows, n_heads[, 10]), a row being a layer that has heads, the mean head activations behind them,
and the settings as JSON.
"""

import hashlib
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from soteria import disk
from soteria.errors import UserError
from soteria.models.encoding import check_known
from soteria.models.processes import Processes
from soteria.models.tensors import load_tensor, save_tensor
from soteria.scoring import prompts
from soteria.scoring.notes import EARLIER_SETTINGS, ScoringNotes, say_unsigned
from soteria.scoring.prompts import PromptForm
from soteria.storage import files, outputs, paths
from soteria.storage.side_files import read_noted

# What is written beside the scores but does not decide on their values. Scores made with other values of the rest are
# neither skipped nor continued.
INDECISIVE = ("dataset_name", "root_data_dir", "save_path_root", "device", "max_rows")
# Hashes that earlier versions did not note: scores without them are taken for those of the same files.
NOT_NOTED_EARLIER = ("model_sha256", "mean_activations_sha256")


@dataclass(frozen=True)
class ScoringSettings:
    """The arguments of step 1, with the original release's defaults. All of them are written beside the scores."""

    model_name: str = "meta-llama/Llama-3.1-8B-Instruct"
    root_data_dir: Path = paths.DATA / "icl"
    save_path_root: Path | None = None
    seed: int = prompts.SEED
    n_shots: int = 10  # demonstrations in a prompt
    n_trials: int = 25  # prompts averaged, and prompts scored
    test_split: float = prompts.TEST_SPLIT
    device: str | None = None
    mean_activations_path: Path | None = None
    last_token_only: bool = True  # False: all TOKEN_CLASSES
    prefixes: dict[str, str] = field(default_factory=lambda: PromptForm().prefixes)
    separators: dict[str, str] = field(default_factory=lambda: PromptForm().separators)
    max_rows: int | None = None  # most tokens in a forward pass; None: from the free memory
    dtype: str = "auto"
    answer: str = prompts.FIRST  # or WHOLE

    @property
    def form(self) -> PromptForm:
        """The form of the prompts. Raises UserError as `PromptForm`."""
        default = PromptForm()
        return PromptForm({**default.prefixes, **self.prefixes}, {**default.separators, **self.separators})


def score_datasets(
    settings: ScoringSettings, datasets: list[str], root: Path, processes: Processes, load: Callable
) -> tuple[list["DatasetRun"], int]:
    """Score those of the datasets that are not finished under `root`; returns all runs and how many were scored now.

    `load` returns the LoadedModel; it is called only if there is a dataset to score.
    """
    from soteria.models.checkpoints import Checkpoint, model_digest

    digest = model_digest(Checkpoint.open(settings.model_name, whole=True))
    runs = [DatasetRun(dataset, root, settings, digest) for dataset in datasets]
    return runs, score_runs(runs, processes, load)


def score_runs(runs: list["DatasetRun"], processes: Processes, load: Callable) -> int:
    """Score those of the runs that are not finished; returns how many that were. `load` is as in `score_datasets`."""
    pending, n_scored = [run for run in runs if not run.is_finished()], 0
    if processes.is_first:
        for folder in dict.fromkeys(run.folder.parent for run in runs if run.is_unsigned):
            say_unsigned(folder)
    if pending:
        from soteria.scoring.sweep import sweep_over

        sweep = sweep_over(load())
        processes.wait()  # no process writes before all of them have seen what is finished
        with Progress(len(pending), silent=not processes.is_first) as progress:
            for run in pending:
                with files.held(run.folder) if processes.is_first else nullcontext():
                    if not processes.agree(run.is_finished()):  # by the process that was waited for
                        run.check_dtype(sweep.loaded)
                        with run.forgotten_if_refused() if processes.is_first else nullcontext():
                            run.score(sweep, processes, progress)
                        n_scored += 1
    return n_scored


def seed_everything(seed: int) -> None:
    """Seed python, numpy and torch, in the order of the original release. Raises UserError for a seed out of range."""
    random.seed(seed)
    try:
        np.random.seed(seed)
    except ValueError:
        raise UserError(f"--seed {seed} is not between 0 and 2**32 - 1") from None
    torch.manual_seed(seed)


class DatasetRun:
    """The scores of one dataset under `root`, of the model whose `model_digest` is given.

    Raises UserError for a missing or malformed task file, and for given means that are another model's.
    """

    reading: Callable | None = None  # what is read off patched logits; None: how far the answer's probability moves
    slack = 1  # how much more coarsely than a probability that is rounded
    is_unsigned = False  # whether scores were found that do not say which weights they are of

    def __init__(self, dataset: str, root: Path, settings: ScoringSettings, model_sha256: str):
        self._lies_in(paths.effect_path(root, dataset))
        self.settings, self.n_trials = settings, settings.n_trials
        if settings.mean_activations_path:
            load_tensor(Path(settings.mean_activations_path))  # refused before a model is loaded
        data_file = Path(settings.root_data_dir) / f"{dataset}.json"
        self.examples = prompts.load_examples(data_file)
        _ = settings.form  # refused now rather than once the model is loaded
        prompts.check_shots(prompts.split_examples(self.examples, settings.test_split, settings.seed), settings.n_shots)
        self.described = {  # as it is written to the settings file
            "dataset_name": dataset,
            **{name: paths.from_root(it) if isinstance(it, Path) else it for name, it in vars(settings).items()},
            "data_sha256": hashlib.sha256(data_file.read_bytes()).hexdigest(),
            "model_sha256": model_sha256,
        }
        if given := settings.mean_activations_path:
            self.described["mean_activations_sha256"] = _hash_of_means(Path(given), model_sha256)

    def _lies_in(self, effect_file: Path) -> None:
        self.effect_file, self.folder = effect_file, effect_file.parent
        self.means_file = self.folder / f"{self.folder.name}_mean_head_activations.pt"
        self.partial_file = effect_file.with_suffix(".partial.pt")
        self.settings_file = paths.scoring_file(self.folder.parent, self.folder.name)
        for path in (effect_file, self.means_file, self.partial_file, self.settings_file):
            disk.check_output(path, longest=files.LONGEST)

    def is_finished(self) -> bool:
        """Whether the scores are complete. Raises UserError for any, even partial, that other settings made."""
        found, advice = self._noted(), "give another --save_path_root or remove that folder"
        self.is_unsigned = bool(found) and "model_sha256" in self.described and not found.get("model_sha256")
        if not found:
            if any(path.exists() for path in (self.effect_file, self.means_file, self.partial_file)):
                raise UserError(f"{self.folder} has scores but no readable {self.settings_file.name}; {advice}")
            outputs.check_file(self.settings_file, is_ours=False, mend=advice)
            return False
        found = EARLIER_SETTINGS | found
        is_same_model = found.get("model_sha256") == self.described.get("model_sha256", "")
        if self.is_unsigned and not self.effect_file.exists():
            raise UserError(f"{self.folder} has unfinished scores without a hash of their model; {advice}")
        for name, now in self.described.items():
            was = found.get(name)
            if name == "model_name" and (is_same_model or self._is_named(was)):
                continue
            if name == "mean_activations_path" and was and now and Path(was).name == Path(now).name:
                continue  # earlier versions noted the whole path; the hash decides
            if name in NOT_NOTED_EARLIER and was is None:
                continue
            if name == "dtype" and now == found.get("model_dtype"):  # what `auto` was
                continue
            if name == "model_sha256" and was != now:
                what = f"{self.described['model_name']!r} had other weights, another config or tokenizer"
                raise UserError(f"{self.folder} was made when {what}, or by an earlier version; {advice}")
            if name not in INDECISIVE and was != now:
                raise UserError(f"{self.folder} was made with {name} {was!r:.80}, not {now!r:.80}; {advice}")
        # The partial file is removed last: while it exists, the run that scored the dataset was killed at its end.
        if self.partial_file.exists() or not (self.effect_file.exists() and self.means_file.exists()):
            return False
        if self._is_sound():
            return True
        print(f"{self.folder} has damaged scores; they are made again", file=sys.stderr)
        return False

    def _is_named(self, name: str | None) -> bool:
        """Whether a noted name is the model's: that decides where no hash is noted."""
        own, is_there = self.settings.model_name, bool(name) and Path(name).exists()
        return name == own or (is_there and Path(name).resolve() == Path(own).resolve())

    def _noted(self) -> dict:
        return read_noted(self.settings_file, ScoringNotes)

    def _is_sound(self) -> bool:
        """Whether the finished scores are what a run writes."""
        noted = self._noted()
        means = _saved(self.means_file, (None, None, None, None), check_values=False)
        if means is None or len(heads := noted.get("heads", [means.shape[1]] * len(means))) != len(means):
            return False
        n_trials = self.n_trials or noted.get("n_harmful")
        return _saved(self.effect_file, (n_trials, *means.shape[:2], *self._classes), heads) is not None

    @property
    def _classes(self) -> tuple[int, ...]:
        """The last dimension of the effects."""
        return () if self.settings.last_token_only else (len(prompts.TOKEN_CLASSES),)

    def check_dtype(self, loaded) -> None:
        """Raise UserError where a dataset was begun in another dtype, which `auto` may have been on another device."""
        begun, now = self._noted().get("model_dtype"), loaded.dtype
        if begun and begun != now:
            raise UserError(
                f"{self.folder} was begun in {begun}, not {now}; give --dtype {begun}, or remove that folder"
            )

    @contextmanager
    def forgotten_if_refused(self) -> Iterator[None]:
        """Remove what a scoring in this block has written if it is refused before any prompt is scored."""
        try:
            yield
        except UserError:
            if not (self.partial_file.exists() or self.effect_file.exists()):
                self.means_file.unlink(missing_ok=True)
                self.settings_file.unlink(missing_ok=True)
            raise

    def score(self, sweep, processes: Processes, progress: "Progress") -> None:
        """Score the dataset with a `Sweep`, resuming at the prompt at which an earlier run was stopped.

        The processes share the prompts. `progress` is told of the forward passes done.
        """
        from soteria.models.memory import TokenBudget, tokens_that_fit
        from soteria.scoring import indirect_effect as ie

        settings, loaded, started = self.settings, sweep.loaded, time.monotonic()
        clean, shuffled, n_slots, noted = self._tokenized_prompts(loaded)
        classes = ie.LAST_TOKEN_CLASSES if settings.last_token_only else prompts.TOKEN_CLASSES
        costs = [ie.forward_passes(prompt, classes, sweep) for prompt in shuffled]
        progress.begin(len(clean) + sum(costs))

        # The number of rows in a forward pass changes the last bits, so a resumed run keeps the number it started with.
        started_with = self._noted().get("max_rows")
        rows = TokenBudget(processes.agree(settings.max_rows or started_with or tokens_that_fit(loaded)))
        described = self.described | {"max_rows": rows.most, "model_dtype": loaded.dtype} | noted
        described |= _noted_rows(loaded.geometry)

        geometry = loaded.geometry
        expected = (geometry.n_rows, geometry.n_heads, n_slots, geometry.head_dim)
        if given := settings.mean_activations_path:
            means = load_tensor(Path(given))
            if tuple(means.shape) != expected:
                raise UserError(f"the means in {given} have shape {tuple(means.shape)}, but the model needs {expected}")
            if means.dtype != torch.float32 or not means.isfinite().all():
                raise UserError(f"the means in {given} are not finite float32 numbers; give those that step 1 wrote")
        else:
            means = processes.agree(_saved(self.means_file, expected))  # none, or what a stopped run left
            if means is None:
                means = ie.mean_head_activations(loaded, clean, n_slots, rows, processes.map)
            if not means.isfinite().all():
                raise self._not_finite(loaded)
        progress.update(len(clean))
        if processes.is_first:
            files.write_json(self.settings_file, described)  # from here on, other settings are refused
            save_tensor(means, self.means_file)

        there = _heads_there(geometry.heads, geometry.n_heads)

        def effects_of(index: int) -> Tensor:
            prompt = shuffled[index]
            effects = rows.fit(lambda most: ie.indirect_effects(sweep, prompt, means, classes, most, self.reading))
            if index == 0 and effects[there].isfinite().all():
                ie.check_sweep(sweep, prompt, means, effects, classes, self.reading, self.slack)
            return effects[..., 0] if settings.last_token_only else effects

        done = _saved(self.partial_file, (None, *expected[:2], *self._classes), geometry.heads)
        effects = processes.agree(list(done) if done is not None and len(done) <= len(shuffled) else [])
        progress.update(sum(costs[: len(effects)]))
        for own in processes.map(effects_of, range(len(effects), len(shuffled))):
            progress.update(costs[len(effects)])
            if not own[there].isfinite().all():
                raise self._not_finite(loaded)
            effects.append(own)
            if processes.is_first:
                save_tensor(torch.stack(effects), self.partial_file)
        if processes.is_first:
            save_tensor(torch.stack(effects), self.effect_file)
            files.write_json(self.settings_file, described | _circumstances(loaded.model, processes, started))
            self.partial_file.unlink(missing_ok=True)
            files.remove_left(self.folder)

    def _not_finite(self, loaded) -> UserError:
        """What to say of a model whose numbers are not finite."""
        what = f"{loaded.name!r} gives numbers that are not finite on {self.folder.name}"
        dtype, given = loaded.dtype, self.settings.mean_activations_path
        return UserError(f"{what} in {dtype}; give another --dtype or {'other means' if given else 'model'}")

    def _tokenized_prompts(self, loaded) -> tuple[list, list, int, dict]:
        """The prompts to average, those to score, the number of mean slots, and what is noted of the task's answers.

        The prompts are drawn as the settings' seed has it.
        """
        from soteria.models.loading import BOS_TEXT
        from soteria.scoring import indirect_effect as ie

        settings = self.settings
        form = settings.form
        if not loaded.adds_bos:
            form = form.starting_with(BOS_TEXT)
        check_known(loaded.tokenizer, loaded.name, [f"{each.input} {each.output}" for each in self.examples])
        seed_everything(settings.seed)
        split = prompts.split_examples(self.examples, settings.test_split, settings.seed)
        slots = prompts.MeanSlots(settings.n_shots, form, loaded.tokenizer)

        def draw(shuffle_labels: bool) -> list:
            trials = range(settings.n_trials)
            drawn = [prompts.draw_prompt(split, settings.n_shots, form, shuffle_labels=shuffle_labels) for _ in trials]
            return [ie.tokenize(prompt, loaded, slots, settings.answer) for prompt in drawn]

        # As in the original release, nothing is drawn for means that are given.
        clean = [] if settings.mean_activations_path else draw(shuffle_labels=False)
        counts = prompts.count_first_tokens(self.examples, form, loaded.tokenizer)
        return clean, draw(shuffle_labels=True), len(slots), {"query_answers": counts}


def _hash_of_means(path: Path, model_sha256: str) -> str:
    """A hash of given means. Raises UserError for those of another model, as far as that is noted beside them."""
    if not path.is_file():
        raise UserError(f"no file {path}; give the mean head activations that step 1 wrote")
    noted = read_noted(paths.scoring_file(path.parent.parent, path.parent.name), ScoringNotes).get("model_sha256")
    if noted not in (None, model_sha256):
        raise UserError(f"the means in {path} are of a model with other weights; give those of this one")
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _heads_there(heads: Sequence[int], n_heads: int) -> Tensor:
    """Which of (n_rows, n_heads) are heads, where the layers have so many."""
    return torch.arange(n_heads) < torch.tensor(heads)[:, None]


def _saved(
    path: Path, shape: tuple[int | None, ...], heads: Sequence[int] | None = None, *, check_values: bool = True
) -> Tensor | None:
    """What an earlier run saved; None where it is missing, or not float32 of a shape (None: any size) and finite.

    `heads`: the values are effects (trials, n_rows, n_heads, ...), which are NaN where a layer has fewer heads.
    """
    try:
        found = load_tensor(path, mapped=not check_values)
    except UserError:
        return None
    alike = found.ndim == len(shape) and all(want in (None, own) for want, own in zip(shape, found.shape, strict=True))
    if found.dtype != torch.float32 or not alike or not found.numel():
        return None
    if check_values:
        values = found if heads is None else found[:, _heads_there(heads, found.shape[2])]
        return found if values.isfinite().all() else None
    return found


def _noted_rows(geometry) -> dict:
    """What says which layers the rows of scores are; nothing where every layer has as many heads."""
    if geometry.n_rows == geometry.n_layers and len({*geometry.heads}) == 1:
        return {}
    return {"n_layers": geometry.n_layers, "layers": list(geometry.layers), "heads": list(geometry.heads)}


def _circumstances(model, processes: Processes, started: float) -> dict:
    import transformers

    return {
        "processes": processes.count,
        "device": str(model.device),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "seconds": round(time.monotonic() - started, 2),
    }


class Progress(tqdm):
    """One bar over all datasets, in forward passes: one for a prompt to average, those of the sweep for one to score.

    A dataset not begun yet counts as the average of those begun, so that the time left is realistic throughout.
    """

    def __init__(self, n_datasets: int, *, silent: bool = False):
        # smoothing=0: the rate is the average so far.
        super().__init__(desc="scoring", unit=" forwards", smoothing=0, disable=silent or None, total=0)
        self.n_datasets, self.costs = n_datasets, []

    def begin(self, cost: float) -> None:
        """Begin a dataset of `cost` forward passes."""
        self.costs.append(cost)
        self.total = round(sum(self.costs) / len(self.costs) * self.n_datasets)
        self.refresh()
