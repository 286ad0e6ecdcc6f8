"""Try every causal language model architecture of the installed transformers, built small with random weights.

Of each: its heads are told apart (geometry), step 1 equals one full forward pass a head, the steered checkpoint equals
the formula, and batched answers equal transformers' own `generate()` on one prompt at a time. Writes a Markdown table.

    python scripts/try_architectures.py [MODEL_TYPE ...] [--output docs/models.md]

Without names: all of them, a few minutes on two CPU cores.
"""

import argparse
import re
import sys
import tempfile
import textwrap
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

from soteria.answering.decoding import decode  # noqa: E402
from soteria.errors import UserError  # noqa: E402
from soteria.models.geometry import read_geometry  # noqa: E402
from soteria.models.loading import LoadedModel, auto_class_of, load_weights  # noqa: E402
from soteria.models.memory import TokenBudget  # noqa: E402
from soteria.models.task_vector import TaskVector  # noqa: E402
from soteria.scoring.indirect_effect import (  # noqa: E402
    TokenizedPrompt,
    effect_by_full_forward,
    indirect_effects,
)
from soteria.scoring.sweep import ForkingSweep, sweep_over  # noqa: E402
from soteria.steering.checkpoint import steer_checkpoint  # noqa: E402
from soteria.steering.formula import open_steering  # noqa: E402
from soteria.storage import files  # noqa: E402

VOCABULARY, LAYERS, HEADS, PROMPT_TOKENS = 420, 4, 4, 24
SWEEP, FULL_PASSES, EQUAL, REFUSED = "sweep", "full passes", "equal", "refused"
MOST_PARAMETERS = 100_000_000  # of a model that counts as small; towers of other inputs do not shrink
# Small values for whatever a config calls its sizes; those that it does not have are left out.
SMALL = {
    **dict.fromkeys(["hidden_size", "n_embd", "d_model", "dim", "embed_dim", "word_embed_proj_dim", "lru_width"], 32),
    **dict.fromkeys(["intermediate_size", "ffn_dim", "n_inner", "d_ff", "decoder_ffn_dim", "encoder_ffn_dim"], 48),
    **dict.fromkeys(["ffn_hidden_size", "d_inner", "dff", "dim_ff"], 48),
    **dict.fromkeys(["moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"], 16),
    **dict.fromkeys(["num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"], LAYERS),
    **dict.fromkeys(["num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"], HEADS),
    **dict.fromkeys(["num_key_value_heads", "num_kv_heads", "linear_num_key_heads"], 2),
    **dict.fromkeys(["vocab_size"], VOCABULARY),
    **dict.fromkeys(["max_position_embeddings", "n_positions", "max_seq_len"], 128),
    **dict.fromkeys(["num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"], 4),
    **dict.fromkeys(["num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"], 2),
    **dict.fromkeys(["n_group", "topk_group", "n_shared_experts", "mamba_n_groups", "n_groups", "mamba_ngroups"], 1),
    **dict.fromkeys(["q_lora_rank", "kv_lora_rank", "global_head_dim"], 16),
    **dict.fromkeys(["head_dim", "qk_rope_head_dim", "qk_nope_head_dim", "query_pre_attn_scalar"], 8),
    **dict.fromkeys(["mamba_d_state", "ssm_state_size", "state_size", "linear_key_head_dim"], 8),
    **dict.fromkeys(["linear_value_head_dim", "sliding_window", "attention_window_size"], 8),
    **dict.fromkeys(["mamba_n_heads", "mamba_num_heads", "linear_num_value_heads"], 4),
    **dict.fromkeys(["mamba_d_head", "mamba_head_dim"], 16),
    **{"v_head_dim": 12, "rotary_dim": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 0},
}
# Models that see images and have a text part, beside those that transformers lists as causal language models.
WRAPPERS = ("mistral3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava", "idefics3", "internvl")
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
# What single types need beside, so that the parts fit each other and every kind of layer is there.
OWN: dict[str, dict] = {
    "bailing_hybrid": {"layer_group_size": 2, "n_group": 1, "topk_group": 1},
    "bamba": {"attn_layer_indices": [1, 3]},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {"num_kv_shared_layers": 0, "intermediate_size": [48] * LAYERS, "hidden_size_per_layer_input": 8},
    "gemma4_text": {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY},
    "gpt_neo": {"attention_types": [[["global", "local"], LAYERS // 2]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * (LAYERS // 2)},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "linear_head_dim": 8,
        "linear_num_heads": 4,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"] * (LAYERS // 2)},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * (LAYERS // 2)},
    "qwen4_exp_text": {"layer_types": ["linear_attention", "indexed_attention"] * (LAYERS // 2)},
    "zaya": {"num_experts_per_tok": 1, "layer_types": ["hybrid"] * LAYERS},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * (LAYERS // 2)},
    "qwen2_vl": MROPE,
    "qwen2_5_vl": MROPE,
    "reformer": {"is_decoder": True},
}


def small_config(model_type: str) -> PreTrainedConfig:
    default = CONFIG_MAPPING[model_type]()
    text = default.get_text_config()
    if text is default:
        return type(default)(**_sizes(default, model_type))
    parts = {key: getattr(default, key, None) for key in default.sub_configs}
    return type(default)(
        **{key: _sizes(part, model_type if part is text else "") for key, part in parts.items() if part}
    )


def _sizes(config: PreTrainedConfig, model_type: str) -> dict:
    renamed = getattr(type(config), "attribute_map", {})
    sizes = {name: value for name, value in SMALL.items() if name in config.to_dict() and name not in renamed}
    if "kv_lora_rank" in sizes:  # latent attention has a key for every head
        sizes["num_key_value_heads"] = HEADS
    return sizes | OWN.get(model_type, {})


def random_model(config: PreTrainedConfig) -> PreTrainedModel | None:
    """None if it is large. Its weights exceed a fresh model's, so that a head's replacement shows above rounding."""
    with torch.device("meta"):
        empty = auto_class_of(config).from_config(config)
    if sum(weight.numel() for weight in empty.parameters()) > MOST_PARAMETERS:
        return None
    torch.manual_seed(0)
    model = auto_class_of(config).from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            is_norm = parameter.ndim == 1 and not name.endswith("bias")
            parameter.copy_(parameter + 0.1 * noise if is_norm else 0.3 * noise)
    return model


def tried_scores(loaded: LoadedModel) -> str:
    """SWEEP or FULL_PASSES: how step 1 scores the model. Raises AssertionError where it is not exact."""
    geometry = loaded.geometry
    classes = ["query_structural"] * (PROMPT_TOKENS - 1) + ["query_predictive"]
    ids = torch.randint(2, VOCABULARY, (PROMPT_TOKENS,))
    answer = loaded.model(input_ids=ids[None], use_cache=False).logits[0, -1:].argmax(-1)
    prompt = TokenizedPrompt(ids, list(range(PROMPT_TOKENS)), classes, answer)
    means = torch.randn(geometry.n_rows, geometry.n_heads, PROMPT_TOKENS, geometry.head_dim)
    sweep = sweep_over(loaded)
    effects = indirect_effects(sweep, prompt, means, ["query_predictive"])
    for row, head in geometry.places:
        slow = effect_by_full_forward(loaded, prompt, means, row, head, "query_predictive")
        assert abs(effects[row, head, 0].item() - slow) <= 1e-5, f"head {head} of row {row} scores otherwise"
    assert effects.nan_to_num().abs().max() > 1e-6, "no head has an effect"
    return SWEEP if isinstance(sweep, ForkingSweep) else FULL_PASSES


def tried_steering(loaded: LoadedModel) -> None:
    """Raises AssertionError where the steered checkpoint is not the formula on two heads and the base elsewhere."""
    geometry = loaded.geometry
    heads = [geometry.all_heads[1], geometry.all_heads[-1]]
    with tempfile.TemporaryDirectory() as folder:
        base, tuned, steered = (Path(folder) / name for name in ("base", "tuned", "steered"))
        loaded.model.save_pretrained(base)
        before = load_weights(str(base), "cpu", "float32").state_dict()
        for projection in loaded.projections:
            projection.weight.data += torch.randn_like(projection.weight)
        loaded.model.save_pretrained(tuned)
        vector = TaskVector.open(str(base), str(tuned))
        steer_checkpoint(open_steering(vector, heads, 2.0, source="by hand"), steered, language="English")
        want, after = before, loaded.model.state_dict()
        for layer, head in heads:
            name = f"{vector.module(layer)}.weight"
            at = geometry.head_slice(geometry.row(layer), head)
            at = at if geometry.transposed else (slice(None), at)
            want[name][at] -= 2.0 * (after[name][at] - want[name][at])
        found = load_weights(str(steered), "cpu", "float32").state_dict()
        assert found.keys() == want.keys(), "other tensors"
        for name, value in want.items():
            assert torch.allclose(found[name], value, atol=1e-5), f"{name} is steered otherwise"


def tried_answers(loaded: LoadedModel) -> None:
    """Raises AssertionError where batched answers are not those of `generate()`."""
    prompts = [torch.randint(2, VOCABULARY, (n,)).tolist() for n in (5, 17, 11)]
    limits = [8, 3, 6]  # rows leave the batch one after the other
    ours = decode(loaded, prompts, limits, TokenBudget(1000))
    for prompt, own, limit in zip(prompts, ours, limits, strict=True):
        ids = torch.tensor([prompt])
        options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": limit, "do_sample": False}
        theirs: Tensor = loaded.model.generate(ids, **options)[0, len(prompt) :]
        assert theirs.tolist() == own, "answers in a batch are not those of generate()"


PAGE = """
# Models

Every causal language model architecture of the installed transformers ({version}), and some that see images, built
small with random weights and tried by

```sh
python scripts/try_architectures.py --output docs/models.md
```

*Equal* means: step 1 agrees with one full forward pass a head, answers in a batch with transformers' own `generate()`
on one prompt at a time, and the written steered checkpoint with the formula, to rounding. That says that the code
handles the architecture, not that its large models were run.

**Equal, step 1 by the [sweep](scoring.md#what-it-costs): {n_swept}.** {swept}.

**Equal, step 1 by one full forward pass a head: {n_slow}.** {slow}. The sweep cannot follow these: their attention does
not go through transformers' interface or has terms of its own, or they have layers without attention heads (linear
attention, state spaces, convolutions). Of such hybrids the layers that have heads are scored and steered, and heads
keep the numbers of their layers among all.

**Refused or not built: {n_bad}.** What says *not built small* was not tried.
"""


class Row(NamedTuple):
    """What came out of an architecture: a word for each step."""

    name: str
    scores: str = "–"
    answers: str = "–"
    steering: str = "–"
    reason: str = ""

    @property
    def is_equal(self) -> bool:
        return self.scores in (SWEEP, FULL_PASSES) and self.answers == self.steering == EQUAL


class Tokens:
    """As much of a tokenizer as decoding looks at."""

    pad_token_id = eos_token_id = 0


def tried(model_type: str) -> Row:
    """Step 1, answers and steering of an architecture, and the reasons where one of them is not equal."""
    try:
        model = random_model(small_config(model_type))
    except Exception as error:
        return Row(model_type, reason=f"not built small: {_line(error)}")
    if model is None:
        return Row(model_type, reason=f"not built small: it still has more than {MOST_PARAMETERS:,} parameters")
    try:
        loaded = LoadedModel(model_type, model, Tokens(), read_geometry(model))
    except UserError as error:
        return Row(model_type, REFUSED, REFUSED, REFUSED, _line(error))
    found, reasons = [], []
    for step in (tried_scores, tried_answers, tried_steering):
        try:
            found.append(step(loaded) or EQUAL)
        except UserError as error:
            found.append(REFUSED)
            reasons.append(_line(error))
        except AssertionError as error:
            found.append("unequal")
            reasons.append(_line(error))
        except Exception as error:
            found.append("traceback")
            reasons.append(f"{step.__name__}: {type(error).__name__}: {_line(error)}")
    return Row(model_type, *found, "; ".join(reasons))


def _line(error: BaseException) -> str:
    line = (str(error).strip() or type(error).__name__).splitlines()[0].replace("|", "/")
    return re.sub(r"/tmp/\S+", "…", line).partition("; see docs/models.md")[0][:200]


def page(rows: list[Row]) -> str:
    """The Markdown page of all rows."""
    good, bad = ([row for row in rows if row.is_equal == equal] for equal in (True, False))
    swept, slow = ([row.name for row in good if (row.scores == SWEEP) == by_sweep] for by_sweep in (True, False))
    lists = {"swept": swept, "slow": slow, "bad": bad}
    text = PAGE.format(
        version=transformers.__version__,
        **{name: ", ".join(sorted(each)) for name, each in lists.items() if name != "bad"},
        **{f"n_{name}": len(each) for name, each in lists.items()},
    )
    paragraphs = [part if part[0] in "#`" else textwrap.fill(part, 130) for part in text.strip().split("\n\n")]
    table = ["| architecture | step 1 | answers | steering | reason |", "| --- | --- | --- | --- | --- |"]
    return "\n\n".join([*paragraphs, "\n".join([*table, *(f"| {' | '.join(row)} |" for row in bad)])]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_type", nargs="*", help="transformers' names (default: all)")
    parser.add_argument("--output", type=Path, help="Markdown file to write (default: print a line each)")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    types, rows = arguments.model_type or sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *WRAPPERS}), []
    for model_type in tqdm(types, desc="architectures", disable=None):
        rows.append(tried(model_type))
        if not arguments.output:
            print(*rows[-1], sep=" | ", flush=True)
    if arguments.output:
        files.write_text(arguments.output, page(rows))
    if any("traceback" in row for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
