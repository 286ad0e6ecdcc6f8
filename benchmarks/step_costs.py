"""What one layer costs the host (Python and kernel launches, which a GPU waits for), for `reproduce.sh --plan`.

Ends with one JSON line:
  host_seconds_per_layer  seconds per layer of a decoding step of a Llama whose layers have almost nothing to compute
  bytes_per_answer        size of a row of answers and of its verdict together, over the cells under --results
host_seconds_per_layer goes into configs/costs.yaml as it is; it differs between hosts.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, LlamaConfig

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "benchmarks")]

from indirect_effect import machine  # noqa: E402


@torch.inference_mode()
def host_seconds_per_layer(layers: int, steps: int) -> float:
    """Median seconds per layer of decoding one row: at a width of 64, only the host's work counts."""
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=64,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    cache, ids, times = None, torch.ones(1, 100, dtype=torch.long), []
    for _ in tqdm(range(steps), desc="decoding", disable=None):
        started = time.perf_counter()
        output = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        times.append(time.perf_counter() - started)
        cache, ids = output.past_key_values, output.logits[:, -1:].argmax(-1)
    return statistics.median(times[1:]) / layers


def bytes_per_answer(results: Path) -> float | None:
    """Mean size of a row of answers and of its verdict together, over all cells; None if there are none."""
    sizes, rows = 0, 0
    for verdicts in results.glob("cells/*/*/*/*.by_*.csv"):
        answers = verdicts.with_name(verdicts.name.partition(".by_")[0] + ".csv")
        sizes += verdicts.stat().st_size + answers.stat().st_size
        rows += json.loads(verdicts.with_suffix(".json").read_text(encoding="utf-8"))["rows"]
    return sizes / rows if rows else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--results", type=Path, default=ROOT / "results")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # more threads would wait for one another
    found = {
        "host_seconds_per_layer": round(host_seconds_per_layer(arguments.layers, arguments.steps), 6),
        "bytes_per_answer": bytes_per_answer(arguments.results),
        "machine": machine("cpu"),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
