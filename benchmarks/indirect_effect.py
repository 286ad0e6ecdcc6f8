"""Step 1 both ways in one process, on a random model of a given shape: the forking sweep, and one forward pass a head.

Ends with one JSON line:
  forwards      time of the sweep / time of one forward pass
  bound         the same by arithmetic: 1 + tokens patched and after * n_heads * (n_layers + 1) / (2 T), a class
  ratio         time of one forward pass a head (and class), extrapolated from a sample / time of the sweep
  max_abs_diff  between the sample's effects and the sweep's; max_abs_effect: the largest effect, to compare it with
  peak_bytes    the most memory the process (on a GPU: the allocator) has held, the model included
Times are medians of runs that alternate; seconds are printed only as such ratios, except on a GPU, where the time of a
language grid (12 languages x 5 tasks x 25 prompts) is worked out from the sweep's.
"""

import argparse
import json
import platform
import random
import resource
import statistics
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

from soteria.models.loading import DTYPES, LoadedModel, default_device, read_geometry  # noqa: E402
from soteria.scoring.indirect_effect import (  # noqa: E402
    LAST_TOKEN_CLASSES,
    TokenizedPrompt,
    answer_probability,
    effect_by_full_forward,
    forward_passes,
    indirect_effects,
)
from soteria.scoring.prompts import TOKEN_CLASSES  # noqa: E402
from soteria.scoring.sweep import ForkingSweep  # noqa: E402

N_SHOTS = 10
QUERY = ["query_structural"] * 2 + ["query_demonstration"] * 2 + ["query_separator", "query_structural"]
GRID_PROMPTS = 12 * 5 * 25


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--layers", type=int, default=24)
    add("--heads", type=int, default=16)
    add("--kv_heads", type=int, help="default: as many as heads")
    add("--width", type=int, default=1024, help="of the residual stream")
    add("--ffn", type=int, help="default: 3.5 times the width, as in Llama 3.1 8B")
    add("--vocabulary", type=int, help="default: 31.3 times the width, as in Llama 3.1 8B")
    add("--prompt_tokens", type=int, default=300)
    add("--answer_tokens", type=int, default=1, help="more than 1: the probability of a whole answer of so many tokens")
    add("--dtype", choices=list(DTYPES), default="float32")
    add("--device", default=default_device())
    add("--all_classes", action="store_true", help="score all ten token classes, not the last token alone")
    add("--sample", type=int, default=8, help="heads scored by one forward pass each")
    add("--repeats", type=int, default=3, help="runs of the forward pass and of the sweep")
    return parser.parse_args()


def random_model(arguments: argparse.Namespace) -> PreTrainedModel:
    """A Llama of the shape, its unembedding scaled so that the likeliest token has a probability worth changing."""
    config = LlamaConfig(
        hidden_size=arguments.width,
        intermediate_size=arguments.ffn or arguments.width * 7 // 2,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.heads,
        num_key_value_heads=arguments.kv_heads or arguments.heads,
        vocab_size=arguments.vocabulary or arguments.width * 501 // 16,
        max_position_embeddings=max(2048, arguments.prompt_tokens),
        initializer_range=arguments.width**-0.5,
    )
    torch.manual_seed(0)
    with torch.device(arguments.device):
        model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[arguments.dtype]).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    return model


def random_prompt(n_tokens: int, n_answer: int, vocabulary: int, device: str) -> TokenizedPrompt:
    """Random ids with the roles of a ten-shot prompt; what is over goes to the demonstrations."""
    per_shot, over = divmod(n_tokens - 2 - len(QUERY), N_SHOTS)
    classes = ["bos"]
    for shot in range(N_SHOTS):
        words = per_shot + (shot < over) - 6
        classes += ["structural"] + ["demonstration"] * (words - words // 2) + ["separator", "structural", "predictive"]
        classes += ["label"] * (words // 2) + ["end_of_example", "separator"]
    classes += [*QUERY, "query_predictive"]
    ids = torch.randint(vocabulary, (n_tokens + n_answer,), generator=torch.Generator().manual_seed(1)).to(device)
    return TokenizedPrompt(ids[:n_tokens], list(range(n_tokens)), classes, ids[n_tokens:])


def main() -> None:
    arguments = parse_arguments()
    model = random_model(arguments)
    loaded = LoadedModel("random", model, None, read_geometry(model))
    geometry, on_gpu = loaded.geometry, torch.device(arguments.device).type == "cuda"
    n_tokens, n_heads, n_layers = arguments.prompt_tokens, geometry.n_heads, geometry.n_layers
    prompt = random_prompt(n_tokens, arguments.answer_tokens, model.config.vocab_size, arguments.device)
    means = torch.randn(n_layers, n_heads, n_tokens, geometry.head_dim, generator=torch.Generator().manual_seed(2))
    classes = TOKEN_CLASSES if arguments.all_classes else LAST_TOKEN_CLASSES
    sweep = ForkingSweep(loaded)

    @torch.inference_mode()
    def forward():
        kept = len(prompt.answer)
        return model(input_ids=prompt.sequence[None], use_cache=False, logits_to_keep=kept).logits[0, -kept:]

    def timed(run, times: list[float]):
        if on_gpu:
            torch.cuda.synchronize()
        started = time.perf_counter()
        result = run()
        if on_gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
        return result

    # The answer is the likeliest tokens; both ways are warmed up before anything is timed.
    for place in range(len(prompt.answer)):
        prompt.answer[place] = forward()[place].argmax()
    if on_gpu:
        indirect_effects(sweep, prompt, means, classes)
    draw = random.Random(3)
    sample = [
        (draw.randrange(n_layers), draw.randrange(n_heads), draw.choice(classes)) for _ in range(arguments.sample)
    ]
    forwards, sweeps, slow, differences = [], [], [], []
    progress = tqdm(total=arguments.repeats, desc="timing", unit="round", disable=None)
    for repeat in range(arguments.repeats):
        timed(forward, forwards)
        effects = timed(lambda: indirect_effects(sweep, prompt, means, classes), sweeps)
        for layer, head, name in sample[repeat :: arguments.repeats]:
            times: list[float] = []
            wanted = timed(lambda at=(layer, head, name): effect_by_full_forward(loaded, prompt, means, *at), times)
            slow.append(times[0] / 2)  # it runs the clean prompt and the patched one
            differences.append(abs(wanted - effects[layer, head, classes.index(name)].item()))
        progress.update()
    progress.close()

    one, own = statistics.median(forwards), statistics.median(sweeps)
    n_patches = n_layers * n_heads * len(classes)
    found = {
        "forwards": round(own / one, 3),
        "bound": round(forward_passes(prompt, classes, sweep), 3),
        "ratio": round((n_patches + 1) * statistics.median(slow) / own, 1),
        "max_abs_diff": max(differences),
        "max_abs_effect": effects.abs().max().item(),
        "answer_probability": answer_probability(forward(), prompt.answer).item(),
        "peak_bytes": peak_bytes(arguments.device),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        **{name: getattr(arguments, name) for name in ("layers", "heads", "width", "prompt_tokens", "dtype")},
        "kv_heads": model.config.num_key_value_heads,
        "all_classes": arguments.all_classes,
        "answer_tokens": arguments.answer_tokens,
        "machine": machine(arguments.device),
        "torch": torch.__version__,
    }
    if on_gpu:
        found["grid_minutes"] = round(own * GRID_PROMPTS / 60, 1)
    print(json.dumps(found))


def peak_bytes(device: str) -> int:
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def machine(device: str) -> str:
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{name}, {torch.get_num_threads()} threads"


if __name__ == "__main__":
    main()
