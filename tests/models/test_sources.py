"""Where models come from: GGUF files, hub ids with revisions, quantized checkpoints; what is said of broken ones."""

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny_gguf, save_tiny_model, tiny_tokenizer
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from soteria.answering.columns import model_settings
from soteria.errors import UserError
from soteria.languages import find_language
from soteria.models import sources
from soteria.models.checkpoints import Checkpoint
from soteria.models.gguf import unpacked
from soteria.models.loading import describe_model, load_judge, load_model, load_tokenizer
from soteria.models.sources import located
from soteria.models.task_vector import TaskVector
from soteria.storage import paths

needs_gguf = pytest.mark.skipif(
    not importlib.util.find_spec("gguf"), reason="no package gguf: the pin is in requirements-tokenizers.txt"
)


@pytest.fixture
def variant(tiny_folder, tmp_path) -> Callable[..., Path]:
    """`variant(**config)`: a copy of a model whose config.json has other values, or lacks those that are None."""

    def make(**config) -> Path:
        folder = shutil.copytree(tiny_folder("llama"), tmp_path / f"model{len(list(tmp_path.iterdir()))}")
        found = json.loads((folder / "config.json").read_text()) | config
        (folder / "config.json").write_text(json.dumps({k: v for k, v in found.items() if v is not None}))
        return folder

    return make


BROKEN = [b"{", b"", b"null", b"[1]", b"\xef\xbb\xbf{}", '{"eos_token_id": 0}'.encode("utf-16")]
BROKEN += [b'{"eos_token_id": %s}' % end for end in (b'"</s>"', b"[[0]]", b"true", b"1.5", b"[0, null]", b'{"a": 1}')]


@pytest.mark.parametrize("content", BROKEN)
def test_a_generation_config_that_cannot_be_read_is_not_done_without(variant, content):
    folder = variant()
    (folder / "generation_config.json").write_bytes(content)
    for load in (load_model, describe_model):
        with pytest.raises(UserError, match=r"generation_config.json[^\n]*$"):
            load(str(folder))
    (folder / "generation_config.json").unlink()
    assert describe_model(str(folder)).model.generation_config.eos_token_id == 0


def test_weights_that_a_config_leaves_out_are_not_left_out_without_a_word(variant, capsys, monkeypatch):
    load_model(str(variant()), "cpu")
    assert "tensors" not in capsys.readouterr().err
    folder = variant(num_hidden_layers=2)
    assert load_model(str(folder), "cpu").geometry.n_layers == 2
    said = capsys.readouterr().err
    assert f"{folder} has 9 tensors that its config has no place for, the first model.layers.2." in said


# GGUF files


@needs_gguf
def test_a_gguf_file_is_a_model_wherever_one_is_taken_and_is_unpacked_once(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "RESULTS", tmp_path / "results")
    (tmp_path / "lab").mkdir()
    file = tmp_path / "lab" / "tiny.gguf"
    want = save_tiny_gguf(file).state_dict()
    loaded = load_model(str(file), "cpu")
    assert all(torch.equal(want[key], tensor) for key, tensor in loaded.model.state_dict().items())
    assert loaded.tokenizer.encode("Q: hot") == tiny_tokenizer(adds_bos=False).encode("Q: hot")
    folder = tmp_path / "results" / "models" / "tiny_gguf"
    assert list(folder.parent.iterdir()) == [folder]
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    before = folder.stat().st_mtime_ns
    assert Checkpoint.open(str(file.parent), to_steer=True).folder == folder  # a folder that holds nothing else
    assert model_settings(str(file), find_language("hi"), 1, False)
    assert TaskVector.open(str(file), str(file)).head_changes.max() == 0
    assert folder.stat().st_mtime_ns == before and paths.model_slug(str(file)) == "tiny"
    (folder / "model.safetensors").unlink()
    found = load_model(str(file), "cpu").model.state_dict()
    assert all(torch.equal(tensor, found[key]) for key, tensor in want.items())
    want = save_tiny_gguf(file, seed=1).state_dict()
    found = load_model(str(file), "cpu").model.state_dict()
    assert torch.equal(want["lm_head.weight"], found["lm_head.weight"])


@needs_gguf
def test_a_gguf_file_that_cannot_be_used_is_refused_in_one_sentence_and_nothing_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "RESULTS", tmp_path / "results")
    save_tiny_gguf(tmp_path / "one.gguf")
    (tmp_path / "two.gguf").write_bytes((tmp_path / "one.gguf").read_bytes()[:3000])
    for name, said in {"two.gguf": "could not be read", "none.gguf": "no file", ".": "has 2 GGUF files"}.items():
        with pytest.raises(UserError, match=said):
            located(str(tmp_path / name))
    (tmp_path / "results" / "models" / "one_gguf").mkdir(parents=True)
    (tmp_path / "results" / "models" / "one_gguf" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds something else"):
        unpacked(tmp_path / "one.gguf")
    assert [path.name for path in (tmp_path / "results" / "models").iterdir()] == ["one_gguf"]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (tmp_path / "one.gguf").rename(tmp_path / "three.gguf")
    with pytest.raises(UserError, match="needs the package gguf"):
        unpacked(tmp_path / "three.gguf")


def test_a_model_folder_may_be_named_like_a_gguf_file(tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder("llama"), tmp_path / "tiny.gguf")
    assert load_model(str(folder), "cpu").geometry.n_layers == 3


# The hub


@pytest.fixture
def cached_hub(tmp_path, monkeypatch):
    """A hub that cannot be reached, with `lab/tiny` in its cache: `main`, and another model as revision `v2`."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(sources, "hub_answers", lambda: False)
    for seed, (name, revision) in enumerate({"main": "a" * 40, "v2": "b" * 40}.items()):
        folder = tmp_path / "models--lab--tiny"
        (folder / "snapshots" / revision).mkdir(parents=True)
        save_tiny_model(folder / "snapshots" / revision, "llama", seed=seed)
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / name).write_text(revision)


def test_a_revision_is_part_of_a_hub_id_for_every_loader(cached_hub):
    vector = TaskVector.open("lab/tiny", "lab/tiny@v2")
    assert (vector.base.revision, vector.tuned.revision) == ("a" * 40, "b" * 40)
    weights = [load_model(name, "cpu").model.lm_head.weight for name in ("lab/tiny", "lab/tiny@v2")]
    assert not torch.equal(*weights) and vector.head_changes.max() > 0
    assert paths.model_slug("lab/tiny@v2") == "lab_tiny@v2"


@pytest.mark.parametrize("load", [load_model, load_judge, Checkpoint.open])
@pytest.mark.parametrize(
    ("name", "said"),
    [("lab/other", "cannot be reached"), ("./lab/other", "nor can it be a hub id"), ("lab/tiny@v3", "lab/tiny@v3")],
)
def test_a_model_that_cannot_be_had_is_refused_without_asking_the_hub(cached_hub, load, name, said):
    with pytest.raises(UserError, match=said):
        load(name)


# Quantized checkpoints

QUANTIZED = {
    "fp8": {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
    "bitsandbytes 4-bit": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 128},
    "compressed-tensors": {"quant_method": "compressed-tensors", "format": "pack-quantized"},
    "of-tomorrow": {"quant_method": "of-tomorrow"},
}


@pytest.mark.parametrize("method", QUANTIZED)
def test_a_quantized_model_is_refused_in_steering_by_its_config_alone(method, variant, tiny_folder):
    folder, sound = variant(quantization_config=QUANTIZED[method]), str(tiny_folder("llama"))
    (folder / "model.safetensors").write_bytes(b"never read")
    for pair in ((str(folder), sound), (sound, str(folder))):
        with pytest.raises(UserError, match=f"is quantized by {method}, .* give the unquantized model"):
            TaskVector.open(*pair)


def test_a_quantized_model_whose_attention_is_not_can_be_steered(variant):
    quantized = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    folder = str(variant(quantization_config=quantized))
    assert TaskVector.open(folder, folder).geometry.n_layers == 3


def test_an_fp8_model_is_a_judge_and_is_scored_in_floats(tmp_path):
    widths = {"hidden_size": 128, "intermediate_size": 128}
    save_tiny_model(tmp_path, "llama", **widths)
    tensors, want = load_file(tmp_path / "model.safetensors"), {}
    for key in [key for key in tensors if "proj" in key]:
        scale = tensors[key].abs().max() / 448
        tensors[key] = (tensors[key] / scale).to(torch.float8_e4m3fn)
        want[key], tensors[f"{key}_scale_inv"] = tensors[key].float() * scale, scale.reshape(1, 1)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text()) | {"quantization_config": QUANTIZED["fp8"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for load in (load_model, load_judge):
        found = load(str(tmp_path)).model.state_dict()
        assert all(torch.equal(found[key].float(), tensor) for key, tensor in want.items())


@pytest.mark.parametrize("method", ["bitsandbytes 4-bit", "gptq", "awq", "compressed-tensors"])
def test_a_judge_that_needs_a_package_names_it(method, variant):
    with pytest.raises(UserError, match=rf"is quantized by {method} and could not be loaded here \(.*pip install"):
        load_judge(str(variant(quantization_config=QUANTIZED[method])))


# Models that cannot be loaded


def test_attention_that_the_config_asks_for_and_cannot_be_computed_is_replaced_and_said(variant, capsys):
    for asked in ("flash_attention_2", "somebody/kernel"):
        loaded = load_model(str(variant(attn_implementation=asked)), "cpu")
        assert loaded.model.config._attn_implementation == "sdpa"
        assert f"asks for attention by {asked}; sdpa or eager is used" in capsys.readouterr().err


BROKEN = {
    "an unknown type": ({"model_type": "foo9", "architectures": ["Foo9LM"]}, r"\(Foo9LM\) is of type 'foo9', which"),
    "no type": ({"model_type": None}, "no readable config.json with a model_type"),
    "code of its own": ({"model_type": "foo9", "auto_map": {"AutoConfig": "a.B"}}, "code that comes with it, which is"),
    "a field that is no number": ({"num_hidden_layers": "three"}, "'num_hidden_layers' expected int"),
    "a missing choice": ({"hidden_act": "nope"}, r"\(LlamaForCausalLM\) could not be loaded \(KeyError: 'nope'\)"),
    "weights of other shapes": ({"intermediate_size": 96}, "do not fit its config, a LlamaForCausalLM .*down_proj"),
    "more labels than any model": ({"num_labels": 10**9}, "num_labels 1000000000, more than any model"),
    "heads that do not divide the width": ({"hidden_size": 33}, r"\(LlamaForCausalLM\) could not be .* \(33\)"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_transformers_cannot_load_is_said_in_one_sentence_that_names_the_architecture(case, variant, capsys):
    config, said = BROKEN[case]
    with pytest.raises(UserError, match=said) as caught:
        load_model(str(variant(**config)), "cpu")
    assert str(caught.value).isprintable() and "\n" not in str(caught.value) and "REPORT" not in capsys.readouterr().err


def test_a_tokenizer_cuts_a_text_the_same_way_each_time(tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder("llama"), tmp_path / "model")
    words = models.BPE({"a": 0, "b": 1, "c": 2, "ab": 3, "abc": 4}, [("a", "b"), ("ab", "c")], dropout=0.5)
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words)).save_pretrained(folder)
    plain, ours = AutoTokenizer.from_pretrained(folder), load_tokenizer(str(folder))
    assert len({str(plain("abc" * 9).input_ids) for _ in range(20)}) > 1
    assert {str(ours("abc" * 9).input_ids) for _ in range(20)} == {str([4] * 9)}


def test_an_adapter_given_as_a_model_is_told_what_it_is(tiny_folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_folder("llama"))
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["o_proj"], r=2)).save_pretrained(tmp_path)
    for load in (load_model, load_judge, lambda name: model_settings(name, find_language("hi"), 1, False)):
        with pytest.raises(UserError, match="is a LoRA adapter, not a model; give its base, or merge it"):
            load(str(tmp_path))


def test_a_tokenizer_that_cannot_be_loaded_is_told_from_its_model_and_names_its_package(variant, monkeypatch):
    folder = variant()
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(UserError, match=r"has a tokenizer that could not be loaded .*no tokenizer\.json"):
        load_model(str(folder))
    (folder / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    monkeypatch.setattr(sources, "_has", lambda module: module != "sentencepiece")
    with pytest.raises(UserError, match="needs the package sentencepiece; pip install sentencepiece"):
        load_model(str(folder))
