"""Fine-tuning a causal LM by LoRA on prompts and answers (step 0), in the form in which step 3 asks.

In: a base model and (prompt, answer) pairs. Out: a folder with a PEFT adapter, or with the base and the adapter merged
into it, and `soteria.json`. An unfinished run lies in `<output>.partial` and resumes from its last saved step.
"""

import hashlib
import json
import math
import os
import shutil
import time
import warnings
import zipfile
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import accelerate
import peft
import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from tqdm import tqdm
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.pytorch_utils import Conv1D
from transformers.trainer_callback import PrinterCallback
from typing_extensions import TypedDict

from soteria.answering.decoding import pad_token
from soteria.answering.training_rows import FineTuning, Pairs, collate, training_rows
from soteria.errors import UserError
from soteria.models.checkpoints import ADAPTER_CONFIG, ADAPTER_LAYOUTS, Checkpoint
from soteria.models.loading import LoadedModel, default_device, load_model
from soteria.models.lora import LoraAdapter
from soteria.models.processes import Processes
from soteria.models.tensors import UNQUANTIZED, all_finite, read_tensor, replace_tensor
from soteria.steering.checkpoint import describe, made_before, progress, versions
from soteria.storage import files, paths
from soteria.storage.side_files import Count, read_noted, side_file

SAVED, SETTINGS = "saved.json", paths.PARTIAL_FACTS  # in a complete checkpoint; in the folder of an unfinished run


@side_file
class Logged(TypedDict, total=False):
    loss: float


@side_file
class TrainerState(TypedDict):
    """What is used of the notes that transformers' trainer leaves in a checkpoint."""

    global_step: Count
    max_steps: Count
    log_history: list[Logged]


@side_file
class Saved(TypedDict):
    seconds: float


def fine_tune(
    base: str,
    pairs: Pairs,
    settings: FineTuning,
    output: Path,
    processes: Processes,
    *,
    dataset: str,
    merge: bool = False,
    save_steps: int = 50,
) -> dict:
    """Tune a model and write the adapter, or with `merge` the whole model; return the facts in its `soteria.json`.

    A folder already made from the same inputs is reused. Raises UserError for a base that cannot be tuned, settings
    that do not fit it, pairs of which none fits `max_tokens`, a loss that is not finite, or an output folder that holds
    something else.
    """
    checkpoint, output = Checkpoint.open(base, whole=True), output.resolve()
    device = processes.device or default_device()
    on_cpu = torch.device(device).type == "cpu"
    if settings.dtype == "float16" and on_cpu:
        raise UserError("--dtype float16 cannot be trained on a CPU; give bfloat16 or float32")
    dtype = ("float32" if on_cpu else "bfloat16") if settings.dtype == "auto" else settings.dtype
    inputs = {
        "format": "merged" if merge else "adapter",
        "base_model": paths.model_name(base),
        "base_revision": checkpoint.revision,
        "base_weights": checkpoint.fingerprint,
        "dataset": dataset,
        "pairs_sha256": hashlib.sha256(json.dumps([*pairs.values()]).encode()).hexdigest(),
        "languages": [language.name for language in pairs],
        **asdict(settings),
        "dtype": dtype,
        "processes": processes.count,
    }
    inputs, partial = json.loads(json.dumps(inputs)), paths.partial_folder(output)

    def made() -> dict | None:
        words = {"kind": "a fine-tuned model", "key": "pairs_sha256", "mend": "another --output"}
        return made_before(output, inputs, [checkpoint], **words)

    if merge:
        checkpoint.check_links()
    if facts := processes.agree(made()):
        return facts
    set_seed(settings.seed)
    loaded = load_model(base, device, dtype)
    rows, counts = training_rows(loaded, pairs, settings)
    model = _with_adapter(loaded, settings)
    names = [name for name, module in model.base_model.model.named_modules() if isinstance(module, LoraLayer)]
    if merge and any(checkpoint.find(f"{name}.weight").dtype not in UNQUANTIZED for name in names):
        raise UserError(f"{base!r} is quantized, so nothing can be merged into it; leave out --merge")
    counts["output_projections"] = len({*names} & {*loaded.geometry.projection_names})
    with files.held(partial) if processes.is_first else nullcontext():
        if facts := processes.agree(made() if processes.is_first else None):  # by the process that was waited for
            shutil.rmtree(partial, ignore_errors=True)
            return facts
        last = processes.agree(_prepare(partial, inputs) if processes.is_first else None)
        if last is None or not _is_final(last):
            arguments = _arguments(settings, dtype, partial, save_steps, on_cpu)
            _train(model, arguments, rows, pad_token(loaded), processes, last)
        if processes.is_first:
            last = _complete(partial)[-1]
            facts = inputs | counts | _history(last) | {"versions": _versions()}
            _write(last, checkpoint, loaded, output, facts)
            shutil.rmtree(partial)
        facts = processes.agree(facts)
    return facts


def _with_adapter(loaded: LoadedModel, settings: FineTuning) -> peft.PeftModel:
    """The model with a new adapter. Raises UserError for modules or layers that it does not have."""
    n_layers, (first, last) = loaded.geometry.n_layers, settings.layers or (0, 0)
    if last >= n_layers:
        raise UserError(f"--layers {first}-{last}: {loaded.name!r} has layers 0 to {n_layers - 1}")
    if {"cpu", "disk"} & {*getattr(loaded.model, "hf_device_map", {}).values()}:
        raise UserError(f"{loaded.name!r} does not fit on the GPUs; use larger ones, or --device cpu")
    targets, every = settings.target_modules, settings.target_modules == ("all-linear",)
    chosen = "all-linear" if every else list(targets)
    if settings.layers:
        chosen = [
            f"{layer}.{name}"
            for layer in loaded.geometry.layer_names[first : last + 1]
            for name, module in loaded.model.get_submodule(layer).named_modules()
            if isinstance(module, nn.Linear | Conv1D)
            and (every or f".{name}".endswith(tuple(f".{target}" for target in targets)))
        ]
    if not chosen:
        raise UserError(f"--target_modules {' '.join(targets)}: {loaded.name!r} has no such linear layers there")
    config = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        target_modules=chosen,
        fan_in_fan_out=loaded.geometry.transposed,
        task_type="CAUSAL_LM",
    )
    try:
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # between PEFT and transformers
            model = peft.get_peft_model(loaded.model, config)
    except ValueError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--target_modules {' '.join(targets)} does not fit {loaded.name!r} ({reason})") from None
    changed = {name: each for name, each in model.base_model.model.named_modules() if isinstance(each, LoraLayer)}
    for name, module in changed.items():
        if not isinstance(module.get_base_layer(), nn.Linear | Conv1D):
            raise UserError(f"--target_modules: {name} is not a linear layer; leave it out")
    for target in () if every else targets:  # PEFT passes over names that fit nothing beside others
        if not any(f".{name}".endswith(f".{target}") for name in changed):
            raise UserError(f"--target_modules: {loaded.name!r} has no linear layer {target!r} there; leave it out")
    return model


def _arguments(settings: FineTuning, dtype: str, partial: Path, save_steps: int, on_cpu: bool) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=str(partial),
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation,
        learning_rate=settings.learning_rate,
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        warmup_steps=settings.warmup_steps,
        seed=settings.seed,
        bf16=dtype == "bfloat16",
        fp16=dtype == "float16",
        use_cpu=on_cpu,
        dataloader_pin_memory=not on_cpu,
        save_steps=save_steps,
        save_total_limit=2,  # a run that is killed while it saves still has the checkpoint before
        logging_steps=1,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to="none",
        remove_unused_columns=False,
        label_names=["labels"],
        ddp_find_unused_parameters=False,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # several GPUs take several processes, never nn.DataParallel
    return arguments


def _train(
    model: peft.PeftModel,
    arguments: TrainingArguments,
    rows: list[dict[str, list[int]]],
    pad: int,
    processes: Processes,
    last: Path | None,
) -> None:
    """Train to the end, from a checkpoint if there is one. The last step is saved too."""
    seconds = _history(last)["seconds"] if last else 0.0
    trainer = Trainer(
        model,
        arguments,
        data_collator=lambda batch: collate(batch, pad),
        train_dataset=rows,
        callbacks=[_Watch(processes, seconds)],
    )
    trainer.remove_callback(PrinterCallback)
    if not arguments.use_cpu:  # the same bytes after an interruption, as far as the GPU's kernels can
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        trainer.train(resume_from_checkpoint=str(last) if last else None)
    except torch.OutOfMemoryError:
        advice = "give a smaller --batch_size with more --gradient_accumulation, or a smaller --max_tokens"
        raise UserError(f"the GPU's memory does not hold a batch; {advice}") from None
    finally:
        torch.use_deterministic_algorithms(False)


class _Watch(TrainerCallback):
    """Shows the loss, ends a run whose loss is not finite, and marks checkpoints that are complete."""

    def __init__(self, processes: Processes, seconds: float):
        self.processes, self.started = processes, time.monotonic() - seconds

    def on_train_begin(self, args, state, control, **_):
        hidden, steps = None if self.processes.is_first else True, {"total": state.max_steps, "unit": "step"}
        self.bar = tqdm(desc="fine-tuning", initial=state.global_step, disable=hidden, leave=None, **steps)

    def on_step_end(self, args, state, control, **_):
        self.bar.update()

    def on_log(self, args, state, control, logs, **_):
        if "loss" in logs:
            self.bar.set_postfix(loss=f"{logs['loss']:.3f}")
            if not math.isfinite(logs["loss"]):
                where = f"step {state.global_step}"
                raise UserError(
                    f"the loss is {logs['loss']} at {where}; give a smaller --learning_rate or another --dtype"
                )

    def on_save(self, args, state, control, **_):
        self.processes.wait()  # each process saves the state of its random numbers
        if self.processes.is_first:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle that needs trust; nothing reads it
            files.write_json(folder / SAVED, {"seconds": time.monotonic() - self.started})

    def on_train_end(self, args, state, control, **_):
        self.bar.close()


def _complete(partial: Path) -> list[Path]:
    """The complete checkpoints of an unfinished run, in the order of their steps."""
    found = [marker.parent for marker in partial.glob(f"checkpoint-*/{SAVED}") if _is_sound(marker.parent)]
    return sorted(found, key=lambda folder: int(folder.name.rpartition("-")[2]))


def _is_sound(checkpoint: Path) -> bool:
    """Whether training can go on from a checkpoint: its notes, weights and states are whole."""
    states = [*checkpoint.glob("*.pt"), *checkpoint.glob("*.pth")]
    if not checkpoint.name.rpartition("-")[2].isdecimal() or not all(map(zipfile.is_zipfile, states)):
        return False
    try:
        Checkpoint.open(str(checkpoint))
    except UserError:
        return False
    state = read_noted(checkpoint / "trainer_state.json", TrainerState)
    logged = any("loss" in entry for entry in state.get("log_history", ()))
    return logged and bool(read_noted(checkpoint / SAVED, Saved))


def _prepare(partial: Path, inputs: dict) -> Path | None:
    """The checkpoint to resume from; anything else in the folder of an unfinished run is removed.

    Raises UserError if that run had other settings.
    """
    complete = _complete(partial)
    if complete and files.read_json(partial / SETTINGS) != inputs:
        raise UserError(f"{partial} holds an unfinished run with other settings; finish it first, or remove it")
    for place in partial.iterdir():
        if place.is_dir() and place not in complete:
            shutil.rmtree(place)
    files.write_json(partial / SETTINGS, inputs)
    return complete[-1] if complete else None


def _is_final(checkpoint: Path) -> bool:
    state = files.read_facts(checkpoint / "trainer_state.json")
    return state["global_step"] >= state["max_steps"]


def _history(checkpoint: Path) -> dict:
    """Steps done, losses (nats per token of answer) of the first and last, and seconds of training, resumed or not."""
    state = files.read_facts(checkpoint / "trainer_state.json")
    losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    seconds = files.read_facts(checkpoint / SAVED)["seconds"]
    return {"steps": state["global_step"], "first_loss": losses[0], "last_loss": losses[-1], "seconds": seconds}


def _versions() -> dict[str, str]:
    return versions() | {library.__name__: library.__version__ for library in (peft, accelerate)}


def _write(last: Path, base: Checkpoint, loaded: LoadedModel, output: Path, facts: dict) -> None:
    """Write the result of the last checkpoint, whole or not at all. Raises UserError if it is not finite."""
    adapter = LoraAdapter(Checkpoint.open(str(last)))
    if not all(all_finite(read_tensor(place)) for place in adapter.checkpoint.places.values()):
        raise UserError("the adapter is not finite; give a smaller --learning_rate")
    merge = facts["format"] == "merged"
    with files.whole_folder(output) as folder:
        if merge:
            with progress("copying the base", base.copied_bytes()) as bar:
                base.copy_to(folder, wrote=bar.update)
            _merge(base, adapter, Checkpoint.open(str(folder)))
        else:
            config = files.read_facts(last / ADAPTER_CONFIG)
            targets = config["target_modules"]  # PEFT keeps a set, in any order
            ordered = {"target_modules": sorted(targets) if isinstance(targets, list) else targets}
            ordered["base_model_name_or_path"] = facts["base_model"]
            files.write_json(folder / ADAPTER_CONFIG, config | ordered)
            shutil.copyfile(last / ADAPTER_LAYOUTS[0][0], folder / ADAPTER_LAYOUTS[0][0])
            loaded.tokenizer.save_pretrained(folder)
        card = f"""# {paths.model_slug(base.name)}, fine-tuned

Made with Soteria's `finetune.py` by LoRA (rank {facts["rank"]}) on {facts["rows"]} prompts and answers.
`{paths.FACTS}` beside this file says how.
"""
        library, tags = "transformers" if merge else "peft", ["lora"]
        describe(folder, card, facts["languages"], facts, library=library, tags=tags)


def _merge(base: Checkpoint, adapter: LoraAdapter, copy: Checkpoint) -> None:
    """Add the adapter to the weights in a copy of the base, in float32; each is rounded once, to its stored dtype."""
    for module in tqdm(adapter.modules, desc="merging", unit="tensor", disable=None, leave=None):
        place, delta = base.find(f"{module}.weight"), adapter.delta(module)
        delta = delta.T if adapter.checkpoint.config.get("fan_in_fan_out") else delta
        merged = (read_tensor(place).float() + delta).to(place.dtype)
        if not all_finite(merged):
            raise UserError(f"{place.key} is not finite once merged; leave out --merge")
        replace_tensor(copy.places[place.key], merged)
