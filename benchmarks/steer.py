"""Steering a large checkpoint beside copying it: a random bfloat16 base and tuned model in Llama 3.1 8B's widths.

Ends with one JSON line:
  ratio        median time of `steer.py` / (median time of `cp -r` of the base + of starting up)
  peak_bytes   the most memory that `steer.py` held, files mapped into memory included
  base_bytes   size of the base's folder
  original_bytes  the least memory that the original release needs for a model of this size, computed, not measured:
                  both models and the task vector in float32, and a mask in float64, each as large as the model
  switch_over_forward  time of one `set_language` / time of a forward pass of one token (with --switch)
The runs alternate. Starting up is a Python process that imports what `steer.py` does. The disk cache is flushed before
each run; input files are served from memory in both cases, as far as they fit.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, LlamaConfig

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "benchmarks")]

from indirect_effect import machine  # noqa: E402

import soteria  # noqa: E402
from soteria.models.tensors import Planned, write_tensors  # noqa: E402
from soteria.scoring.heads import random_heads, write_heads  # noqa: E402
from soteria.storage.files import write_json  # noqa: E402

N_HEADS = 32
LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": N_HEADS,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
START_UP = "import soteria.steering.checkpoint, soteria.models.task_vector"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--layers", type=int, default=7, help="each of 436 MB, beside 2.1 GB of embeddings")
    add("--repeats", type=int, default=5)
    add("--folder", type=Path, help="where to work; takes four times the base's size (default: the system's own)")
    add("--switch", action="store_true", help="also write a delta, load it and time a change of language")
    add("--width", type=int, default=LLAMA_8B["hidden_size"], help="of the residual stream; all else goes with it")
    add("--device", default="cpu", help="where a change of language is timed")
    return parser.parse_args()


def write_checkpoint(folder: Path, layers: int, seed: int, width: int = LLAMA_8B["hidden_size"]) -> int:
    """Write a random checkpoint with one shard per layer and return its number of parameters."""
    shape = LLAMA_8B | {
        name: LLAMA_8B[name] * width // LLAMA_8B["hidden_size"]
        for name in ("hidden_size", "intermediate_size", "vocab_size")
    }
    config = LlamaConfig(**shape, num_hidden_layers=layers, dtype="bfloat16", architectures=["LlamaForCausalLM"])
    with torch.device("meta"):
        shapes = {name: tuple(t.shape) for name, t in AutoModelForCausalLM.from_config(config).state_dict().items()}
    # One random block, rotated by a different amount for each tensor: fast to make and never constant.
    block = torch.randn(2**22, generator=torch.Generator().manual_seed(seed)).mul_(0.02).bfloat16()

    def values(shape: tuple[int, ...], turn: int) -> torch.Tensor:
        n = torch.Size(shape).numel()
        return block.roll(turn).repeat(-(-n // len(block)))[:n]

    folder.mkdir()
    config.save_pretrained(folder)
    shards: dict[str, dict[str, Planned]] = {}
    for turn, (name, shape) in enumerate(shapes.items()):
        part = name.split(".")[2] if ".layers." in name else name.split(".")[-2]
        planned = Planned(torch.bfloat16, shape, lambda shape=shape, turn=turn: values(shape, turn))
        shards.setdefault(f"model-{part}.safetensors", {})[name] = planned
    for shard, tensors in shards.items():
        write_tensors(tensors, folder / shard)
    weight_map = {name: shard for shard, tensors in shards.items() for name in tensors}
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    return sum(torch.Size(shape).numel() for shape in shapes.values())


def timed(command: list[str]) -> tuple[float, int]:
    """Run a command after flushing the disk cache; return its seconds and peak memory in bytes."""
    os.sync()
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    error = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(command)} failed:\n{error.decode()}")
    return time.perf_counter() - started, usage.ru_maxrss * 1024


def main() -> None:
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as place:
        folder = Path(place)
        base, tuned, copy, steered, delta = (folder / name for name in ("base", "tuned", "copy", "steered", "delta"))
        # In a separate process, since a command's peak includes what its parent holds when starting it.
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            n_parameters = pool.apply(write_checkpoint, (base, arguments.layers, 0, arguments.width))
            pool.apply(write_checkpoint, (tuned, arguments.layers, 1, arguments.width))
        for seed, language in enumerate(("Hindi", "Thai")):
            every = [divmod(index, N_HEADS) for index in range(arguments.layers * N_HEADS)]
            heads = random_heads(every, len(every) // 2, seed)
            write_heads(folder / "heads" / f"{language}_Heads.json", heads)
        steer = [sys.executable, str(ROOT / "src" / "steer.py"), "--base_model", str(base), "--finetune_model"]
        steer += [str(tuned), "--head_folder", str(folder / "heads"), "--scaling_factor", "2", "--language", "hi"]
        start_up = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT / 'src')!r}); {START_UP}"]
        copies, starts, runs, peaks = [], [], [], []
        for _ in tqdm(range(arguments.repeats), desc="timing", unit="round", disable=None):
            starts.append(timed(start_up)[0])
            copies.append(timed(["cp", "-r", str(base), str(copy)])[0])
            shutil.rmtree(copy)
            seconds, peak = timed([*steer, "--output", str(steered)])
            runs.append(seconds)
            peaks.append(peak)
            shutil.rmtree(steered)
        found = {
            "ratio": round(statistics.median(runs) / (statistics.median(copies) + statistics.median(starts)), 3),
            "peak_bytes": max(peaks),
            "base_bytes": sum(file.stat().st_size for file in base.iterdir()),
            "original_bytes": n_parameters * (3 * 4 + 8),
            "copy_over_start_up": round(statistics.median(copies) / statistics.median(starts), 2),
            "layers": arguments.layers,
            "parameters": n_parameters,
            "machine": machine(arguments.device),
            "torch": torch.__version__,
        }
        if arguments.switch:
            timed([*steer, "--language", "th", "--format", "delta", "--output", str(delta)])
            found["delta_bytes"] = (delta / "delta.safetensors").stat().st_size
            found["switch_over_forward"] = round(switch_over_forward(base, delta, arguments.device), 2)
        print(json.dumps(found))


@torch.inference_mode()
def switch_over_forward(base: Path, delta: Path, device: str) -> float:
    model, switches, forwards = soteria.load_steered(base, delta, device=device), [], []
    ids = torch.tensor([[1]], device=device)

    def now() -> float:
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    for language in ("hi", "th") * 3:
        started = now()
        model.set_language(language)
        switched = now()
        model(input_ids=ids)
        switches.append(switched - started)
        forwards.append(now() - switched)
    print(f"one change of language took {statistics.median(switches):.2f} s", file=sys.stderr)
    return statistics.median(switches) / statistics.median(forwards)


if __name__ == "__main__":
    main()
