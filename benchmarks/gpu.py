"""The table of benchmarks/README.md on a GPU, in one command: `python benchmarks/gpu.py`.

Measures on random weights in Llama 3.1 8B's shape and bfloat16: the sweep of step 1 beside one forward pass a head,
a change of language of a loaded model, our decoding beside `generate()` and, where it is installed, vLLM, and one cell
of configs/paper.yaml, whose times are what `reproduce.sh --plan` needs. Takes 70 GB of disk. Without a GPU the table
says so; `--tiny` tries the script on any device, with sizes that mean nothing.
"""

import argparse
import importlib.util
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import torch
import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "src")]


from soteria.grid.grid_file import read_grid  # noqa: E402
from soteria.storage import files, paths  # noqa: E402
from steer import LLAMA_8B, machine, write_checkpoint  # noqa: E402

START, END = "<!-- from here: python benchmarks/gpu.py -->\n", "<!-- to here -->\n"
EMBEDDED = ROOT / "data" / "models" / "polyglot-base"
LAYERS, HEAD_DIM = 32, 128


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", help="default: cuda if there is one")
    add("--output", type=Path, default=ROOT / "benchmarks" / "README.md", help="a Markdown file with the two marks")
    add("--folder", type=Path, help="where to work (default: the system's own)")
    add("--tiny", action="store_true", help="a model of next to nothing, to try the script")
    return parser.parse_args()


def run(script: str, *options: object) -> dict:
    """What a benchmark says in its last line."""
    command = [sys.executable, str(ROOT / "benchmarks" / f"{script}.py"), *map(str, options)]
    print(" ".join(command[1:]), file=sys.stderr)
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def sweep_rows(device: str, tiny: bool) -> list[tuple[str, str]]:
    width = 64 if tiny else LLAMA_8B["hidden_size"]
    shape = {"layers": 2, "heads": 4, "kv_heads": 2} if tiny else {"layers": LAYERS, "heads": 32, "kv_heads": 8}
    shape |= {"width": width, "ffn": width * 7 // 2, "vocabulary": 512 if tiny else LLAMA_8B["vocab_size"]}
    options = [f"--{name}={value}" for name, value in shape.items()]
    rows = []
    for length in (300, 1000):
        found = run("indirect_effect", *options, "--dtype=bfloat16", "--device", device, "--prompt_tokens", length)
        grid = f"; {found['grid_minutes']} minutes for twelve languages" if "grid_minutes" in found else ""
        off = f"largest difference {found['max_abs_diff']:.1g}, largest effect {found['max_abs_effect']:.1g}"
        rows.append((f"one forward pass a head ÷ the sweep, {length} tokens", f"{found['ratio']} ({off}{grid})"))
    return rows


def steering_rows(device: str, tiny: bool, folder: Path) -> list[tuple[str, str]]:
    layers, width = (2, 128) if tiny else (7, LLAMA_8B["hidden_size"])
    found = run(
        *("steer", "--switch", "--repeats", 1, "--layers", layers, "--width", width),
        *("--device", device, "--folder", folder),
    )
    return [("change of language in place ÷ forward pass of one token", str(found["switch_over_forward"]))]


def decoding_rows(device: str, tiny: bool) -> list[tuple[str, str]]:
    options = ["--dtype=bfloat16", "--repeats=1", "--device", device]
    if tiny:
        options += ["--layers=2", "--width=128", "--prompts=4", "--max_new_tokens=4"]
    else:
        options += [f"--layers={LAYERS}", f"--width={LLAMA_8B['hidden_size']}", f"--head_dim={HEAD_DIM}"]
        options += ["--kv_heads=8", f"--vocabulary={LLAMA_8B['vocab_size']}", "--prompts=100", "--batch_size=32"]
    with_vllm = importlib.util.find_spec("vllm") is not None
    rates = run("generate", *options, *(["--vllm"] if with_vllm else []))["tokens_per_second"]
    names = {"plain": "`generate()`", "soteria": "Soteria", "vllm": "vLLM"}
    rows = [(f"decoding by {names[way]}, tokens a second", str(rate)) for way, rate in rates.items()]
    return rows if with_vllm else [*rows, ("decoding by vLLM, tokens a second", "not installed")]


def cell_rows(device: str, tiny: bool, folder: Path) -> list[tuple[str, str]]:
    """The base and the method in one language of configs/paper.yaml, on questions that come with the project."""
    layers, width = (2, 512) if tiny else (LAYERS, LLAMA_8B["hidden_size"])
    for seed, name in enumerate(("base", "tuned")):
        write_checkpoint(folder / name, layers, seed, width)
        for file in EMBEDDED.glob("tokenizer*"):
            shutil.copy(file, folder / name)
    grid = read_grid(ROOT / "configs" / "paper.yaml").model_dump(include={"tasks", "heads", "scaling_factor"})
    grid |= {"models": [{"base": str(folder / "base"), "tuned": str(folder / "tuned")}], "languages": ["English"]}
    grid |= {"prompt_sets": ["policy"], "benign": "everyday", "ablations": {"shared": []}}
    grid |= {"answers": {"batch_size": 32, "max_new_tokens": 4 if tiny else 128, "questions": 2 if tiny else 32}}
    grid |= {"scoring": {"n_trials": 1, "n_shots": 2}, "accuracy_prompts": 1} if tiny else {}
    (folder / "cell.yaml").write_text(yaml.safe_dump(grid))
    command = [sys.executable, str(ROOT / "src" / "reproduce.py"), str(folder / "cell.yaml"), "--device", device]
    subprocess.run([*command, "--results", str(folder / "results"), "--steps", "score", "answer"], check=True)
    seconds = defaultdict(list)
    for line in paths.durations_file(folder / "results", "base").read_text().splitlines():
        step = json.loads(line)
        seconds[step["step"]].append(step["seconds"] / step["units"])
    units = {"load": "loading", "score": "a dataset scored", "answers": "an answer", "cost": "a cell's costs"}
    return [
        (f"a cell of configs/paper.yaml: {units[step]}, seconds", f"{statistics.median(seconds[step]):.2f}")
        for step in units
        if step in seconds
    ]


def main() -> None:
    arguments = parse_arguments()
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    text = arguments.output.read_text(encoding="utf-8")
    if text.count(START) != 1 or text.count(END) != 1:
        sys.exit(f"{arguments.output} lacks the marks between which the table goes: {START}{END}")
    before, _, rest = text.partition(START)
    kept, _, after = rest.partition(END)
    if torch.device(device).type != "cuda" and not arguments.tiny:
        table = kept.strip() + "\n" if "|" in kept else "Not measured: no GPU was at hand.\n"
    else:
        rows = [*sweep_rows(device, arguments.tiny), *decoding_rows(device, arguments.tiny)]
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            rows += steering_rows(device, arguments.tiny, Path(folder))
            rows += cell_rows(device, arguments.tiny, Path(folder))
        size = "a tiny model, to try the script" if arguments.tiny else "Llama 3.1 8B's shape"
        lines = [f"| {size}, random weights, bfloat16 | {machine(device)} |", "|---|---|"]
        table = "\n".join([*lines, *(f"| {what} | {value} |" for what, value in rows)]) + "\n"
    files.write_text(arguments.output, f"{before}{START}\n{table}\n{END}{after}")
    print(table, end="")


if __name__ == "__main__":
    main()
