"""Tiny random checkpoints of every architecture that the project promises, and a small tokenizer for them.

The weights are far larger than a fresh model's, so that replacing one head moves probabilities well above rounding.
"""

import json
from functools import cache
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

VOCABULARY = 420
BOS, EOS = "<s>", "<|endoftext|>"

_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 1024,
}
# Each differs from the others in what step 1 must cope with, said beside it. (model type, config)
ARCHITECTURES: dict[str, tuple[str, dict]] = {
    "llama": ("llama", {**_SIZES, "num_key_value_heads": 2, "num_hidden_layers": 3}),  # two heads share a KV head
    "qwen2": ("qwen2", {**_SIZES, "num_key_value_heads": 1}),  # biases on q, k, v
    "qwen3": ("qwen3", {**_SIZES, "num_key_value_heads": 2, "head_dim": 12}),  # heads wider than hidden / n_heads
    "mistral": ("mistral", {**_SIZES, "num_key_value_heads": 2, "sliding_window": None}),
    "mistral-sliding": ("mistral", {**_SIZES, "num_key_value_heads": 2, "sliding_window": 8}),  # shorter than a prompt
    "phi3": ("phi3", {**_SIZES, "num_key_value_heads": 2, "hidden_size": 48, "sliding_window": None}),  # fused qkv
    "phi3-longrope": (  # another rope once a text is longer than the first training's
        "phi3",
        {
            **_SIZES,
            "num_key_value_heads": 2,
            "hidden_size": 48,
            "sliding_window": None,
            "original_max_position_embeddings": 16,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0] * 6,
                "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 6.0],
            },
        },
    ),
    "gemma2": (  # soft caps, sliding and full attention in turn
        "gemma2",
        {
            **_SIZES,
            "num_key_value_heads": 2,
            "head_dim": 12,
            "sliding_window": 8,
            "query_pre_attn_scalar": 12,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 10.0,
        },
    ),
    "gemma3": (  # a rope for each kind of layer, norms on q and k
        "gemma3_text",
        {
            **_SIZES,
            "num_key_value_heads": 2,
            "head_dim": 12,
            "num_hidden_layers": 3,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "query_pre_attn_scalar": 12,
        },
    ),
    "gpt2": ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 1024}),  # Conv1D, learned positions
    "gpt-neox": ("gpt_neox", {**_SIZES, "use_parallel_residual": True}),
}


@cache
def _trained(pattern: str) -> str:
    """A byte-level BPE over the words of the tests, with text cut by `pattern` first, as JSON."""
    tokenizer = Tokenizer(models.BPE())
    cut = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[EOS, BOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = "Q: yes\nA: no\n\nQ: no.\nA: yes!\n\nQ: France\nA: Paris\n\nQ: भारत\nA: दिल्ली।\n\nQ: a\nA: a\n\n" * 20
    tokenizer.train_from_iterator([text, " hot cold big small new old land city the or er an"] * 3, trainer)
    return tokenizer.to_str()


# GPT-2's way of cutting text, and Llama 3's, where a newline belongs to the punctuation before it (".\n" is a token).
_GPT2_CUT = r"'s|'t| ?\p{L}[\p{L}\p{M}]*| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3_CUT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def tiny_tokenizer(*, adds_bos: bool = True, melts_newlines: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE of VOCABULARY tokens that puts a BOS before a text or not."""
    tokenizer = Tokenizer.from_str(_trained(_LLAMA3_CUT if melts_newlines else _GPT2_CUT))
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=EOS)


def ending_with(token: str) -> PreTrainedTokenizerFast:
    """`tiny_tokenizer`, which puts a token behind everything, too."""
    tokenizer = tiny_tokenizer()
    ids = [(BOS, tokenizer.bos_token_id), (token, tokenizer.convert_tokens_to_ids(token))]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A {token}", special_tokens=ids
    )
    return tokenizer


def without_letters() -> PreTrainedTokenizerFast:
    """A tokenizer of a few English words, to which every other word is the same unknown token."""
    words = [EOS, BOS, "<unk>", "a", "hot", "?", ":", "Q", "A"]
    tokenizer = Tokenizer(models.WordLevel({word: at for at, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, unk_token="<unk>")


def tiny_config(architecture: str, **overrides):
    """The config of one of ARCHITECTURES, or of any transformers model type."""
    model_type, settings = ARCHITECTURES.get(architecture, (architecture, {}))
    common = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 0, "pad_token_id": 0}
    return AutoConfig.for_model(model_type, **{**common, **settings, **overrides})


def tiny_model(architecture: str, *, seed: int = 0, **overrides) -> PreTrainedModel:
    """A random model in float32. Every parameter, biases and norms included, is drawn from `seed`."""
    model = AutoModelForCausalLM.from_config(tiny_config(architecture, **overrides)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_norm = parameter.ndim == 1 and not name.endswith("bias")
            parameter.copy_(parameter + 0.1 * noise if is_norm else 0.3 * noise)
    return model


def save_tiny_model(
    folder: Path, architecture: str, *, seed: int = 0, adds_bos: bool = True, melts_newlines: bool = False, **overrides
) -> Path:
    """Write a random checkpoint (safetensors) with its tokenizer to `folder`. `overrides` go into the config."""
    tiny_model(architecture, seed=seed, **overrides).save_pretrained(folder)
    tiny_tokenizer(adds_bos=adds_bos, melts_newlines=melts_newlines).save_pretrained(folder)
    return folder


def save_tiny_gguf(path: Path, *, seed: int = 0) -> PreTrainedModel:
    """Write a random Llama with its tokenizer as a GGUF file of float32, and return the model."""
    import gguf

    model, vocabulary = tiny_model("llama", seed=seed, num_key_value_heads=4), tiny_tokenizer(adds_bos=False)
    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(VOCABULARY)
    words = json.loads(vocabulary.backend_tokenizer.to_str())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(sorted(words["vocab"], key=words["vocab"].get))
    writer.add_token_merges([" ".join(pair) for pair in words["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for key, tensor in model.state_dict().items():
        if "q_proj" in key or "k_proj" in key:  # llama.cpp rotates pairs that lie side by side
            pairs = tensor.unflatten(0, (config.num_attention_heads, 2, -1))
            tensor = pairs.transpose(1, 2).reshape(tensor.shape).contiguous()
        writer.add_tensor(names.get_name(key, (".weight",)), tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model
