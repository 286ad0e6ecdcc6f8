"""One base and one delta for many languages: switching in place, back to the base exactly, and what is refused."""

import json
import random
import shutil
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import run_in_child
from test_steering import SHARDS, same_bits, some_heads, stored, write_adapter
from test_steering import write_model as write
from transformers import AutoModelForCausalLM

import soteria
import steer
from soteria.errors import UserError
from soteria.models import task_vector
from soteria.models.tensors import read_tensor
from soteria.scoring.heads import write_heads
from soteria.storage import files

LANGUAGES = {"English": 0, "Hindi": 1, "Bengali": 2}
ALL = [word for language in LANGUAGES for word in ("--language", language)]


def head_lists(folder: Path, base: Path) -> Path:
    for language, seed in LANGUAGES.items():
        write_heads(folder / f"{language}_Heads.json", some_heads(base, seed))
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[Path, Path, Path]:
    """A base, a tuned model and head lists of three languages."""
    folder = tmp_path_factory.mktemp("models")
    base = write(folder / "base", dtype="bfloat16", shard_size=SHARDS)
    return base, write(folder / "tuned", tuned=True), head_lists(folder / "heads", base)


def words(models, output: Path, *options: str) -> list[str]:
    base, tuned, heads = models
    own = ["--base_model", base, "--finetune_model", tuned, "--head_folder", heads, "--output", output]
    return [*map(str, own), "--scaling_factor", "2.5", *options]


@pytest.fixture
def delta(models, run_script, tmp_path) -> Path:
    assert run_script(steer, *words(models, tmp_path / "delta", "--format", "delta", *ALL)) == 0
    return tmp_path / "delta"


def weights_of(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_weights(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(same_bits(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("model", "dtype"), [("llama", "float16"), ("phi3-96", "bfloat16"), ("gpt2", "float32"), ("gpt-neox", "bfloat16")]
)
def test_each_language_is_the_checkpoint_that_steering_writes_bit_for_bit(tmp_path, run_script, model, dtype):
    base = write(tmp_path / "base", model, dtype=dtype)
    models = base, write(tmp_path / "tuned", model, tuned=True), head_lists(tmp_path / "heads", base)
    assert run_script(steer, *words(models, tmp_path / "delta", "--format", "delta", *ALL)) == 0
    steered = soteria.load_steered(base, tmp_path / "delta", device="cpu")
    before = weights_of(steered)
    for language in ("English", "Hindi", "Bengali", "English"):
        output = tmp_path / language
        assert run_script(steer, *words(models, output, "--language", language)) == 0
        steered.set_language(language)
        written = AutoModelForCausalLM.from_pretrained(output, dtype="auto").state_dict()
        assert same_weights(steered.state_dict(), written)
        assert not same_weights(written, before)
    steered.set_language(None)
    assert same_weights(steered.state_dict(), before)


def test_a_language_and_a_factor_may_be_given_at_loading_and_changed_later(models, delta):
    base = models[0]
    plain = soteria.load_steered(base, delta, device="cpu")
    plain.set_language("hi", scaling_factor=1.0)
    at_once = soteria.load_steered(base, delta, language="Hindi", scaling_factor=1.0, device="cpu")
    assert same_weights(plain.state_dict(), at_once.state_dict())
    plain.set_language("hi")  # the delta's own factor again
    assert not same_weights(plain.state_dict(), at_once.state_dict())
    plain.set_language("hi", scaling_factor=0)
    own = soteria.load_steered(base, delta, device="cpu")
    assert same_weights(plain.state_dict(), own.state_dict())


def test_the_steered_model_is_transformers_own_and_answers(models, delta):
    model = soteria.load_steered(models[0], delta, language="bn", device="cpu")
    ids = torch.tensor([[1, 2, 3]])
    steered = model(input_ids=ids).logits
    model.set_language(None)
    assert not torch.equal(model(input_ids=ids).logits, steered)
    assert model.generate(ids, max_new_tokens=2, do_sample=False).shape[1] >= 4


def test_an_end_half_way_through_a_switch_can_be_taken_back(models, delta, monkeypatch):
    model = soteria.load_steered(models[0], delta, device="cpu")
    before, calls = weights_of(model), []

    def interrupted(*given):
        calls.append(given)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return true_steer(*given)

    from soteria.steering import formula as module

    true_steer = module.steer
    monkeypatch.setattr(module, "steer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.set_language("hi")
    model.set_language(None)
    assert same_weights(model.state_dict(), before)


def test_a_delta_is_small_and_says_how_it_was_made(models, delta):
    facts = json.loads((delta / "soteria.json").read_text())
    assert list(facts["languages"]) == ["English", "Hindi", "Bengali"]
    assert facts["scaling_factor"] == 2.5
    assert facts["versions"]["soteria"] == soteria.__version__
    assert {path.name for path in delta.iterdir()} == {"delta.safetensors", "heads", "soteria.json", "README.md"}
    assert len(stored(delta)) == 3
    card = (delta / "README.md").read_text()
    assert "language:\n- en\n- hi\n- bn\n" in card
    assert "load_steered" in card


def test_a_delta_of_an_adapter_is_its_product(tmp_path, models, run_script):
    base, _, heads = models
    adapter = write_adapter(tmp_path / "adapter", base)
    assert run_script(steer, *words((base, adapter, heads), tmp_path / "d", "--format", "delta", *ALL)) == 0
    assert run_script(steer, *words((base, adapter, heads), tmp_path / "m", "--language", "hi")) == 0
    got = soteria.load_steered(base, tmp_path / "d", language="hi", device="cpu").state_dict()
    assert all(same_bits(got[name], tensor) for name, tensor in stored(tmp_path / "m").items())


def test_a_delta_goes_with_its_base_in_other_files_too(tmp_path, models, delta):
    whole = tmp_path / "whole"
    shutil.copytree(models[0], whole, ignore=shutil.ignore_patterns("*.safetensors*"))
    safetensors.torch.save_file(stored(models[0]), whole / "model.safetensors", metadata={"format": "pt"})
    one = soteria.load_steered(models[0], delta, language="hi", device="cpu")
    assert same_weights(one.state_dict(), soteria.load_steered(whole, delta, language="hi", device="cpu").state_dict())


def test_several_languages_as_checkpoints_give_a_folder_each(models, run_script, tmp_path, monkeypatch):
    monkeypatch.setattr("soteria.storage.paths.RESULTS", tmp_path)
    given = words(models, tmp_path, *ALL)
    del given[given.index("--output") : given.index("--output") + 2]
    assert run_script(steer, *given) == 0
    names = {path.name for path in (tmp_path / "models").iterdir()}
    assert names == {f"{language}_base_scaling_2.5" for language in LANGUAGES}


# --- refused ---------------------------------------------------------------------------------------------------------


def test_one_output_for_several_checkpoints_is_refused(models, run_script, tmp_path, capsys):
    assert run_script(steer, *words(models, tmp_path / "out", *ALL)) == 2
    assert "--output takes one language's model" in capsys.readouterr().err


def test_the_same_delta_is_reused_and_another_refused_unless_overwritten(models, run_script, delta, capsys):
    before = (delta / "delta.safetensors").stat().st_mtime_ns
    assert run_script(steer, *words(models, delta, "--format", "delta", *ALL)) == 0
    assert (delta / "delta.safetensors").stat().st_mtime_ns == before
    fewer = words(models, delta, "--format", "delta", "--language", "hi")
    assert run_script(steer, *fewer) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert run_script(steer, *fewer, "--overwrite") == 0
    assert list(json.loads((delta / "soteria.json").read_text())["languages"]) == ["Hindi"]


def test_a_delta_of_a_model_from_itself_is_refused(models, run_script, tmp_path, capsys):
    base, _, heads = models
    out = tmp_path / "out" / "delta"
    assert run_script(steer, *words((base, base, heads), out, "--format", "delta", *ALL)) == 2
    assert "was one path given twice?" in capsys.readouterr().err
    assert not out.parent.exists()


def test_a_delta_of_weights_that_are_no_numbers_is_refused(models, run_script, tmp_path, capsys):
    def spoil(weights):
        weights["model.layers.1.self_attn.o_proj.weight"][0, 0] = float("inf")

    broken = write(tmp_path / "broken", tuned=True, change=spoil)
    out = tmp_path / "out" / "delta"
    assert run_script(steer, *words((models[0], broken, models[2]), out, "--format", "delta", *ALL)) == 2
    assert "is not finite" in capsys.readouterr().err
    assert not out.parent.exists()


def test_a_language_that_the_delta_lacks_is_refused_and_the_model_stays(models, delta):
    model = soteria.load_steered(models[0], delta, language="hi", device="cpu")
    before = weights_of(model)
    for wrong in ("th", "Klingon"):
        with pytest.raises(UserError, match="Hindi"):
            model.set_language(wrong)
    for factor in (-1, float("nan"), float("inf")):
        with pytest.raises(UserError, match=">= 0"):
            model.set_language("en", scaling_factor=factor)
    assert same_weights(model.state_dict(), before)


def other_base(folder: Path, models, delta: Path) -> Path:
    return models[1]


def no_facts(folder: Path, models, delta: Path) -> Path:
    (delta / "soteria.json").unlink()
    return models[0]


def truncated(folder: Path, models, delta: Path) -> Path:
    path = delta / "delta.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    return models[0]


def without_heads(folder: Path, models, delta: Path) -> Path:
    (delta / "heads" / "Hindi_Heads.json").unlink()
    return models[0]


def heads_outside(folder: Path, models, delta: Path) -> Path:
    (delta / "heads" / "Hindi_Heads.json").write_text("[[9, 9]]")
    return models[0]


def wider_base(folder: Path, models, delta: Path) -> Path:
    return write(folder / "wide", hidden_size=64)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (other_base, "has other weights"),
        (no_facts, "not a delta folder"),
        (truncated, "no sound safetensors file"),
        (without_heads, "Hindi_Heads.json"),
        (heads_outside, r"names head \[9, 9\]"),
        (wider_base, "has other weights"),
    ],
)
def test_a_delta_that_is_broken_or_of_another_base_is_refused(tmp_path, models, delta, fault, said):
    base = fault(tmp_path, models, delta)
    with pytest.raises(UserError, match=said):
        soteria.load_steered(base, delta, language="hi", device="cpu")


def test_what_a_killed_run_left_is_removed_and_what_another_is_writing_is_not(models, run_script, tmp_path):
    (tmp_path / ".m.dead.tmp").mkdir()
    (tmp_path / ".m.alive.tmp").mkdir()
    with files._locked(tmp_path / ".m.alive.tmp"):
        assert run_script(steer, *words(models, tmp_path / "m", "--language", "hi")) == 0
        assert {path.name for path in tmp_path.iterdir()} == {"m", ".m.alive.tmp"}


# --- killed ----------------------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("form", ["checkpoint", "delta"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_killed_at_any_moment_no_folder_looks_whole_that_is_not(models, tmp_path, monkeypatch, form, overwrite):
    def read_slowly(place):
        time.sleep(0.02)  # as a large matrix would: most kills are to fall between the first byte and the last
        return read_tensor(place)

    monkeypatch.setattr(task_vector, "read_tensor", read_slowly)
    options = ["--format", form, "--language", "hi", *(["--overwrite"] if overwrite else [])]

    def run(out: Path, kill_after: float | None = None, *more: str) -> float:
        return run_in_child(steer, words(models, out / "m", *options, *more), kill_after)

    run(tmp_path / "older", None, "--scaling_factor", "1")
    seconds = run(tmp_path / "whole")
    expected = contents(tmp_path / "whole" / "m")
    older = contents(tmp_path / "older" / "m")
    draw, stages = random.Random(0), set()
    for index in range(20):
        out = tmp_path / str(index)
        if overwrite:
            shutil.copytree(tmp_path / "older" / "m", out / "m")
        run(out, kill_after=draw.uniform(0, seconds))
        stages.add(len(list(out.glob(".m.*.tmp"))))
        if (out / "m").exists():
            assert contents(out / "m") in (expected, older)
        run(out)
        assert contents(out / "m") == expected
        assert [path.name for path in out.iterdir()] == ["m"]
    assert len(stages) > 1  # some were killed while they wrote, some before or after
