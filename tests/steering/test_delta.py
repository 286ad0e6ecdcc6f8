"""One base and one delta for many languages: switching in place, back to the base exactly, refusals, and kills."""

import json
import random
import shutil
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import run_in_child
from test_steering import (
    O_PROJ,
    SHARDS,
    opened,
    same_bits,
    same_weights,
    some_heads,
    stored,
    write_adapter,
    write_model,
)
from transformers import AutoModelForCausalLM

import soteria
import steer
from soteria.errors import UserError
from soteria.models import task_vector
from soteria.models.tensors import read_tensor
from soteria.scoring.heads import write_heads
from soteria.steering import formula
from soteria.steering.delta import write_delta

LANGUAGES = {"English": 0, "Hindi": 1, "Bengali": 2}
ALL = [word for language in LANGUAGES for word in ("--language", language)]
DELTA = ("--format", "delta", *ALL)


def head_lists(folder: Path, base: Path) -> Path:
    for language, seed in LANGUAGES.items():
        write_heads(folder / f"{language}_Heads.json", some_heads(base, seed))
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[Path, Path, Path]:
    """A base, a tuned model and head lists of three languages."""
    folder = tmp_path_factory.mktemp("models")
    base = write_model(folder / "base", dtype="bfloat16", shard_size=SHARDS)
    return base, write_model(folder / "tuned", tuned=True), head_lists(folder / "heads", base)


def words(models, output: Path, *options: str) -> list[str]:
    own = zip(("base_model", "finetune_model", "head_folder"), models, strict=True)
    return [*(f"--{key}={path}" for key, path in own), f"--output={output}", "--scaling_factor", "2.5", *options]


@pytest.fixture
def delta(models, run_script, tmp_path) -> Path:
    assert run_script(steer, *words(models, tmp_path / "delta", *DELTA)) == 0
    return tmp_path / "delta"


def weights_of(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(
    ("model", "dtype"), [("llama", "float16"), ("phi3-96", "bfloat16"), ("gpt2", "float32"), ("gpt-neox", "bfloat16")]
)
def test_each_language_is_the_checkpoint_that_steering_writes_bit_for_bit(tmp_path, run_script, model, dtype):
    base = write_model(tmp_path / "base", model, dtype=dtype)
    models = base, write_model(tmp_path / "tuned", model, tuned=True), head_lists(tmp_path / "heads", base)
    assert run_script(steer, *words(models, tmp_path / "delta", *DELTA)) == 0
    steered = soteria.load_steered(base, tmp_path / "delta", device="cpu")
    before = weights_of(steered)
    for language in ("English", "Hindi", "Bengali", "English"):
        output = tmp_path / language
        assert run_script(steer, *words(models, output, "--language", language)) == 0
        steered.set_language(language)
        written = AutoModelForCausalLM.from_pretrained(output, dtype="auto").state_dict()
        assert same_weights(steered.state_dict(), written) and not same_weights(written, before)
    steered.set_language(None)
    assert same_weights(steered.state_dict(), before)


def test_language_and_factor_can_be_given_at_loading_and_changed_later(models, delta):
    plain = soteria.load_steered(models[0], delta, device="cpu")
    before, ids = weights_of(plain), torch.tensor([[1, 2, 3]])
    plain.set_language("hi", scaling_factor=1.0)
    at_once = soteria.load_steered(models[0], delta, language="Hindi", scaling_factor=1.0, device="cpu")
    assert same_weights(plain.state_dict(), at_once.state_dict())
    assert at_once.generate(ids, max_new_tokens=2, do_sample=False).shape[1] >= 4
    plain.set_language("hi")  # the delta's own factor again
    assert not torch.equal(plain(input_ids=ids).logits, at_once(input_ids=ids).logits)
    plain.set_language("hi", scaling_factor=0)
    assert same_weights(plain.state_dict(), before)


def test_an_end_half_way_through_a_switch_can_be_taken_back(models, delta, monkeypatch):
    model = soteria.load_steered(models[0], delta, device="cpu")
    before, calls, formula_itself = weights_of(model), [], formula.steer

    def interrupted(*given):
        calls.append(given)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return formula_itself(*given)

    monkeypatch.setattr(formula, "steer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.set_language("hi")
    model.set_language(None)
    assert same_weights(model.state_dict(), before)


def test_a_delta_is_small_and_says_how_it_was_made(models, delta):
    facts = json.loads((delta / "soteria.json").read_text())
    assert list(facts["languages"]) == ["English", "Hindi", "Bengali"]
    assert (facts["scaling_factor"], facts["versions"]["soteria"]) == (2.5, soteria.__version__)
    assert {path.name for path in delta.iterdir()} == {"delta.safetensors", "heads", "soteria.json", "README.md"}
    assert [tensor.dtype for tensor in stored(delta).values()] == [torch.float32] * 3
    card = (delta / "README.md").read_text()
    assert "language:\n- en\n- hi\n- bn\n" in card and "load_steered" in card


def test_a_delta_of_an_adapter_is_its_product(tmp_path, models, run_script):
    base, _, heads = models
    models = base, write_adapter(tmp_path / "adapter", base), heads
    assert run_script(steer, *words(models, tmp_path / "d", *DELTA)) == 0
    assert run_script(steer, *words(models, tmp_path / "m", "--language", "hi")) == 0
    got = soteria.load_steered(base, tmp_path / "d", language="hi", device="cpu").state_dict()
    assert all(same_bits(got[name], tensor) for name, tensor in stored(tmp_path / "m").items())


def test_a_delta_goes_with_its_base_in_other_files_too(tmp_path, models, delta):
    whole = shutil.copytree(models[0], tmp_path / "whole", ignore=shutil.ignore_patterns("*.safetensors*"))
    safetensors.torch.save_file(stored(models[0]), whole / "model.safetensors", metadata={"format": "pt"})
    one, other = (soteria.load_steered(base, delta, language="hi", device="cpu") for base in (models[0], whole))
    assert same_weights(one.state_dict(), other.state_dict())


def test_several_languages_as_checkpoints_give_a_folder_each_and_take_no_output(
    models, run_script, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("soteria.storage.paths.RESULTS", tmp_path)
    given = words(models, tmp_path / "out", *ALL)
    assert run_script(steer, *given) == 2
    assert "--output takes one language's model" in capsys.readouterr().err
    assert run_script(steer, *(word for word in given if not word.startswith("--output"))) == 0
    assert {path.name for path in (tmp_path / "models").iterdir()} == {f"{x}_base_scaling_2.5" for x in LANGUAGES}


def test_no_language_is_written_where_another_was_made_from_other_inputs(models, run_script, tmp_path, monkeypatch):
    monkeypatch.setattr("soteria.storage.paths.RESULTS", tmp_path)
    given = [word for word in words(models, tmp_path) if not word.startswith("--output")]
    other = (*models[:2], shutil.copytree(models[2], tmp_path / "others"))
    write_heads(other[2] / "Hindi_Heads.json", [(1, 1)])
    hindi = tmp_path / "models" / "Hindi_base_scaling_2.5"
    assert run_script(steer, *words(other, hindi, "--language", "hi")) == 0
    assert run_script(steer, *given, *ALL) == 2
    assert list((tmp_path / "models").iterdir()) == [hindi]


# Refusals


def test_the_same_delta_is_reused_and_another_refused_unless_overwritten(models, run_script, delta, capsys):
    before = (delta / "delta.safetensors").stat().st_mtime_ns
    assert run_script(steer, *words(models, delta, *DELTA)) == 0
    assert (delta / "delta.safetensors").stat().st_mtime_ns == before
    fewer = words(models, delta, "--format", "delta", "--language", "hi")
    assert run_script(steer, *fewer) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert run_script(steer, *fewer, "--overwrite") == 0
    assert list(json.loads((delta / "soteria.json").read_text())["languages"]) == ["Hindi"]


def test_a_delta_that_steers_nothing_or_is_not_finite_is_refused(models, run_script, tmp_path, capsys):
    base, tuned, heads = models
    name = O_PROJ.format(1)
    broken = write_model(tmp_path / "broken", tuned=True, change=lambda w: w[name][0, 0].fill_(float("inf")))
    for other, said in ((base, "was one path given twice?"), (broken, f"{name} is not finite")):
        assert run_script(steer, *words((base, other, heads), tmp_path / "out" / "delta", *DELTA)) == 2
        assert said in capsys.readouterr().err and not (tmp_path / "out").exists()
    with pytest.raises(UserError, match=f"{name} is not finite"):  # a layer of which no head is listed
        write_delta({"Hindi": opened(base, broken, [(0, 0)])}, tmp_path / "out" / "delta")
    two = {"Hindi": opened(base, tuned, factor=1.0), "Thai": opened(base, tuned, factor=2.0)}
    with pytest.raises(ValueError, match="share one task vector and one scaling factor"):
        write_delta(two, tmp_path / "out" / "delta")


def test_a_language_that_the_delta_lacks_is_refused_and_the_model_stays(models, delta):
    model = soteria.load_steered(models[0], delta, language="hi", device="cpu")
    before = weights_of(model)
    for wrong in ({"language": "th"}, {"language": "Klingon"}, {"language": "en", "scaling_factor": -1}):
        with pytest.raises(UserError, match=r"Hindi|>= 0"):
            model.set_language(**wrong)
    with pytest.raises(UserError, match=">= 0"):
        soteria.load_steered(models[0], delta, scaling_factor=float("nan"), device="cpu")
    assert same_weights(model.state_dict(), before)


def test_a_delta_that_is_broken_or_of_another_base_is_refused(tmp_path, models, delta):
    def refused(said: str, base: Path = models[0]) -> None:
        with pytest.raises(UserError, match=said):
            soteria.load_steered(base, delta, language="hi", device="cpu")

    refused("has other weights", models[1])
    refused("has other weights", write_model(tmp_path / "wide", hidden_size=64))
    heads, weights, facts = (delta / name for name in ("heads/Hindi_Heads.json", "delta.safetensors", "soteria.json"))
    heads.write_text("[[9, 9]]")
    refused(r"Hindi_Heads.json names head \[9, 9\]")
    heads.unlink()
    refused("Hindi_Heads.json")
    safetensors.torch.save_file({name: tensor[:-1] for name, tensor in stored(delta).items()}, weights)
    refused(r"o_proj.weight is \(32, 32\) in .*, \(31, 32\) in")
    weights.write_bytes(weights.read_bytes()[:-1])
    refused("delta.safetensors")
    facts.write_text(facts.read_text().replace('"base_projections_xxh3"', '"renamed"'))
    refused("is not a delta folder")


# Kills


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("form", ["checkpoint", "delta"])
def test_killed_at_any_moment_no_folder_looks_whole_that_is_not(models, tmp_path, monkeypatch, form):
    def read_slowly(place):
        time.sleep(0.05)  # as a large matrix would, so that most kills fall between the first byte and the last
        return read_tensor(place)

    monkeypatch.setattr(task_vector, "read_tensor", read_slowly)
    options = ["--format", form, "--language", "hi", "--overwrite"]

    def run(out: Path, kill_after: float | None = None, *more: str) -> float:
        return run_in_child(steer, words(models, out / "m", *options, *more), kill_after)

    run(tmp_path / "older", None, "--scaling_factor", "1")
    seconds = run(tmp_path / "whole")
    expected, older = (contents(tmp_path / name / "m") for name in ("whole", "older"))
    draw, stages = random.Random(0), set()
    for index in range(12):
        out = tmp_path / str(index)
        if index % 2:
            shutil.copytree(tmp_path / "older" / "m", out / "m")
        run(out, kill_after=draw.uniform(0, seconds))
        stages.add(len(list(out.glob(".m.*.tmp"))))
        if (out / "m").exists():
            assert contents(out / "m") in (expected, older)
        run(out)
        assert contents(out / "m") == expected
        assert [path.name for path in out.iterdir()] == ["m"]
    assert len(stages) > 1  # some were killed while they wrote, some before or after
