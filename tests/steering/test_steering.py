"""Step 3.1: the written checkpoint against the formula computed the obvious way, and everything that is refused."""

import json
import shutil
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
from soteria import cli
from soteria.errors import UserError
from soteria.models.checkpoints import Checkpoint
from soteria.models.loading import DTYPES, load_model
from soteria.models.task_vector import TaskVector
from soteria.scoring import heads
from soteria.steering import checkpoint as steering
from soteria.steering.formula import is_steered, open_steering, steered_in_place

# name: (architecture, config, output projection of a layer, head dimension, heads along rows)
MODELS = {
    "llama": ("llama", {}, "model.layers.{}.self_attn.o_proj.weight", 8, False),
    "phi3-24": ("phi3", {"hidden_size": 96}, "model.layers.{}.self_attn.o_proj.weight", 24, False),
    "phi3-96": ("phi3", {"hidden_size": 384}, "model.layers.{}.self_attn.o_proj.weight", 96, False),
    "qwen3": ("qwen3", {}, "model.layers.{}.self_attn.o_proj.weight", 12, False),
    "gemma2": ("gemma2", {}, "model.layers.{}.self_attn.o_proj.weight", 12, False),
    "gpt2": ("gpt2", {}, "transformer.h.{}.attn.c_proj.weight", 8, True),
    "gpt-neox": ("gpt-neox", {}, "gpt_neox.layers.{}.attention.dense.weight", 8, False),
}
SINGLE, SHARDS = "1GB", "30KB"
# (base's dtype and shard size, tuned's, scaling factor)
LAYOUTS = {
    "float32": ("float32", SINGLE, "float32", SINGLE, 1.0),
    "float32-sharded-beside-float16": ("float32", SHARDS, "float16", SINGLE, 4.0),
    "bfloat16": ("bfloat16", SINGLE, "bfloat16", SINGLE, 5.0),
    "float16-sharded": ("float16", SHARDS, "float16", "50KB", 0.5),
    "bfloat16-sharded-beside-float32": ("bfloat16", SHARDS, "float32", SINGLE, 3.0),
    "float16-beside-bfloat16-sharded": ("float16", SINGLE, "bfloat16", SHARDS, 0.37),
    "both-sharded-unlike": ("bfloat16", SHARDS, "bfloat16", "50KB", 2.5),
}
HEADS = [(2, 1), (0, 3), (0, 0)]
LORA = {"r": 4, "lora_alpha": 6, "init_lora_weights": False, "target_modules": ["q_proj", "o_proj"]}


def write_model(
    folder: Path,
    model: str = "llama",
    *,
    tuned: bool = False,
    dtype: str = "float32",
    shard_size: str = SINGLE,
    change: Callable[[dict], None] = lambda weights: None,
    **overrides,
) -> Path:
    """A random checkpoint; `tuned` is near it in every tensor. `change` edits the weights by name before they go."""
    architecture, settings, *_ = MODELS[model]
    written = tiny_model(architecture, **{**settings, **overrides})
    if tuned:
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for parameter in written.parameters():
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    with torch.no_grad():
        change(written.state_dict())
    written.to(DTYPES[dtype]).save_pretrained(folder, max_shard_size=shard_size)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def write_head_list(folder: Path, listed: list) -> Path:
    heads.write_heads(folder / "English_Heads.json", listed)
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
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and bytes(a.view(torch.uint8).numpy()) == bytes(b.view(torch.uint8).numpy())
    )


def some_heads(folder: Path, seed: int = 0) -> list:
    """About half of a model's heads, in a random order."""
    config = json.loads((folder / "config.json").read_text())
    n_layers = config.get("num_hidden_layers") or config["n_layer"]
    n_heads = config.get("num_attention_heads") or config["n_head"]
    order = torch.randperm(n_layers * n_heads, generator=torch.Generator().manual_seed(seed)).tolist()
    return [divmod(index, n_heads) for index in order[: n_layers * n_heads // 2]]


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
def output(tmp_path) -> Path:
    """Where the steered model goes: in a folder of its own, in which anything left behind shows."""
    return tmp_path / "models" / "steered"


@pytest.fixture
def run_steer(base, tuned, head_folder, output, monkeypatch) -> Callable[..., Path]:
    """Run `steer.py` in this process with the test's models unless told otherwise; gives the output folder."""

    def run(*options: object, **paths: object) -> Path:
        given = {"base_model": base, "finetune_model": tuned, "head_folder": head_folder, "output": output}
        given = {**given, "language": "English", "scaling_factor": 2, **paths}
        words = [word for key, value in given.items() for word in (f"--{key}", str(value))]
        monkeypatch.setattr(sys, "argv", ["steer.py", *words, *map(str, options)])
        cli.run(steer.main)
        return Path(given["output"])

    return run


@pytest.fixture
def refused(run_steer, output, capsys) -> Callable[..., str]:
    """Run `steer.py` on what it must refuse; gives its one sentence on stderr. Nothing may be left behind."""

    def run(*options: object, **paths: object) -> str:
        capsys.readouterr()  # what saving the test's models said
        with pytest.raises(SystemExit) as ended:
            run_steer(*options, **paths)
        assert ended.value.code == 2
        sentence = capsys.readouterr().err
        assert sentence.startswith("error: ")
        assert sentence.count("\n") == 1
        assert not output.parent.exists() or not list(output.parent.iterdir())
        return sentence

    return run


# The formula


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model", MODELS)
def test_the_checkpoint_is_the_formula_on_the_heads_and_the_base_elsewhere_bit_for_bit(
    tmp_path, run_steer, model, layout, tied
):
    base_dtype, base_shards, tuned_dtype, tuned_shards, factor = LAYOUTS[layout]
    embeddings = {"tie_word_embeddings": tied}
    base = write_model(tmp_path / "base", model, dtype=base_dtype, shard_size=base_shards, **embeddings)
    tuned = write_model(tmp_path / "tuned", model, tuned=True, dtype=tuned_dtype, shard_size=tuned_shards, **embeddings)
    listed = some_heads(base)
    lists = write_head_list(tmp_path / "heads", listed)
    output = run_steer(base_model=base, finetune_model=tuned, head_folder=lists, scaling_factor=factor)

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


@pytest.mark.parametrize("shard_size", [SHARDS, "50KB"])
def test_the_tests_sharded_models_have_several_shards(tmp_path, shard_size):
    assert len(Checkpoint.open(str(write_model(tmp_path, dtype="bfloat16", shard_size=shard_size))).weight_files) > 1


def test_scaling_zero_gives_the_bases_weights(base, run_steer):
    output = run_steer(scaling_factor=0)
    got, before = stored(output), stored(base)
    assert got.keys() == before.keys()
    assert all(same_bits(got[name], before[name]) for name in got)


@pytest.mark.parametrize("shard_size", [SINGLE, SHARDS])
@pytest.mark.parametrize(
    ("stored_as", "dtype"), [("bfloat16", "float32"), ("float32", "float16"), ("bfloat16", "float16")]
)
def test_another_dtype_is_rounded_to_once(tmp_path, tuned, run_steer, stored_as, dtype, shard_size):
    base = write_model(tmp_path / "base", dtype=stored_as, shard_size=shard_size)
    output = run_steer("--dtype", dtype, base_model=base, scaling_factor=0.7)
    want = steered_the_slow_way(base, tuned, HEADS, 0.7)
    for name, tensor in stored(output).items():
        assert same_bits(tensor, want[name].to(DTYPES[dtype])), name


def test_another_dtype_is_named_in_the_config_and_used_when_the_model_is_loaded(tmp_path, run_steer):
    base = write_model(tmp_path / "base", dtype="bfloat16")
    output = run_steer("--dtype", "float32", base_model=base)
    assert json.loads((output / "config.json").read_text())["dtype"] == "float32"
    assert AutoModelForCausalLM.from_pretrained(output).dtype == torch.float32


def test_the_index_of_shards_gives_the_size_in_the_dtype_written(tmp_path, run_steer):
    base = write_model(tmp_path / "base", dtype="bfloat16", shard_size=SHARDS)
    output = run_steer("--dtype", "float32", base_model=base)
    index = json.loads((output / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in stored(output).values())
    assert index["weight_map"].keys() == stored(output).keys()


def test_weights_too_large_for_the_dtype_asked_for_are_refused(tmp_path, refused):
    def grow(weights):
        weights["model.norm.weight"][3] = 1e6

    base = write_model(tmp_path / "base", change=grow)
    assert "model.norm.weight is too large for float16" in refused("--dtype", "float16", base_model=base)


def test_checkpoints_with_and_without_the_inner_models_prefix_go_together(tmp_path, run_steer):
    """The hub's GPT-2 stores `h.0...`, a fine-tune of it `transformer.h.0...`."""
    base = write_model(tmp_path / "base", "gpt2")
    tuned = write_model(tmp_path / "tuned", "gpt2", tuned=True)
    lists = write_head_list(tmp_path / "heads", [(0, 1), (1, 2)])
    want = steered_the_slow_way(base, tuned, [(0, 1), (1, 2)], 2.0, "gpt2")
    bare = {key.removeprefix("transformer."): tensor for key, tensor in stored(base).items()}
    safetensors.torch.save_file(bare, base / "model.safetensors", metadata={"format": "pt"})
    output = run_steer(base_model=base, finetune_model=tuned, head_folder=lists)
    assert all(same_bits(tensor, want[f"transformer.{name}"]) for name, tensor in stored(output).items())


# The folder


def test_the_result_loads_with_transformers_and_answers_as_the_formula_says(base, tuned, run_steer):
    output = run_steer()
    oracle = AutoModelForCausalLM.from_pretrained(base)
    oracle.load_state_dict(steered_the_slow_way(base, tuned, HEADS, 2.0))
    ids = AutoTokenizer.from_pretrained(output)("Q: France\nA:", return_tensors="pt")
    assert ids.input_ids.tolist() == [AutoTokenizer.from_pretrained(base)("Q: France\nA:").input_ids]
    with torch.inference_mode():
        got = AutoModelForCausalLM.from_pretrained(output)(**ids).logits
        assert torch.equal(got, oracle(**ids).logits)


def test_every_other_file_of_the_base_is_copied_as_it_is(base, run_steer):
    output = run_steer()
    others = [path for path in base.iterdir() if path.suffix != ".safetensors"]
    assert {"config.json", "generation_config.json", "tokenizer.json"} <= {path.name for path in others}
    assert all((output / path.name).read_bytes() == path.read_bytes() for path in others)


def test_weights_that_transformers_would_not_load_are_not_copied(tmp_path, base, run_steer):
    crowded = shutil.copytree(base, tmp_path / "base")
    safetensors.torch.save_file(stored(base), crowded / "consolidated.safetensors")
    (crowded / "pytorch_model.bin").write_bytes(b"unsteered")
    (crowded / "original").mkdir()
    (crowded / "original" / "consolidated.00.pth").write_bytes(b"unsteered")
    output = run_steer(base_model=crowded)
    names = {path.name for path in base.iterdir()} | {"soteria.json", "README.md"}
    assert {path.name for path in output.iterdir()} == names


def test_a_single_file_counts_before_shards_as_it_does_for_transformers(tmp_path, tuned, run_steer):
    base = write_model(tmp_path / "base", shard_size=SHARDS)
    write_model(tmp_path / "single", change=lambda weights: weights["model.norm.weight"].fill_(2.0))
    shutil.copy(tmp_path / "single" / "model.safetensors", base)
    output = run_steer(base_model=base)
    want = steered_the_slow_way(tmp_path / "single", tuned, HEADS, 2.0)
    assert want["model.norm.weight"].eq(2.0).all()
    assert all(same_bits(tensor, want[name]) for name, tensor in loaded(output).items())


def test_a_read_only_models_copy_can_be_written_to(tmp_path, base, run_steer):
    locked = shutil.copytree(base, tmp_path / "base")
    for path in [*locked.iterdir(), locked]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    output = run_steer(base_model=locked)
    locked.chmod(0o755)
    assert all(path.stat().st_mode & 0o200 for path in [output, *output.iterdir()])


def test_soteria_json_says_how_the_model_was_made(base, tuned, head_folder, run_steer):
    facts = json.loads((run_steer(scaling_factor=2.5) / "soteria.json").read_text())
    weights = stored(base)
    changed = len(HEADS) * 8 * 32  # head dimension x hidden size
    total = sum(tensor.numel() for tensor in weights.values())
    want = {
        "base_model": str(base),
        "finetune_model": str(tuned),
        "language": "English",
        "scaling_factor": 2.5,
        "dtype": "base",
        "heads": [list(head) for head in HEADS],
        "n_heads": 3,
        "head_list": str(head_folder / "English_Heads.json"),
        "parameters_changed": changed,
        "share_of_parameters_changed": changed / total,
    }
    assert facts.items() >= want.items()


def test_soteria_json_gives_each_layers_relative_change(base, run_steer):
    output = run_steer()
    got, before = stored(output), stored(base)
    names = [MODELS["llama"][2].format(layer) for layer in range(3)]
    want = [((got[name] - before[name]).norm() / before[name].norm()).item() for name in names]
    facts = json.loads((output / "soteria.json").read_text())
    assert facts["relative_change_per_layer"] == pytest.approx(want, rel=1e-5)
    assert want[1] == 0 < min(want[0], want[2])  # no head of layer 1 is listed


@pytest.mark.parametrize("model", ["gpt2", "qwen3"])
def test_the_number_of_changed_parameters_is_that_of_the_slices(tmp_path, run_steer, model):
    base = write_model(tmp_path / "base", model)
    tuned = write_model(tmp_path / "tuned", model, tuned=True)
    lists = write_head_list(tmp_path / "heads", [(0, 1), (1, 2), (1, 3)])
    output = run_steer(base_model=base, finetune_model=tuned, head_folder=lists)
    got, before = stored(output), stored(base)
    facts = json.loads((output / "soteria.json").read_text())
    assert facts["parameters_changed"] == sum((got[name] != before[name]).sum().item() for name in got)


def test_the_model_card_names_base_language_heads_and_share(base, run_steer):
    output = run_steer()
    card = (output / "README.md").read_text()
    share = json.loads((output / "soteria.json").read_text())["share_of_parameters_changed"]
    matter = ModelCard(card).data.to_dict()
    assert matter["base_model"] == base.name  # a path says nothing on the hub, and too much about the machine
    assert matter["language"] == ["en"]
    assert {"soteria", "safety"} <= {*matter["tags"]}
    assert str(base.parent) not in card
    assert "steered for English" in card
    assert "3 attention heads" in card
    assert f"{share:.2%} of the" in card


# Running it again


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    return {path.name: (path.stat().st_mtime_ns, path.stat().st_ino) for path in folder.iterdir()}


def test_the_same_call_again_reuses_the_folder(run_steer):
    before = snapshot(run_steer())
    assert snapshot(run_steer()) == before


def test_two_calls_write_the_same_bytes(tmp_path, run_steer):
    first, second = run_steer(output=tmp_path / "a" / "m"), run_steer(output=tmp_path / "b" / "m")
    assert {path.name for path in first.iterdir()} == {path.name for path in second.iterdir()}
    assert all(path.read_bytes() == (second / path.name).read_bytes() for path in first.iterdir())


def another_head_list(folder: Path) -> dict:
    return {"head_folder": write_head_list(folder / "other", [(1, 1)])}


def another_tuned_model(folder: Path) -> dict:
    def change(weights):
        weights["model.layers.0.self_attn.o_proj.weight"][0, 0] += 0.5

    return {"finetune_model": write_model(folder / "other", tuned=True, change=change)}


@pytest.mark.parametrize(
    "other",
    [another_head_list, another_tuned_model, lambda _: {"scaling_factor": 2.5}, lambda _: {"dtype": "bfloat16"}],
    ids=["heads", "tuned", "scaling", "dtype"],
)
def test_a_folder_made_from_other_inputs_is_refused_and_stays(tmp_path, run_steer, capsys, other):
    output = run_steer()
    before, changed = snapshot(output), other(tmp_path)
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        run_steer(**changed)
    assert ended.value.code == 2
    sentence = capsys.readouterr().err
    assert str(output) in sentence
    assert "--overwrite" in sentence
    assert snapshot(output) == before
    assert list(output.parent.iterdir()) == [output]


def test_the_same_paths_with_other_weights_behind_them_are_other_inputs(tmp_path, tuned, run_steer, capsys):
    moving = shutil.copytree(tuned, tmp_path / "moving")
    run_steer(finetune_model=moving)
    shutil.copytree(another_tuned_model(tmp_path)["finetune_model"], moving, dirs_exist_ok=True)
    with pytest.raises(SystemExit):
        run_steer(finetune_model=moving)
    assert "was not made from these inputs" in capsys.readouterr().err


def test_overwrite_replaces_a_steered_model(base, tuned, run_steer):
    run_steer()
    output = run_steer("--overwrite", scaling_factor=1.5)
    want = steered_the_slow_way(base, tuned, HEADS, 1.5)
    assert all(same_bits(tensor, want[name]) for name, tensor in stored(output).items())
    assert list(output.parent.iterdir()) == [output]


@pytest.mark.parametrize("which", ["base_model", "finetune_model"])
@pytest.mark.parametrize("above", [False, True], ids=["itself", "its parent"])
def test_overwrite_never_replaces_a_model_that_is_read(tmp_path, base, tuned, refused, which, above):
    copy = shutil.copytree({"base_model": base, "finetune_model": tuned}[which], tmp_path / "store" / "model")
    # Marked as made here, so that only its being an input protects it.
    (copy / "soteria.json").write_text("{}")
    (copy.parent / "soteria.json").write_text("{}")
    before = snapshot(copy)
    sentence = refused("--overwrite", **{which: copy, "output": copy.parent if above else copy})
    assert "holds one of the models" in sentence
    assert snapshot(copy) == before


def test_overwrite_never_replaces_a_folder_that_is_no_steered_model(tmp_path, refused):
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "thesis.txt").write_text("years of work")
    assert "is no steered model" in refused("--overwrite", output=notes)
    assert (notes / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("error", [RuntimeError("disk"), KeyboardInterrupt()], ids=["error", "Ctrl-C"])
def test_an_end_half_way_leaves_no_folder_and_no_temporary_one(run_steer, output, monkeypatch, error):
    written = []

    def fail_on_the_second(tensor):
        written.append(tensor)
        if len(written) == 2:
            raise error
        return b""

    monkeypatch.setattr(steering, "tensor_bytes", fail_on_the_second)
    with pytest.raises((RuntimeError, SystemExit)):
        run_steer()
    assert len(written) == 2
    assert list(output.parent.iterdir()) == []


def test_an_end_half_way_through_an_overwrite_leaves_the_old_model(run_steer, output, monkeypatch):
    before = snapshot(run_steer())
    monkeypatch.setattr(steering, "model_card", lambda facts: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_steer("--overwrite", scaling_factor=1)
    assert snapshot(output) == before
    assert list(output.parent.iterdir()) == [output]


# LoRA adapters


def write_adapter(folder: Path, base: Path, *, dtype=torch.float32, **settings) -> Path:
    """A random adapter of the base, none of its factors zero."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(3)
    adapted = peft.get_peft_model(model, peft.LoraConfig(**{**LORA, **settings}))
    adapted.to(dtype).save_pretrained(folder)
    return folder


def merged_with_peft(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return peft.PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict()


ADAPTERS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    # A key fits whole names and ends of them after a dot: not 11's where it says 1's. It may be a regular expression.
    "rank-pattern": {"rank_pattern": {"1.self_attn.o_proj": 2, r"layers\.[02]\.self_attn\.o_proj": 3}},
    "alpha-pattern": {"alpha_pattern": {"1.self_attn.o_proj": 32, r"layers\.[02]\.self_attn\.o_proj": 5}},
    "both-patterns-rslora": {
        "use_rslora": True,
        "rank_pattern": {"o_proj": 5},
        "alpha_pattern": {"q_proj": 100, "model.layers.3.self_attn.o_proj": 9, "o_proj": 7},
    },
    "gaussian-start": {"init_lora_weights": "gaussian"},
}


@pytest.mark.parametrize("settings", ADAPTERS.values(), ids=ADAPTERS)
def test_a_lora_adapters_task_vector_is_what_merging_with_peft_adds(tmp_path, settings):
    base = write_model(tmp_path / "base", num_hidden_layers=12)
    adapter = write_adapter(tmp_path / "adapter", base, **settings)
    if "gaussian" in settings.values():  # starts with B at zero
        factors = {key: torch.randn(t.shape) for key, t in stored(adapter).items()}
        safetensors.torch.save_file(factors, adapter / "adapter_model.safetensors")
    before, after = loaded(base), merged_with_peft(base, adapter)
    vector = TaskVector.open(str(base), str(adapter))
    for layer in range(12):
        name = MODELS["llama"][2].format(layer)
        torch.testing.assert_close(vector.at(layer), after[name] - before[name], rtol=1e-5, atol=2e-6)
        assert vector.at(layer).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("model", "target"), [("gpt2", "attn.c_proj"), ("gpt-neox", "attention.dense"), ("qwen3", "o_proj")]
)
def test_a_lora_adapter_steers_as_its_merged_model_does(tmp_path, run_steer, model, target):
    base = write_model(tmp_path / "base", model)
    adapter = write_adapter(tmp_path / "adapter", base, target_modules=[target], fan_in_fan_out=model == "gpt2")
    merged = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    merged.load_state_dict(merged_with_peft(base, adapter))
    merged.save_pretrained(tmp_path / "merged")
    listed = some_heads(base)
    lists = write_head_list(tmp_path / "heads", listed)
    output = run_steer(base_model=base, finetune_model=adapter, head_folder=lists)
    want = steered_the_slow_way(base, tmp_path / "merged", listed, 2.0, model)
    for name, tensor in loaded(output).items():
        torch.testing.assert_close(tensor, want[name], rtol=1e-5, atol=2e-6)
    name = MODELS[model][2].format(listed[0][0])
    assert (stored(output)[name] - stored(base)[name]).abs().max() > 1e-3


def test_a_half_precision_adapter_is_multiplied_out_in_float32(tmp_path, base):
    adapter = write_adapter(tmp_path / "adapter", base, dtype=torch.bfloat16)
    factors = {key: tensor.float() for key, tensor in stored(adapter).items()}
    at = "base_model.model.model.layers.0.self_attn.o_proj.lora_{}.weight"
    want = factors[at.format("B")] @ factors[at.format("A")] * 6 / 4
    torch.testing.assert_close(TaskVector.open(str(base), str(adapter)).at(0), want, rtol=1e-6, atol=1e-6)


def test_an_adapter_that_leaves_the_output_projection_alone_is_refused(tmp_path, base, refused):
    adapter = write_adapter(tmp_path / "adapter", base, target_modules=["q_proj", "v_proj"])
    assert "is no LoRA of model.layers.0.self_attn.o_proj" in refused(finetune_model=adapter)


def test_an_adapter_of_another_size_is_refused_naming_both_shapes(tmp_path, refused):
    wide = write_model(tmp_path / "wide", hidden_size=64)
    sentence = refused(finetune_model=write_adapter(tmp_path / "adapter", wide))
    assert "o_proj.weight is (32, 32) in one, (64, 64) in the other" in sentence


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"init_lora_weights": "pissa"}], ids=["dora", "pissa"])
def test_an_adapter_whose_change_is_more_than_its_factors_is_refused(tmp_path, base, refused, settings):
    adapter = write_adapter(tmp_path / "adapter", base, **settings)
    assert "is no plain LoRA; merge it" in refused(finetune_model=adapter)


@pytest.mark.parametrize("text", ["[]", "{", '{"peft_type": "LORA"}', '{"peft_type": "IA3", "lora_alpha": 1}'])
def test_an_adapter_with_unusable_settings_is_refused(tmp_path, base, refused, text):
    adapter = write_adapter(tmp_path / "adapter", base)
    (adapter / "adapter_config.json").write_text(text)
    assert str(adapter) in refused(finetune_model=adapter)


def test_an_adapter_with_another_alpha_is_another_input(tmp_path, base, run_steer, capsys):
    adapter = write_adapter(tmp_path / "adapter", base)
    run_steer(finetune_model=adapter)
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(settings | {"lora_alpha": 7}))
    with pytest.raises(SystemExit):
        run_steer(finetune_model=adapter)
    assert "was not made from these inputs" in capsys.readouterr().err


def test_an_adapter_as_the_base_is_refused(tmp_path, base, refused):
    adapter = write_adapter(tmp_path / "adapter", base)
    assert str(adapter) in refused(base_model=adapter)


# Refusals


def test_a_tuned_model_equal_to_the_base_is_refused(base, refused):
    assert "was one path given twice?" in refused(finetune_model=base)


def test_a_tuned_model_equal_to_the_base_is_refused_in_another_dtype_too(base, refused):
    assert "was one path given twice?" in refused("--dtype", "bfloat16", finetune_model=base)


def test_a_tuned_model_that_differs_from_the_base_only_elsewhere_is_refused(tmp_path, refused):
    def change(weights):
        weights["model.layers.0.self_attn.o_proj.weight"][:, 8:16] += 1  # head 1, which is not listed
        weights["model.norm.weight"] += 1

    assert "on all selected heads" in refused(finetune_model=write_model(tmp_path / "tuned", change=change))


@pytest.mark.parametrize(
    ("key", "value", "was"),
    [("num_hidden_layers", 4, 3), ("hidden_size", 64, 32), ("vocab_size", 424, 420), ("num_attention_heads", 8, 4)],
)
def test_a_tuned_model_of_another_size_is_refused_naming_the_setting(tmp_path, refused, key, value, was):
    tuned = write_model(tmp_path / "tuned", tuned=True, **{key: value, "head_dim": 8})
    sentence = refused(finetune_model=tuned)
    assert f"{key} is {was} in " in sentence
    assert f", {value} in '{tuned}'" in sentence


def test_output_projections_of_different_shapes_are_refused_naming_the_tensor(tmp_path, refused):
    tuned = write_model(tmp_path / "tuned", tuned=True, head_dim=12)
    assert "layers.0.self_attn.o_proj.weight is (32, 32) in one, (32, 48) in the other" in refused(finetune_model=tuned)


def test_a_tuned_model_without_an_output_projection_is_refused(tmp_path, tuned, refused):
    headless = shutil.copytree(tuned, tmp_path / "tuned")
    weights = stored(tuned)
    del weights["model.layers.1.self_attn.o_proj.weight"]
    safetensors.torch.save_file(weights, headless / "model.safetensors")
    assert "has 0 tensors for model.layers.1.self_attn.o_proj.weight" in refused(finetune_model=headless)


@pytest.mark.parametrize("which", ["base_model", "finetune_model"])
def test_a_quantised_model_is_refused(tmp_path, tuned, refused, which):
    quantised = shutil.copytree(tuned, tmp_path / "quantised")
    weights = stored(tuned)
    name = "model.layers.1.self_attn.o_proj.weight"
    weights[name] = weights[name].to(torch.float8_e4m3fn)
    safetensors.torch.save_file(weights, quantised / "model.safetensors")
    assert "quantised dtype" in refused(**{which: quantised})


@pytest.mark.parametrize(
    ("head", "named"), [((3, 0), "names head [3, 0]"), ((0, 4), "names head [0, 4]")], ids=["layer", "head"]
)
def test_a_head_outside_the_model_is_refused_naming_the_list_and_the_models_size(tmp_path, refused, head, named):
    lists = write_head_list(tmp_path / "heads", [(0, 0), head])
    sentence = refused(head_folder=lists)
    assert f"{lists / 'English_Heads.json'} {named}" in sentence
    assert "3 layers of 4 heads" in sentence


@pytest.mark.parametrize("which", ["base_model", "finetune_model"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("column", [9, 25], ids=["listed head", "unlisted head beside it"])  # (2, 1) and (2, 3)
def test_weights_that_are_no_numbers_are_refused_naming_the_tensor(tmp_path, refused, which, bad, column):
    def spoil(weights):
        weights["model.layers.2.self_attn.o_proj.weight"][5, column] = bad

    broken = write_model(tmp_path / "broken", tuned=True, change=spoil)
    models = {"base_model": broken, "finetune_model": write_model(tmp_path / "sound")}
    if which == "finetune_model":
        models = {"base_model": models["finetune_model"], "finetune_model": broken}
    assert "layers.2.self_attn.o_proj.weight is not finite" in refused(**models)


def test_a_result_too_large_for_its_dtype_is_refused(tmp_path, refused):
    base = write_model(tmp_path / "base", dtype="float16")
    assert "is not finite" in refused(base_model=base, scaling_factor=1e9)


@pytest.mark.parametrize("text", ["-1", "-0.5", "nan", "inf", "much"])
def test_a_scaling_factor_below_zero_or_no_number_is_refused(run_steer, output, capsys, text):
    with pytest.raises(SystemExit) as ended:
        run_steer(f"--scaling_factor={text}")
    assert ended.value.code == 2
    assert text in capsys.readouterr().err.splitlines()[-1]
    assert not output.parent.exists()


def test_an_unknown_language_is_refused(refused):
    assert "Klingon" in refused(language="Klingon")


def test_a_language_without_a_head_list_is_refused_naming_the_file(refused):
    assert "Hindi_Heads.json" in refused(language="hi")


def test_a_head_folder_that_is_nowhere_is_refused(refused):
    assert "no head folder 'nowhere'" in refused(head_folder="nowhere")


@pytest.mark.parametrize("which", ["base_model", "finetune_model"])
def test_a_model_folder_that_is_nowhere_is_refused(tmp_path, refused, which):
    assert str(tmp_path / "nowhere") in refused(**{which: tmp_path / "nowhere"})


@pytest.mark.parametrize("which", ["base_model", "finetune_model"])
@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_a_folder_that_is_no_whole_model_is_refused(tmp_path, tuned, refused, which, missing):
    part = shutil.copytree(tuned, tmp_path / "part")
    (part / missing).unlink()
    assert str(part) in refused(**{which: part})


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def spoil_header(path: Path) -> None:
    path.write_bytes(b"\xff" * 64)


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [truncate, spoil_header, empty])
@pytest.mark.parametrize("which", ["base_model", "finetune_model"])
@pytest.mark.parametrize("shard_size", [SINGLE, SHARDS], ids=["single", "shards"])
def test_a_broken_weight_file_is_refused_by_name(tmp_path, refused, which, damage, shard_size):
    model = write_model(tmp_path / "model", tuned=True, shard_size=shard_size)
    path = sorted(model.glob("*.safetensors"))[-1]
    damage(path)
    sentence = refused(**{which: model})
    assert path.name in sentence
    assert "no sound safetensors file" in sentence


def test_a_missing_shard_is_refused_by_name(tmp_path, refused):
    model = write_model(tmp_path / "model", tuned=True, shard_size=SHARDS)
    path = sorted(model.glob("*.safetensors"))[-1]
    path.unlink()
    assert f"has no {path.name}" in refused(finetune_model=model)


@pytest.mark.parametrize("which", ["base_model", "finetune_model"])
@pytest.mark.parametrize("absolute", [False, True], ids=["relative", "absolute"])
def test_an_index_that_leads_out_of_its_folder_is_refused(tmp_path, refused, which, absolute):
    model = write_model(tmp_path / "model", tuned=True, shard_size=SHARDS)
    outside = model.parent / "outside.safetensors"
    shutil.copy(next(model.glob("*.safetensors")), outside)
    index = json.loads((model / "model.safetensors.index.json").read_text())
    index["weight_map"]["lm_head.weight"] = str(outside) if absolute else "../outside.safetensors"
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "outside.safetensors', which is no file beside it" in refused(**{which: model})


@pytest.mark.parametrize("text", ["[]", "{}", "{", '{"weight_map": {"a": {}, "b": 1}}', '{"weight_map": []}'])
def test_an_unreadable_index_of_shards_is_refused(tmp_path, refused, text):
    model = write_model(tmp_path / "model", tuned=True, shard_size=SHARDS)
    (model / "model.safetensors.index.json").write_text(text)
    assert str(model) in refused(finetune_model=model)


def test_an_architecture_that_cannot_be_handled_is_refused(tmp_path, refused):
    folder = tmp_path / "mamba"
    config = tiny_config("mamba", hidden_size=32, num_hidden_layers=2, state_size=4)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    assert "MambaForCausalLM cannot be handled" in refused(base_model=folder, finetune_model=folder)


# Steering a loaded model


@pytest.mark.parametrize(("model", "dtype"), [("llama", "float32"), ("gpt2", "float32"), ("qwen3", "bfloat16")])
def test_steering_in_place_gives_the_written_checkpoints_weights(tmp_path, run_steer, model, dtype):
    base = write_model(tmp_path / "base", model, dtype=dtype)
    tuned = write_model(tmp_path / "tuned", model, tuned=True)
    listed = some_heads(base)
    lists = write_head_list(tmp_path / "heads", listed)
    want = stored(run_steer(base_model=base, finetune_model=tuned, head_folder=lists))
    vector = TaskVector.open(str(base), str(tuned))
    in_memory = load_model(str(base), "cpu", dtype)
    with steered_in_place(in_memory, open_steering(vector, listed, 2.0, source="by hand")):
        weights = in_memory.model.state_dict()
        assert all(same_bits(weights[name], tensor) for name, tensor in want.items())


@pytest.mark.parametrize("error", [None, RuntimeError("half way")], ids=["well", "by an error"])
def test_steering_in_place_puts_the_weights_back_however_the_block_ends(base, tuned, error):
    vector = TaskVector.open(str(base), str(tuned))
    in_memory = load_model(str(base), "cpu", "float32")
    before = {name: tensor.clone() for name, tensor in in_memory.model.state_dict().items()}
    try:
        with steered_in_place(in_memory, open_steering(vector, HEADS, 2.0, source="by hand")):
            changed = in_memory.projections[0].weight.clone()
            if error:
                raise error
    except RuntimeError as raised:
        assert raised is error
    assert not torch.equal(changed, before[MODELS["llama"][2].format(0)])
    assert all(same_bits(tensor, before[name]) for name, tensor in in_memory.model.state_dict().items())


def test_a_model_that_is_not_all_in_memory_is_not_steered_in_place_in_vain(base, tuned):
    vector = TaskVector.open(str(base), str(tuned))
    in_memory = load_model(str(base), "cpu", "float32")
    in_memory.projections[1].to("meta")
    opened = open_steering(vector, HEADS, 2.0, source="by hand")
    with pytest.raises(UserError, match="not all in memory"), steered_in_place(in_memory, opened):
        pass


def test_steering_in_place_and_back_again_leaves_the_task_vector_alone(base, tuned):
    vector = TaskVector.open(str(base), str(tuned))
    in_memory = load_model(str(base), "cpu", "float32")
    with steered_in_place(in_memory, open_steering(vector, HEADS, 2.0, source="by hand")):
        pass
    assert all(torch.equal(kept, vector.at(layer)) for layer, kept in enumerate(vector.layers))


def test_a_notebook_that_steers_gets_the_facts_that_are_written(base, tuned, output):
    vector = TaskVector.open(str(base), str(tuned))
    opened = open_steering(vector, HEADS, 1.0, source="by hand")
    facts = steering.steer_checkpoint(opened, output, language="English")
    assert facts == json.loads((output / "soteria.json").read_text())


def test_a_steering_that_would_do_nothing_or_harm_cannot_be_opened(tmp_path, base, tuned):
    vector = TaskVector.open(str(base), str(tuned))
    faults = {
        "by hand names no heads": ([], 1.0),
        r"by hand names head \[99, 0\], but .* has 3 layers of 4 heads": ([[99, 0], [0, 99]], 1.0),
        r"\[0, 4\]": ([(0, 4)], 1.0),
        r"\[3, 0\]": ([(3, 0)], 1.0),
        r"\[-1, 0\]": ([(-1, 0)], 1.0),
        r"\[0, -1\]": ([(0, -1)], 1.0),
        r"by hand names head \[0, 3\] twice": ([*HEADS, [0, 3]], 1.0),
        "not -0.5": (HEADS, -0.5),
        "not nan": (HEADS, float("nan")),
        "not inf": (HEADS, float("inf")),
    }
    for said, (listed, factor) in faults.items():
        with pytest.raises(UserError, match=said):
            open_steering(vector, listed, factor, source="by hand")
    with pytest.raises(UserError, match=r"selected heads \(by hand\): was one path given twice\?"):
        open_steering(TaskVector.open(str(base), str(base)), HEADS, 1.0, source="by hand")


def test_heads_that_an_adapter_leaves_alone_cannot_be_steered(tmp_path, base):
    adapter = write_adapter(tmp_path / "adapter", base, layers_to_transform=[1])
    vector = TaskVector.open(str(base), str(adapter))
    with pytest.raises(UserError, match=r"selected heads \(bottom heads\): does the adapter change other layers"):
        open_steering(vector, HEADS, 1.0, source="bottom heads")
    assert open_steering(vector, [*HEADS, (1, 0)], 1.0, source="by hand").heads == [*HEADS, (1, 0)]


def test_a_model_is_steered_one_way_at_a_time_and_only_its_own(tmp_path, base, tuned):
    opened = open_steering(TaskVector.open(str(base), str(tuned)), HEADS, 0.0, source="by hand")
    in_memory = load_model(str(base), "cpu", "float32")
    assert not is_steered(in_memory)
    with steered_in_place(in_memory, opened):
        with pytest.raises(UserError, match="is steered already"), steered_in_place(in_memory, opened):
            pass
        assert is_steered(in_memory)
    assert not is_steered(in_memory)
    for other in ({"hidden_size": 64}, {"num_hidden_layers": 2}, {"head_dim": 16, "num_attention_heads": 2}):
        wrong = load_model(str(write_model(tmp_path / str(other), **other)), "cpu", "float32")
        with pytest.raises(UserError, match="not shaped like"), steered_in_place(wrong, opened):
            pass
