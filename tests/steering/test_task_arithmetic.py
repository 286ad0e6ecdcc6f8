"""Every parameter steered in memory against the obvious formula, and undone bit for bit."""

from pathlib import Path

import peft
import pytest
import torch
from tiny_models import tiny_model, tiny_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM

from soteria.errors import UserError
from soteria.models.loading import DTYPES, load_model
from soteria.models.task_vector import TaskVector
from soteria.steering import task_arithmetic
from soteria.steering.formula import is_steered, open_steering, overwritten, steered_in_place
from soteria.steering.task_arithmetic import all_parameters_steered


def write_twin(folder: Path, architecture: str, dtype: str = "float32", **save) -> Path:
    """The tiny model of that architecture with noise on every parameter."""
    twin, generator = tiny_model(architecture), torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    twin.to(DTYPES[dtype]).save_pretrained(folder, **save)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def write_adapter(folder: Path, base: Path, **settings) -> Path:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(3)
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "init_lora_weights": False, **settings})
    peft.get_peft_model(model, config).save_pretrained(folder)
    return folder


def bits(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone().view(torch.uint8) for name, tensor in model.state_dict().items()}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("piece", [2**24, 1000])
@pytest.mark.parametrize(
    ("architecture", "dtype", "tuned_dtype"),
    [("llama", "float32", "float16"), ("gpt2", "float32", "float32"), ("gemma3", "bfloat16", "float32")],
)
def test_every_parameter_follows_the_formula_and_is_undone_bit_for_bit_from_the_files(
    architecture, dtype, tuned_dtype, piece, tiny_folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(task_arithmetic, "PIECE", piece)
    base = tiny_folder(architecture)
    twin = write_twin(tmp_path / "twin", architecture, tuned_dtype, max_shard_size="50KB")
    loaded, vector = load_model(str(base), "cpu", dtype), TaskVector.open(str(base), str(twin))
    before = bits(loaded.model)
    stored, tuned = (
        dict(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).named_parameters())
        for folder in (base, twin)
    )
    weights = {name: parameter.detach().clone() for name, parameter in loaded.model.named_parameters()}
    with all_parameters_steered(loaded, vector, 0.7):
        for name, parameter in loaded.model.named_parameters():
            slow = weights[name].float() - 0.7 * (tuned[name] - stored[name])
            assert torch.equal(parameter, slow.to(parameter.dtype)), name
        assert all(callable(values) for *_, values in overwritten(loaded))  # no second copy in memory
    assert same(bits(loaded.model), before) and not is_steered(loaded)


def test_weights_that_the_files_do_not_hold_are_kept_and_come_back(tiny_folder, tmp_path):
    base, twin = tiny_folder("llama"), write_twin(tmp_path / "twin", "llama")
    loaded = load_model(str(base), "cpu", "float32")
    with torch.no_grad():
        loaded.model.model.norm.weight += 1
    before = bits(loaded.model)
    with all_parameters_steered(loaded, TaskVector.open(str(base), str(twin)), 2):
        assert sum(isinstance(values, Tensor) for *_, values in overwritten(loaded)) == 1
    assert same(bits(loaded.model), before)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_an_adapter_steers_what_merging_it_would_change(architecture, tiny_folder, tmp_path):
    base = tiny_folder(architecture)
    modules = ["c_attn", "c_proj"] if architecture == "gpt2" else ["q_proj", "o_proj", "down_proj"]
    adapter = write_adapter(tmp_path / "adapter", base, target_modules=modules)
    loaded, vector = load_model(str(base), "cpu", "float32"), TaskVector.open(str(base), str(adapter))
    before = bits(loaded.model)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    weights = {name: parameter.clone() for name, parameter in plain.named_parameters()}
    merged = dict(peft.PeftModel.from_pretrained(plain, adapter).merge_and_unload().named_parameters())
    with all_parameters_steered(loaded, vector, 1.5):
        for name, parameter in loaded.model.named_parameters():
            slow = weights[name] - 1.5 * (merged[name] - weights[name])
            torch.testing.assert_close(parameter, slow, rtol=0, atol=1e-5)
    assert same(bits(loaded.model), before)


def test_what_cannot_be_steered_whole_is_refused_and_leaves_the_model_as_it_was(tiny_folder, tmp_path):
    base, twin = str(tiny_folder("llama")), write_twin(tmp_path / "twin", "llama")
    broken, generator = tiny_model("llama"), torch.Generator().manual_seed(1)
    with torch.no_grad():
        broken.model.layers[0].self_attn.o_proj.weight += torch.randn((32, 32), generator=generator)
        broken.model.norm.weight[3] = float("nan")
    broken.save_pretrained(tmp_path / "broken")
    wide = write_adapter(tmp_path / "wide", base, target_modules=["o_proj"], modules_to_save=["lm_head"])
    loaded = load_model(base, "cpu", "float32")
    before = bits(loaded.model)
    for tuned, factor, said in (
        (base, 1, "one path given twice"),
        (tmp_path / "broken", 1, "not finite"),
        (wide, 1, "merge it into its base"),
        (twin, -1, "below 0"),
    ):
        with (
            pytest.raises(UserError, match=said),
            all_parameters_steered(loaded, TaskVector.open(base, str(tuned)), factor),
        ):
            pytest.fail("it was steered")
        assert same(bits(loaded.model), before)
    vector = TaskVector.open(base, str(twin))
    with (
        steered_in_place(loaded, open_steering(vector, [(0, 0)], 1, source="a list")),
        pytest.raises(UserError, match="steered already"),
        all_parameters_steered(loaded, vector, 1),
    ):
        pytest.fail("it was steered twice")


def test_the_norm_of_a_heads_slice_is_that_of_its_columns_or_rows(tiny_folder, tmp_path):
    for architecture, name in (("llama", "model.layers.1.self_attn.o_proj"), ("gpt2", "transformer.h.1.attn.c_proj")):
        base, twin = tiny_folder(architecture), write_twin(tmp_path / architecture, architecture)
        folders = (base, twin)
        weights = [AutoModelForCausalLM.from_pretrained(each).state_dict()[f"{name}.weight"] for each in folders]
        change = (weights[1] - weights[0]).double()
        own = change[16:24] if architecture == "gpt2" else change[:, 16:24]
        found = TaskVector.open(str(base), str(twin)).head_norms[1, 2]
        assert found.item() == pytest.approx(own.square().sum().sqrt().item(), rel=1e-9)
