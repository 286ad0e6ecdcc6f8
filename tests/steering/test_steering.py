"""Step 3.1: the written checkpoint and the model steered in memory against the obvious formula, and every refusal."""

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import safetensors.torch
import torch
from huggingface_hub import ModelCard
from tiny_models import tiny_config, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

import steer
from soteria.errors import UserError
from soteria.models import lora
from soteria.models.checkpoints import Checkpoint
from soteria.models.loading import DTYPES, LoadedModel, load_model
from soteria.models.task_vector import TaskVector
from soteria.scoring.heads import write_heads
from soteria.steering import checkpoint, formula
from soteria.steering.formula import Steering, is_steered, open_steering, steered_in_place
from soteria.steering.task_arithmetic import all_parameters_steered
from soteria.storage import paths

# name: (architecture, config, output projection of a layer, head dimension, heads along rows)
MODELS = {
    "llama": ("llama", {}, "model.layers.{}.self_attn.o_proj.weight", 8, False),
    "phi3-96": ("phi3", {"hidden_size": 384}, "model.layers.{}.self_attn.o_proj.weight", 96, False),
    "qwen3": ("qwen3", {}, "model.layers.{}.self_attn.o_proj.weight", 12, False),
    "gpt2": ("gpt2", {}, "transformer.h.{}.attn.c_proj.weight", 8, True),
    "gpt-neox": ("gpt-neox", {}, "gpt_neox.layers.{}.attention.dense.weight", 8, False),
    "mistral": ("mistral", {}, "model.layers.{}.self_attn.o_proj.weight", 8, False),
}
SINGLE, SHARDS = "1GB", "30KB"
# (base's dtype and shard size, tuned model's, scaling factor)
LAYOUTS = [
    ("float32", SHARDS, "float16", SINGLE, 4.0),
    ("bfloat16", SINGLE, "bfloat16", SINGLE, 5.0),
    ("bfloat16", SHARDS, "float32", "50KB", 3.0),
    ("float32", SINGLE, "float32", SINGLE, 1.0),
    ("float16", SINGLE, "bfloat16", SHARDS, 0.37),
]
HEADS = [(2, 1), (0, 3), (0, 0)]
O_PROJ = MODELS["llama"][2]
LORA = {"r": 4, "lora_alpha": 6, "init_lora_weights": False, "target_modules": ["q_proj", "o_proj"]}


def write_model(
    folder: Path,
    model: str = "llama",
    *,
    tuned: bool = False,
    dtype: str = "float32",
    shard_size: str = SINGLE,
    change: Callable[[dict], object] = lambda weights: None,
    **overrides,
) -> Path:
    """A random checkpoint; `tuned` is near it in every tensor. `change` edits the weights by name before saving."""
    architecture, settings, *_ = MODELS[model]
    written = tiny_model(architecture, **{**settings, **overrides})
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in written.parameters() if tuned else []:
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
        change(written.state_dict())
    written.to(DTYPES[dtype]).save_pretrained(folder, max_shard_size=shard_size)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def write_head_list(folder: Path, listed: list) -> Path:
    write_heads(folder / "English_Heads.json", listed)
    return folder


def write_adapter(folder: Path, base: Path, **settings) -> Path:
    """A random adapter of the base, none of its factors zero."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(3)
    peft.get_peft_model(model, peft.LoraConfig(**{**LORA, **settings})).save_pretrained(folder)
    return folder


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder, as its files hold it."""
    return {k: t for path in folder.glob("*.safetensors") for k, t in safetensors.torch.load_file(path).items()}


def loaded(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()


def steered_the_slow_way(base: Path, tuned: Path, listed: list, factor: float, model: str = "llama") -> dict:
    """base - factor * (tuned - base) on the heads' slices of the output projections, all weights in float32."""
    _, _, projection, head_dim, heads_along_rows = MODELS[model]
    weights, tuned_weights = loaded(base), loaded(tuned)
    for layer, head in listed:
        name = projection.format(layer)
        own = slice(head * head_dim, (head + 1) * head_dim)
        at = own if heads_along_rows else (slice(None), own)
        weights[name][at] = weights[name][at] - factor * (tuned_weights[name][at] - weights[name][at])
    return weights


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def same_weights(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(same_bits(a[name], b[name]) for name in a)


def some_heads(folder: Path, seed: int = 0) -> list:
    """About half of a model's heads, in a random order."""
    config = json.loads((folder / "config.json").read_text())
    n_layers = config.get("num_hidden_layers") or config["n_layer"]
    n_heads = config.get("num_attention_heads") or config["n_head"]
    order = torch.randperm(n_layers * n_heads, generator=torch.Generator().manual_seed(seed)).tolist()
    return [divmod(index, n_heads) for index in order[: n_layers * n_heads // 2]]


def opened(base: Path, tuned: Path, listed: list = HEADS, factor: float = 2.0) -> Steering:
    return open_steering(TaskVector.open(str(base), str(tuned)), listed, factor, source="by hand")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def tuned(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("tuned"), tuned=True)


@pytest.fixture(scope="module")
def head_folder(tmp_path_factory) -> Path:
    return write_head_list(tmp_path_factory.mktemp("heads"), HEADS)


@pytest.fixture
def in_memory(base) -> LoadedModel:
    return load_model(str(base), "cpu", "float32")


@pytest.fixture
def output(tmp_path) -> Path:
    """Where the steered model goes: in a folder of its own, in which anything left behind shows."""
    return tmp_path / "models" / "steered"


@pytest.fixture
def run_steer(base, tuned, head_folder, output, run_script, capsys) -> Callable[..., Path | str]:
    """Run `steer.py` with the test's models unless told otherwise; gives the output folder, or stderr if it fails."""

    def run(*options: object, status: int = 0, **paths: object) -> Path | str:
        given = {"base_model": base, "finetune_model": tuned, "head_folder": head_folder, "output": output}
        given = {**given, "language": "English", "scaling_factor": 2, **paths}
        capsys.readouterr()
        ended = run_script(steer, *(f"--{key}={value}" for key, value in given.items()), *options)
        error = capsys.readouterr().err
        assert ended == status, error
        return error if status else Path(given["output"])

    return run


@pytest.fixture
def refused(run_steer, output) -> Callable[..., str]:
    """Run `steer.py` on what it must refuse; gives its one sentence on stderr. Nothing may be left behind."""

    def run(*options: object, **paths: object) -> str:
        sentence = run_steer(*options, status=2, **paths)
        assert sentence.startswith("error: ") and sentence.count("\n") == 1
        assert not output.parent.exists() or not list(output.parent.iterdir())
        return sentence

    return run


# The formula


@pytest.mark.parametrize("model", MODELS)
def test_the_checkpoint_is_the_formula_on_the_heads_and_the_base_elsewhere_bit_for_bit(tmp_path, run_steer, model):
    at = list(MODELS).index(model)
    for i, layout in enumerate(LAYOUTS if model == "llama" else [LAYOUTS[at % len(LAYOUTS)]]):
        base_dtype, base_shards, tuned_dtype, tuned_shards, factor = layout
        folder, tied = tmp_path / str(i), {"tie_word_embeddings": bool((i + at) % 2)}
        base = write_model(folder / "base", model, dtype=base_dtype, shard_size=base_shards, **tied)
        tuned = write_model(folder / "tuned", model, tuned=True, dtype=tuned_dtype, shard_size=tuned_shards, **tied)
        for made, size in ((base, base_shards), (tuned, tuned_shards)):
            assert (len(Checkpoint.open(str(made)).weight_files) > 1) == (size != SINGLE)
        listed = some_heads(base)
        given = {"base_model": base, "finetune_model": tuned, "scaling_factor": factor, "output": folder / "m"}
        output = run_steer(head_folder=write_head_list(folder / "heads", listed), **given)

        got, before = stored(output), stored(base)
        want = steered_the_slow_way(base, tuned, listed, factor, model)
        projections = {MODELS[model][2].format(layer) for layer, _ in listed}
        assert got.keys() == before.keys()
        assert {path.name for path in output.iterdir()} == {path.name for path in base.iterdir()} | {
            "soteria.json",
            "README.md",
        }
        for name in projections:
            assert same_bits(got[name], want[name].to(DTYPES[base_dtype])), name
            assert not torch.equal(got[name], before[name]), name
        assert all(same_bits(got[name], before[name]) for name in got.keys() - projections)
        changed = json.loads((output / "soteria.json").read_text())["parameters_changed"]
        if base_dtype == "float32":  # in half precision a value may be rounded back to what it was
            assert changed == sum((got[name] != before[name]).sum().item() for name in got)


def test_scaling_zero_gives_the_bases_weights(base, run_steer):
    assert same_weights(stored(run_steer(scaling_factor=0)), stored(base))


@pytest.mark.parametrize(("stored_as", "dtype"), [("bfloat16", "float32"), ("float32", "float16")])
def test_steered_values_are_rounded_once_to_another_dtype(tmp_path, tuned, run_steer, stored_as, dtype):
    base = write_model(tmp_path / "base", dtype=stored_as, shard_size=SHARDS)
    output = run_steer("--dtype", dtype, base_model=base, scaling_factor=0.7)
    want = steered_the_slow_way(base, tuned, HEADS, 0.7)
    assert all(same_bits(tensor, want[name].to(DTYPES[dtype])) for name, tensor in stored(output).items())


def test_a_base_in_float64_is_steered(tmp_path, base, run_steer):
    want = stored(run_steer())
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64).save_pretrained(tmp_path / "double")
    got = stored(run_steer(base_model=tmp_path / "double", output=tmp_path / "other"))
    assert same_weights({name: tensor.float() for name, tensor in got.items()}, want)


def test_values_too_large_for_the_dtype_are_refused(tmp_path, refused):
    base = write_model(tmp_path / "base", change=lambda weights: weights["model.norm.weight"][3].fill_(1e6))
    assert "model.norm.weight is too large for float16" in refused("--dtype", "float16", base_model=base)
    base = write_model(tmp_path / "half", dtype="float16")
    assert "o_proj.weight is not finite" in refused(base_model=base, scaling_factor=1e9)


def test_checkpoints_with_and_without_the_inner_models_prefix_go_together(tmp_path, run_steer):
    """The hub's GPT-2 stores `h.0...`, a fine-tune of it `transformer.h.0...`."""
    base = write_model(tmp_path / "base", "gpt2")
    tuned = write_model(tmp_path / "tuned", "gpt2", tuned=True)
    want = steered_the_slow_way(base, tuned, [(1, 2), (0, 3)], 2.0, "gpt2")
    lists = write_head_list(tmp_path / "heads", [(1, 2), (0, 3)])
    bare = {key.removeprefix("transformer."): tensor for key, tensor in stored(base).items()}
    safetensors.torch.save_file(bare, base / "model.safetensors", metadata={"format": "pt"})
    output = run_steer(base_model=base, finetune_model=tuned, head_folder=lists)
    assert all(same_bits(tensor, want[f"transformer.{name}"]) for name, tensor in stored(output).items())


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "base_model.model.", "language_model."])
def test_a_prefix_that_a_trainer_left_is_read_in_a_tuned_model_and_refused_in_a_base(
    tmp_path, tuned, run_steer, refused, prefix
):
    prefixed = shutil.copytree(tuned, tmp_path / "prefixed")
    named = {prefix + key: tensor for key, tensor in stored(tuned).items()}
    safetensors.torch.save_file(named, prefixed / "model.safetensors", metadata={"format": "pt"})
    assert f"names a tensor {prefix}{O_PROJ.format(0)}" in refused(base_model=prefixed, finetune_model=tuned)
    want = stored(run_steer())
    assert same_weights(stored(run_steer(finetune_model=prefixed, output=tmp_path / "other")), want)


@pytest.mark.parametrize(("model", "target"), [("gpt2", "attn.c_proj"), ("qwen3", "o_proj")])
def test_a_lora_adapter_steers_as_its_model_merged_with_peft_does(tmp_path, run_steer, model, target):
    base = write_model(tmp_path / "base", model)
    adapter = write_adapter(tmp_path / "adapter", base, target_modules=[target], fan_in_fan_out=model == "gpt2")
    merged = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    peft.PeftModel.from_pretrained(merged, adapter).merge_and_unload().save_pretrained(tmp_path / "merged")
    listed = some_heads(base)
    lists = write_head_list(tmp_path / "heads", listed)
    output = run_steer(base_model=base, finetune_model=adapter, head_folder=lists)
    want = steered_the_slow_way(base, tmp_path / "merged", listed, 2.0, model)
    for name, tensor in loaded(output).items():
        torch.testing.assert_close(tensor, want[name], rtol=1e-5, atol=2e-6)
    name = MODELS[model][2].format(listed[0][0])
    assert (stored(output)[name] - stored(base)[name]).abs().max() > 1e-3


# As a LoRA

# Architectures with what LoRA options must cope with: (model, its LoRA's options)
LORAS = {
    "llama": {"target_modules": ["q_proj", "o_proj"]},  # grouped-query
    "phi3-96": {"target_modules": ["qkv_proj", "o_proj"]},  # fused q, k and v
    "gpt2": {"target_modules": ["attn.c_proj"], "fan_in_fan_out": True},  # transposed
    "qwen3": {"target_modules": ["o_proj"], "use_rslora": True},  # heads wider than width / heads
    "gpt-neox": {"target_modules": ["dense"], "rank_pattern": {"layers.1.attention.dense": 7}},
    "mistral": {"target_modules": ["o_proj"], "alpha_pattern": {"layers.0.self_attn.o_proj": 20}},
}


@pytest.fixture
def write_lora(tmp_path, run_steer) -> Callable[..., tuple[dict, dict]]:
    """A steering as a LoRA: the weights of its base with it merged by PEFT, and the facts beside it."""

    def write(base: Path, *options: object, **given: object) -> tuple[dict, dict]:
        folder = run_steer("--format=lora", *options, output=tmp_path / "lora", base_model=base, **given)
        plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        merged = peft.PeftModel.from_pretrained(plain, folder).merge_and_unload().state_dict()
        return merged, json.loads((folder / "soteria.json").read_text())

    return write


@pytest.mark.parametrize("model", LORAS)
def test_the_lora_of_a_steering_by_a_lora_merges_to_the_written_checkpoint(tmp_path, run_steer, write_lora, model):
    base = write_model(tmp_path / "base", model)
    adapter = write_adapter(tmp_path / "adapter", base, **LORAS[model])
    given = {"finetune_model": adapter, "head_folder": write_head_list(tmp_path / "heads", some_heads(base))}
    checkpoint = loaded(run_steer(base_model=base, **given))
    merged, facts = write_lora(base, **given)
    assert any((checkpoint[name] - weight).abs().max() > 1e-3 for name, weight in loaded(base).items())
    for name, weight in checkpoint.items():
        torch.testing.assert_close(merged[name], weight, rtol=1e-5, atol=1e-5)
    assert facts["relative_error"] < 1e-6 and facts["format"] == "lora"


def test_the_lora_of_a_whole_checkpoints_steering_says_how_far_off_it_is(base, tuned, run_steer, write_lora, output):
    checkpoint = loaded(run_steer())
    merged, facts = write_lora(base, "--rank=32")
    assert facts["relative_error"] < 1e-6
    for name, weight in checkpoint.items():
        torch.testing.assert_close(merged[name], weight, rtol=1e-5, atol=1e-5)
    changed = [name for name, weight in loaded(base).items() if not torch.equal(weight, checkpoint[name])]
    merged, facts = write_lora(base, "--rank=4", "--max_error=0.9", "--overwrite")
    off = sum((merged[name] - checkpoint[name]).square().sum() for name in changed) ** 0.5
    whole = sum((checkpoint[name] - loaded(base)[name]).square().sum() for name in changed) ** 0.5
    assert facts["rank"] == 4 and facts["relative_error"] == pytest.approx(float(off / whole), rel=1e-3)
    sentence = run_steer("--format=lora", "--rank=4", status=2, output=output.with_name("other"))
    assert "a LoRA of rank 4 is" in sentence and "larger --rank" in sentence
    assert "steers nothing" in run_steer("--format=lora", scaling_factor=0, status=2, output=output.with_name("other"))


def test_a_tuned_model_with_a_larger_vocabulary_steers_as_one_without(tmp_path, base, tuned, run_steer):
    want = stored(run_steer())
    larger = AutoModelForCausalLM.from_pretrained(tuned)
    larger.resize_token_embeddings(424)
    larger.save_pretrained(tmp_path / "larger")
    got = stored(run_steer(finetune_model=tmp_path / "larger", output=tmp_path / "other"))
    assert same_weights(got, want)


@pytest.mark.parametrize("kind", sorted(set(peft.PeftType) - {peft.PeftType.LORA}))
def test_an_adapter_of_another_type_is_refused_by_name(tmp_path, base, refused, kind):
    adapter = write_adapter(tmp_path / "adapter", base)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"peft_type": str(kind.value)}))
    assert f"is of type {kind.value!r}" in refused(finetune_model=adapter)


# What to try an option of PEFT's LoRA with, where True does not fit it.
TRIED = {
    "layer_replication": [(0, 2), (1, 3)],
    "alora_invocation_tokens": [1, 2],
    "bias": "all",
    "modules_to_save": ["lm_head"],
    "layers_to_transform": [0, 1],
    "exclude_modules": ["q_proj"],
    "trainable_token_indices": [3],
    "lora_dropout": 0.1,
    "rank_pattern": {"layers.0.self_attn.o_proj": 2},
    "alpha_pattern": {"layers.0.self_attn.o_proj": 9},
    "init_lora_weights": "pissa",
    "target_modules": ["o_proj"],
    "r": 3,
    "lora_alpha": 5,
}


@pytest.mark.parametrize("option", sorted(field.name for field in dataclasses.fields(peft.LoraConfig)))
def test_every_option_of_lora_steers_as_pefts_merge_or_is_refused(tmp_path, base, run_steer, option):
    """A loop over PEFT's own options, so that a new version shows its new ones."""
    try:
        adapter = write_adapter(tmp_path / "adapter", base, **{option: TRIED.get(option, True)})
        plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        merged = peft.PeftModel.from_pretrained(plain, adapter).merge_and_unload()
    except Exception:  # PEFT itself does not take the value, or cannot merge the result
        return
    given = {"finetune_model": adapter, "output": tmp_path / "steered"}
    kept = json.loads((adapter / "adapter_config.json").read_text()).get(option)
    status = 2 if (kept and option not in lora.UNDERSTOOD) or option == "init_lora_weights" else 0
    found = run_steer(status=status, **given)
    if status:
        assert "is not a plain LoRA" in found and option in found
        return
    merged.save_pretrained(tmp_path / "merged")
    want = steered_the_slow_way(base, tmp_path / "merged", HEADS, 2.0)
    changed = [O_PROJ.format(layer) for layer, _ in HEADS]
    for name in changed:
        torch.testing.assert_close(loaded(found)[name], want[name], rtol=1e-5, atol=2e-6)


def test_an_adapter_that_holds_an_output_projection_whole_is_refused(tmp_path, base, refused):
    first, second = (f"layers.{layer}.self_attn.o_proj" for layer in (0, 1))
    adapter = write_adapter(tmp_path / "adapter", base, target_modules=[first], modules_to_save=[second])
    assert f"more than LoRA factors for model.{second}" in refused(finetune_model=adapter)


@pytest.mark.parametrize("rename", [(".lora_A.", ".lora_A.default."), ("model.model.", "model.model.language_model.")])
def test_an_adapters_keys_may_name_it_or_a_text_part(tmp_path, base, run_steer, rename):
    adapter = write_adapter(tmp_path / "adapter", base)
    want = stored(run_steer(finetune_model=adapter))
    file = adapter / "adapter_model.safetensors"
    renamed = {key.replace(*rename).replace(".lora_B.weight", ".lora_B.default.weight" if "default" in rename[1] else
               ".lora_B.weight"): tensor for key, tensor in safetensors.torch.load_file(file).items()}  # fmt: skip
    safetensors.torch.save_file(renamed, file)
    got = run_steer(finetune_model=adapter, output=tmp_path / "other")
    assert same_weights(stored(got), want)


# The folder


def test_the_result_loads_with_transformers_and_answers_as_the_formula_says(base, tuned, run_steer):
    output = run_steer()
    oracle = AutoModelForCausalLM.from_pretrained(base)
    oracle.load_state_dict(steered_the_slow_way(base, tuned, HEADS, 2.0))
    ids = AutoTokenizer.from_pretrained(output)("Q: France\nA:", return_tensors="pt")
    with torch.inference_mode():
        got = AutoModelForCausalLM.from_pretrained(output)(**ids).logits
        assert torch.equal(got, oracle(**ids).logits)
    others = [path for path in base.iterdir() if path.suffix != ".safetensors"]
    assert {"config.json", "generation_config.json", "tokenizer.json"} <= {path.name for path in others}
    assert all((output / path.name).read_bytes() == path.read_bytes() for path in others)


def test_soteria_json_says_how_the_model_was_made(base, tuned, output):
    facts = checkpoint.steer_checkpoint(opened(base, tuned, factor=2.5), output, language="English")
    assert facts == json.loads((output / "soteria.json").read_text())
    got, before = stored(output), stored(base)
    changed = len(HEADS) * 8 * 32  # head dimension x hidden size
    want = {
        "base_model": base.name,
        "base_revision": None,
        "finetune_model": tuned.name,
        "language": "English",
        "scaling_factor": 2.5,
        "dtype": "base",
        "heads": [list(head) for head in HEADS],
        "n_heads": 3,
        "head_list": "by hand",
        "parameters_changed": changed,
        "share_of_parameters_changed": changed / sum(tensor.numel() for tensor in before.values()),
    }
    assert facts.items() >= want.items()
    assert str(base.parent) not in (output / "soteria.json").read_text()
    names = [O_PROJ.format(layer) for layer in range(3)]
    moved = [((got[name] - before[name]).norm() / before[name].norm()).item() for name in names]
    assert facts["relative_change_per_layer"] == pytest.approx(moved, rel=1e-5)
    assert moved[1] == 0 < min(moved[0], moved[2])  # no head of layer 1 is listed


def test_the_model_card_names_the_base_the_language_and_the_share(tmp_path, base, run_steer, monkeypatch):
    output = run_steer()
    facts = json.loads((output / "soteria.json").read_text())
    share = facts["share_of_parameters_changed"]
    assert facts["head_list"].count("/") == 1 and facts["head_list"].endswith("/English_Heads.json")
    card = (output / "README.md").read_text()
    matter = ModelCard(card).data.to_dict()
    assert matter["base_model"] == base.name  # a path means nothing on the hub, and reveals too much of the machine
    assert (matter["language"], {"soteria", "safety"} <= {*matter["tags"]}) == (["en"], True)
    assert str(base.parent) not in card and "steered for English" in card
    assert "3 attention heads" in card and f"{share:.2%} of the" in card

    snapshot = shutil.copytree(base, tmp_path / ("a" * 40))
    monkeypatch.setattr("soteria.models.checkpoints.snapshot_download", lambda *_, **__: snapshot)
    monkeypatch.setattr("soteria.models.sources.hub_answers", lambda: True)
    output = run_steer(base_model="lab/base", output=tmp_path / "hub" / "m")
    facts = json.loads((output / "soteria.json").read_text())
    assert (facts["base_model"], facts["base_revision"]) == ("lab/base", "a" * 40)
    assert ModelCard((output / "README.md").read_text()).data.base_model == "lab/base"


# Running it again


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    return {path.name: (path.stat().st_mtime_ns, path.stat().st_ino) for path in folder.iterdir()}


def test_the_same_call_again_reuses_the_folder_and_another_folder_gets_the_same_bytes(tmp_path, run_steer):
    first = run_steer()
    before = snapshot(first)
    assert snapshot(run_steer()) == before
    second = run_steer(output=tmp_path / "b" / "m")
    assert {path.name for path in second.iterdir()} == before.keys()
    assert all(path.read_bytes() == (second / path.name).read_bytes() for path in first.iterdir())


def test_a_folder_made_from_other_inputs_is_refused_and_stays(tmp_path, base, tuned, run_steer):
    output = run_steer()
    before = snapshot(output)

    def change(weights):
        weights[O_PROJ.format(0)][0, 0] += 0.5

    other = write_model(tmp_path / "other", tuned=True, change=change)
    lists = write_head_list(tmp_path / "lists", [(1, 1)])
    for changed in ({"head_folder": lists}, {"finetune_model": other}, {"scaling_factor": 2.5}, {"dtype": "bfloat16"}):
        sentence = run_steer(status=2, **changed)
        assert str(output) in sentence and "--overwrite" in sentence
        assert snapshot(output) == before and list(output.parent.iterdir()) == [output]

    moving = shutil.copytree(tuned, tmp_path / "moving")  # the same paths with other weights or settings behind them
    run_steer(finetune_model=moving, output=tmp_path / "moved")
    shutil.copytree(other, moving, dirs_exist_ok=True)
    assert "not made from these inputs" in run_steer(finetune_model=moving, output=tmp_path / "moved", status=2)
    adapter = write_adapter(tmp_path / "adapter", base)
    run_steer(finetune_model=adapter, output=tmp_path / "adapted")
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(settings | {"lora_alpha": 7}))
    assert "not made from these inputs" in run_steer(finetune_model=adapter, output=tmp_path / "adapted", status=2)


def test_overwrite_replaces_a_steered_model(base, tuned, run_steer):
    run_steer()
    output = run_steer("--overwrite", scaling_factor=1.5)
    want = steered_the_slow_way(base, tuned, HEADS, 1.5)
    assert all(same_bits(tensor, want[name]) for name, tensor in stored(output).items())
    assert list(output.parent.iterdir()) == [output]


@pytest.mark.parametrize("which", ["base_model", "finetune_model"])
def test_overwrite_never_replaces_a_model_that_is_read_or_another_folder(tmp_path, base, tuned, refused, which):
    copy = shutil.copytree({"base_model": base, "finetune_model": tuned}[which], tmp_path / "store" / "model")
    for marked in (copy, copy.parent):  # as made by steering, so that only being an input protects it
        (marked / "soteria.json").write_text('{"finetune_model": "m"}')
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("years of work")
    before = snapshot(copy)
    for output in (copy, copy.parent):
        assert "holds one of the models" in refused("--overwrite", **{which: copy, "output": output})
    assert f"{tmp_path / 'notes'} exists" in refused("--overwrite", output=tmp_path / "notes")
    assert snapshot(copy) == before and (tmp_path / "notes" / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("error", [RuntimeError("disk"), KeyboardInterrupt()], ids=["error", "Ctrl-C"])
def test_an_end_half_way_leaves_no_temporary_folder_and_the_old_model(base, tuned, output, monkeypatch, error):
    written = []

    def fail_on_the_second(place, tensor):
        written.append(tensor)
        if len(written) == 2:
            raise error

    old = checkpoint.steer_checkpoint(opened(base, tuned, factor=1.0), output, language="English")
    before = snapshot(output)
    monkeypatch.setattr(checkpoint, "replace_tensor", fail_on_the_second)
    with pytest.raises(type(error)):
        checkpoint.steer_checkpoint(opened(base, tuned), output, language="English", overwrite=True)
    assert len(written) == 2 and list(output.parent.iterdir()) == [output]
    assert snapshot(output) == before and json.loads((output / "soteria.json").read_text()) == old


# Refusals


def test_models_that_do_not_go_together_are_refused_naming_what_differs(tmp_path, base, tuned, refused):
    for key, value, was in (
        ("num_hidden_layers", 4, 3),
        ("hidden_size", 64, 32),
        ("num_attention_heads", 8, 4),
    ):
        other = write_model(tmp_path / key, **{key: value, "head_dim": 8})
        sentence = refused(finetune_model=other)
        assert f"{key} is {was} in " in sentence and f", {value} in '{other}'" in sentence
    wide = write_model(tmp_path / "wide", head_dim=12)
    for other, shape in ((wide, "(32, 48)"), (write_adapter(tmp_path / "adapter", wide), "(32, 48)")):
        sentence = refused(finetune_model=other)
        assert f"{O_PROJ.format(0)} is (32, 32) in" in sentence and f"{shape} in" in sentence
    adapter = write_adapter(tmp_path / "elsewhere", base, target_modules=["q_proj", "v_proj"])
    assert O_PROJ.format(0).removesuffix(".weight") in refused(finetune_model=adapter)
    assert str(adapter) in refused(base_model=adapter)
    headless = shutil.copytree(tuned, tmp_path / "headless")
    weights = {key: tensor for key, tensor in stored(tuned).items() if key != O_PROJ.format(1)}
    safetensors.torch.save_file(weights, headless / "model.safetensors")
    assert O_PROJ.format(1) in refused(finetune_model=headless)


def test_a_tuned_model_that_equals_the_base_on_the_heads_is_refused(tmp_path, base, refused):
    def change(weights):
        weights[O_PROJ.format(0)][:, 8:16] += 1  # head 1, which is not listed
        weights["model.norm.weight"] += 1

    elsewhere = write_model(tmp_path / "tuned", change=change)
    for twin, options in ((base, []), (base, ["--dtype", "bfloat16"]), (elsewhere, [])):
        sentence = refused(*options, finetune_model=twin)
        assert "English_Heads.json" in sentence and "was one path given twice?" in sentence


# A listed head, (2, 1), and one beside it that is not listed, (2, 3).
@pytest.mark.parametrize(("bad", "column"), [(float("nan"), 9), (float("inf"), 25)])
def test_weights_that_are_not_finite_are_refused_naming_the_tensor(tmp_path, base, refused, bad, column):
    def spoil(weights):
        weights[O_PROJ.format(2)][5, column] = bad

    broken = write_model(tmp_path / "broken", tuned=True, change=spoil)
    adapter = write_adapter(tmp_path / "adapter", base)
    for models in (
        {"finetune_model": broken},
        {"base_model": broken},
        {"base_model": broken, "finetune_model": adapter},  # whose own numbers are finite
    ):
        assert f"{O_PROJ.format(2)} is not finite" in refused(**models)


def test_an_input_that_is_missing_or_unknown_is_refused_by_name(tmp_path, refused):
    assert "Klingon" in refused(language="Klingon")
    assert "Hindi_Heads.json" in refused(language="hi")
    assert "'nowhere'" in refused(head_folder="nowhere")
    for which in ("base_model", "finetune_model"):
        assert str(tmp_path / "nowhere") in refused(**{which: tmp_path / "nowhere"})
    lists = write_head_list(tmp_path / "heads", [(0, 0), (3, 0)])
    assert f"{lists / 'English_Heads.json'} names head [3, 0]" in refused(head_folder=lists)
    config = tiny_config("mamba", hidden_size=32, num_hidden_layers=2, state_size=4)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "mamba")
    assert "MambaForCausalLM cannot be handled" in refused(
        base_model=tmp_path / "mamba", finetune_model=tmp_path / "mamba"
    )


@pytest.mark.parametrize("text", ["-1", "-0.5", "nan", "inf", "much"])
def test_a_scaling_factor_below_zero_or_not_a_number_is_refused(run_steer, output, text):
    assert text in run_steer(scaling_factor=text, status=2).splitlines()[-1]
    assert not output.parent.exists()


def test_a_steering_that_would_do_nothing_or_harm_cannot_be_opened(base, tuned):
    faults = {
        "by hand names no heads": ([], 1.0),
        r"by hand names head \[99, 0\], but .* has 3 layers of 4 heads": ([[99, 0], [0, 99]], 1.0),
        r"head \[0, 4\]": ([(0, 4)], 1.0),
        r"head \[3, 0\]": ([(0, 0), (3, 0)], 1.0),
        r"head \[-1, 0\]": ([(-1, 0)], 1.0),
        r"head \[0, -1\]": ([(0, -1)], 1.0),
        r"by hand names head \[0, 3\] twice": ([*HEADS, [0, 3]], 1.0),
        "not -0.5": (HEADS, -0.5),
        "not nan": (HEADS, float("nan")),
        "not inf": (HEADS, float("inf")),
    }
    for said, (listed, factor) in faults.items():
        with pytest.raises(UserError, match=said):
            opened(base, tuned, listed, factor)
    with pytest.raises(UserError, match=r"selected heads \(by hand\): was one path given twice\?"):
        opened(base, base)


def test_heads_that_an_adapter_leaves_alone_cannot_be_steered(tmp_path, base):
    adapter = write_adapter(tmp_path / "adapter", base, layers_to_transform=[1])
    with pytest.raises(UserError, match=r"selected heads \(by hand\): does the adapter change other layers"):
        opened(base, adapter)
    assert opened(base, adapter, [*HEADS, [1, 0]]).heads == [*HEADS, (1, 0)]


# Steering a loaded model


@pytest.mark.parametrize(("model", "dtype"), [("gpt2", "float32"), ("qwen3", "bfloat16")])
def test_steering_in_place_gives_the_written_checkpoints_weights_and_then_the_bases(tmp_path, model, dtype):
    base = write_model(tmp_path / "base", model, dtype=dtype)
    before = stored(base)
    steering = opened(base, write_model(tmp_path / "tuned", model, tuned=True), some_heads(base))
    checkpoint.steer_checkpoint(steering, tmp_path / "m", language="English")
    assert "layers" not in vars(steering.vector)  # one projection in memory at a time
    want = stored(tmp_path / "m")
    in_memory = load_model(str(base), "cpu", dtype)
    for _ in range(2):
        with steered_in_place(in_memory, steering):
            assert same_weights(want, {name: in_memory.model.state_dict()[name] for name in want})
        assert same_weights(before, {name: in_memory.model.state_dict()[name] for name in before})
    assert same_weights(stored(base), before)


@pytest.mark.parametrize("error", [RuntimeError("in the block"), KeyboardInterrupt()], ids=["error", "Ctrl-C"])
@pytest.mark.parametrize("calls", [2, 9], ids=["while steering", "in the block"])
def test_the_base_is_back_however_a_block_ends(base, tuned, in_memory, monkeypatch, error, calls):
    before = {name: tensor.clone() for name, tensor in in_memory.model.state_dict().items()}
    left, formula_itself = iter(range(calls)), formula.steer

    def interrupted(*given):
        if next(left, None) is None:
            raise error
        return formula_itself(*given)

    monkeypatch.setattr(formula, "steer", interrupted)
    with pytest.raises(type(error)), steered_in_place(in_memory, opened(base, tuned)):
        assert not torch.equal(in_memory.projections[0].weight, before[O_PROJ.format(0)])
        raise error
    assert len(list(left)) == max(0, calls - len(HEADS))
    assert same_weights(in_memory.model.state_dict(), before) and not is_steered(in_memory)


def test_weights_that_steering_in_memory_would_make_infinite_are_refused_and_put_back(base, tuned, in_memory):
    before = {name: tensor.clone() for name, tensor in in_memory.model.state_dict().items()}
    for steered in (
        steered_in_place(in_memory, opened(base, tuned, factor=1e300)),
        all_parameters_steered(in_memory, opened(base, tuned).vector, 1e300),
    ):
        with pytest.raises(UserError, match="not finite once steered"), steered:
            pass
        assert same_weights(in_memory.model.state_dict(), before) and not is_steered(in_memory)


def test_a_model_that_is_not_all_in_memory_is_not_steered_in_place(base, tuned, in_memory):
    in_memory.projections[1].to("meta")
    with pytest.raises(UserError, match="not all in memory"), steered_in_place(in_memory, opened(base, tuned)):
        pass


def test_a_model_is_steered_one_way_at_a_time_and_only_by_its_own_task_vector(tmp_path, base, tuned, in_memory):
    steering = opened(base, tuned, factor=0.0)
    with steered_in_place(in_memory, steering):
        with pytest.raises(UserError, match="is steered already"), steered_in_place(in_memory, steering):
            pass
        assert is_steered(in_memory)
    assert not is_steered(in_memory)
    for i, other in enumerate(({"hidden_size": 64}, {"num_hidden_layers": 2}, {"num_attention_heads": 2})):
        wrong = load_model(
            str(write_model(tmp_path / str(i), num_key_value_heads=2, head_dim=8 + 8 * (i == 2), **other))
        )
        with pytest.raises(UserError, match="not shaped like"), steered_in_place(wrong, steering):
            pass


def test_a_task_vector_is_read_once_for_all_steerings_in_memory(base, tuned, in_memory, monkeypatch):
    steering = opened(base, tuned)
    with steered_in_place(in_memory, steering):
        pass
    kept = [layer.clone() for layer in steering.vector.layers.values()]
    monkeypatch.setattr(TaskVector, "at", lambda *_: pytest.fail("read again"))
    with steered_in_place(in_memory, open_steering(steering.vector, [(1, 1)], 3.0, source="another list")):
        pass
    assert all(torch.equal(*pair) for pair in zip(kept, steering.vector.layers.values(), strict=True))


def test_importing_soteria_does_not_load_torch():
    command = "import sys, soteria; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", command], cwd=paths.ROOT / "src").returncode == 0
