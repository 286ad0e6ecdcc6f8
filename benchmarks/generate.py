"""Time generation as in generate.py against a plain loop, on 300 prompts of mixed length in float32.

The last line printed is JSON:
  ratio       median time of the plain loop (`model.generate` on `batch_size` rows at a time, in the file's order) /
              median time of `soteria.answering.generation.generate`
  identical   whether all answers are the same, token for token
  tokens_per_second  of answers, each way
  continuous  median time of the plain loop / median time of transformers' `generate_batch` (with --continuous)
The methods take turns. The default model is the embedded base, which ends its answers itself; with --layers it is a
random Llama in which every fiftieth token is an end token, so that answers have random lengths.
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "benchmarks")]

from indirect_effect import machine  # noqa: E402

from soteria.answering.decoding import end_tokens, pad_token  # noqa: E402
from soteria.answering.generation import all_inputs, generate  # noqa: E402
from soteria.answering.questions import read_questions  # noqa: E402
from soteria.languages import PAPER_LANGUAGES  # noqa: E402
from soteria.models.loading import DTYPES, LoadedModel, load_model, load_tokenizer, read_geometry  # noqa: E402

EMBEDDED = str(ROOT / "data" / "models" / "polyglot-base")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--prompts", type=int, default=300)
    add("--batch_size", type=int, default=8)
    add("--max_new_tokens", type=int, default=512)
    add("--repeats", type=int, default=3)
    add("--continuous", action="store_true", help="also time transformers' continuous batching")
    add("--layers", type=int, help="use a random Llama with this many layers instead of the embedded base")
    add("--width", type=int, default=512)
    add("--kv_heads", type=int, help="default: as many as heads")
    add("--head_dim", type=int, default=64)
    add("--vocabulary", type=int, help="default: the tokenizer's")
    add("--dtype", choices=list(DTYPES), default="float32")
    add("--vllm", action="store_true", help="also time vLLM, which has to be installed; with --layers")
    add("--device", default="cpu")
    return parser.parse_args()


def random_model(arguments: argparse.Namespace) -> LoadedModel:
    tokenizer, width, heads = load_tokenizer(EMBEDDED), arguments.width, arguments.width // arguments.head_dim
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=7 * width // 2,
        num_hidden_layers=arguments.layers,
        num_attention_heads=heads,
        num_key_value_heads=arguments.kv_heads or heads,
        vocab_size=arguments.vocabulary or len(tokenizer),
    )
    with torch.device(arguments.device):
        model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[arguments.dtype]).eval()
    model.generation_config.eos_token_id = list(range(0, config.vocab_size, 50))
    return LoadedModel("random", model, tokenizer, read_geometry(model))


def mixed_prompts(loaded: LoadedModel, n: int) -> list[list[int]]:
    """Token ids of policy questions in all languages, in random order; every tenth prompt joins two to ten of them."""
    draw = random.Random(0)
    asked = [
        (question, language)
        for language in PAPER_LANGUAGES
        for question in read_questions(f"policy_{language.name}", language).questions
    ]
    prompts = []
    for at in range(n):
        chosen = draw.sample(asked, draw.randint(2, 10) if at % 10 == 0 else 1)
        prompts += all_inputs(loaded, [" ".join(question for question, _ in chosen)], chosen[0][1], False)
    return prompts


def cut(tokens: list[int], ends: set[int]) -> list[int]:
    """The tokens up to and including the first end token."""
    first = next((at for at, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[: first + 1]


class TokenIds:
    """A tokenizer that decodes tokens to their numbers, so that answers can be compared token for token."""

    def __init__(self, tokenizer):
        self.pad_token_id, self.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id

    def batch_decode(self, rows, skip_special_tokens):
        return [json.dumps(row) for row in rows]


def plainly(loaded: LoadedModel, prompts, arguments) -> list[list[int]]:
    pad, ends, answers = pad_token(loaded), end_tokens(loaded), []
    for start in range(0, len(prompts), arguments.batch_size):
        rows = prompts[start : start + arguments.batch_size]
        length = max(map(len, rows))
        ids = torch.tensor([[pad] * (length - len(row)) + row for row in rows], device=loaded.model.device)
        mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows], device=loaded.model.device)
        with torch.inference_mode():
            output = loaded.model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=arguments.max_new_tokens,
                do_sample=False,
                pad_token_id=pad,
            )
        answers += [cut(row, ends) for row in output[:, length:].tolist()]
    return answers


def by_soteria(loaded: LoadedModel, prompts, arguments) -> list[list[int]]:
    numbers = LoadedModel(loaded.name, loaded.model, TokenIds(loaded.tokenizer), loaded.geometry)
    found = {}
    for batch in generate(numbers, prompts, arguments.batch_size, arguments.max_new_tokens):
        found |= batch
    return [json.loads(found[row]) for row in range(len(prompts))]


def continuously(loaded: LoadedModel, prompts, arguments) -> list[list[int]]:
    ends = end_tokens(loaded)
    settings = GenerationConfig(
        max_new_tokens=arguments.max_new_tokens,
        do_sample=False,
        eos_token_id=list(ends),
        pad_token_id=pad_token(loaded),
    )
    found = loaded.model.generate_batch(inputs=prompts, generation_config=settings, progress_bar=False)
    return [cut(list(output.generated_tokens), ends) for output in found.values()]


def by_vllm(loaded: LoadedModel, prompts, arguments) -> tuple[list[list[int]], float]:
    """The answers of vLLM's offline engine, and the seconds that the second of two runs took."""
    from vllm import LLM, SamplingParams

    with tempfile.TemporaryDirectory() as folder:
        loaded.model.save_pretrained(folder)
        loaded.tokenizer.save_pretrained(folder)
        loaded.model.to("cpu")
        torch.cuda.empty_cache()
        engine = LLM(folder, dtype=arguments.dtype)
        ends = sorted(end_tokens(loaded))
        asked = SamplingParams(temperature=0, max_tokens=arguments.max_new_tokens, stop_token_ids=ends)
        for _ in range(2):
            started = time.perf_counter()
            found = engine.generate([{"prompt_token_ids": ids} for ids in prompts], asked)
            seconds = time.perf_counter() - started
    return [cut(list(each.outputs[0].token_ids), {*ends}) for each in found], seconds


def main() -> None:
    arguments = parse_arguments()
    if arguments.layers:
        loaded = random_model(arguments)
    else:
        loaded = load_model(EMBEDDED, arguments.device, arguments.dtype)
    prompts = mixed_prompts(loaded, arguments.prompts)
    ways = {"plain": plainly, "soteria": by_soteria} | ({"continuous": continuously} if arguments.continuous else {})
    seconds = {name: [] for name in ways}
    answers = {}
    for _ in tqdm(range(arguments.repeats), desc="rounds", disable=None):
        for name, way in ways.items():
            started = time.perf_counter()
            answers[name] = way(loaded, prompts, arguments)
            seconds[name].append(time.perf_counter() - started)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    lengths = sorted(map(len, answers["plain"]))
    if arguments.vllm:
        answers["vllm"], median["vllm"] = by_vllm(loaded, prompts, arguments)
    result = {
        "ratio": round(median["plain"] / median["soteria"], 2),
        "identical": answers["plain"] == answers["soteria"],
        "prompt_tokens": [min(map(len, prompts)), max(map(len, prompts))],
        "answer_tokens": [lengths[0], round(sum(lengths) / len(lengths)), lengths[-1]],
        "seconds": {name: round(value, 2) for name, value in median.items()},
        "tokens_per_second": {name: round(sum(map(len, answers[name])) / value, 1) for name, value in median.items()},
        "arguments": vars(arguments),
        "machine": machine(arguments.device),
    }
    if arguments.continuous:
        result["continuous"] = round(median["plain"] / median["continuous"], 2)
        result["continuous_identical"] = answers["plain"] == answers["continuous"]
    print(json.dumps(result))


if __name__ == "__main__":
    main()
