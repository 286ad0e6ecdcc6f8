"""How large the LoRA of a steering is at the widths of Llama 3.1 8B."""

import peft
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from soteria.models.task_vector import TaskVector
from soteria.steering.adapter import write_adapter
from soteria.steering.formula import open_steering

N_LAYERS, N_HEADS = 32, 32


def config(n_layers: int) -> LlamaConfig:
    """Llama 3.1 8B's, with fewer layers."""
    widths = {"hidden_size": 4096, "intermediate_size": 14336, "vocab_size": 128256}
    heads = {"num_attention_heads": N_HEADS, "num_key_value_heads": 8}
    return LlamaConfig(num_hidden_layers=n_layers, **widths, **heads, dtype="bfloat16")


def n_bytes_8b() -> int:
    """The size of the whole checkpoint in bfloat16."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config(N_LAYERS), dtype=torch.bfloat16)
    return sum(parameter.nbytes for parameter in model.parameters())


def test_the_lora_of_a_steering_is_a_fiftieth_of_an_8b_checkpoint_at_most(tmp_path):
    base, rank, layer = tmp_path / "base", 64, "model.layers.0.self_attn.o_proj"
    config(1).save_pretrained(base)
    draw = torch.Generator().manual_seed(0)
    factors = [0.02 * torch.randn(shape, generator=draw) for shape in ((rank, 4096), (4096, rank))]
    save_file({f"{layer}.weight": torch.zeros(4096, 4096, dtype=torch.bfloat16)}, base / "model.safetensors")
    peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=["o_proj"]).save_pretrained(tmp_path / "tuned")
    named = {f"base_model.model.{layer}.lora_{x}.weight": factor for x, factor in zip("AB", factors, strict=True)}
    save_file(named, tmp_path / "tuned" / "adapter_model.safetensors")
    vector = TaskVector.open(str(base), str(tmp_path / "tuned"))
    steering = open_steering(vector, [(0, head) for head in range(0, N_HEADS, 2)], 2, source="by hand")
    facts = write_adapter(steering, tmp_path / "lora", language="Hindi", rank=rank, max_error=0.05)
    written = (tmp_path / "lora" / "adapter_model.safetensors").stat().st_size
    assert facts["relative_error"] < 1e-6
    whole = n_bytes_8b()
    assert whole == 2 * 8_030_261_248
    assert 50 < whole / (N_LAYERS * written) < 240  # every layer adds as much
