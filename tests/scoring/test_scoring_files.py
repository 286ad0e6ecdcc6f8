"""The files of `compute_indirect_effect.py`: names and shapes, and how a second run skips, resumes, or refuses them."""

import hashlib
import multiprocessing
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
import safetensors.torch
import torch
from conftest import ROOT, run_at_once

import compute_indirect_effect
import select_heads
from soteria.errors import UserError
from soteria.models import loading as soteria_models
from soteria.models.tensors import load_tensor, save_tensor
from soteria.scoring import indirect_effect as ie
from soteria.scoring.heads import mean_effect
from soteria.scoring.notes import CANNOT_MEAN, MIXES, ambiguous_datasets
from soteria.scoring.prompts import expand_datasets
from soteria.scoring.run import DatasetRun, ScoringSettings
from soteria.storage import files, paths
from soteria.storage.paths import effect_path

DATASETS = ("big_Hindi", "hot_Hindi", "hot_Tamil")
EFFECT, MEANS = "hot_Hindi_indirect_effect.pt", "hot_Hindi_mean_head_activations.pt"
N_LAYERS, N_HEADS, HEAD_DIM = 3, 4, 8
N_SHOTS, N_TRIALS = 2, 3
# <s>, an example's 9 tokens (Q : a \n A : a \n \n), the query's 6
N_SLOTS = 1 + N_SHOTS * 9 + 6


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("icl")
    for dataset in DATASETS:
        word = dataset.partition("_")[0]
        rows = [{"input": f"{word} {i}", "output": f"{'yes' if i % 3 else 'no'} {word}"} for i in range(24)]
        files.write_json(folder / f"{dataset}.json", rows)
    return folder


@pytest.fixture
def step_1(data, tiny_folder, tmp_path, monkeypatch, run_script) -> Callable[..., int]:
    """Run the command in this process, from another folder, writing to `tmp_path`; gives the exit status."""
    model = tiny_folder("llama")
    monkeypatch.chdir(tmp_path)

    def run(*dataset_names: str, **options) -> int:
        given = {
            "model_name": model,
            "root_data_dir": data,
            "save_path_root": tmp_path / "out",
            "n_shots": N_SHOTS,
            "n_trials": N_TRIALS,
            "device": "cpu",
            **options,
        }
        words = [word for name, value in given.items() if value is not None for word in (f"--{name}", str(value))]
        return run_script(compute_indirect_effect, "--dataset_name", *dataset_names, *words)

    return run


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Bytes and modification time of every file under a folder."""
    found = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in found}


def tensors(folder: Path) -> dict[str, bytes]:
    return {name: content for name, (content, _) in contents(folder).items() if name.endswith(".pt")}


def interrupt_after(prompts: int, monkeypatch, function: str) -> None:
    """Ctrl-C when the scoring function is called once more than `prompts` times."""
    true_function, calls = getattr(ie, function), []

    def interrupted(*args, **kwargs):
        if len(calls) == prompts:
            raise KeyboardInterrupt
        calls.append(1)
        return true_function(*args, **kwargs)

    monkeypatch.setattr(ie, function, interrupted)


def facts(folder: Path) -> dict:
    return files.read_facts(folder / "indirect_effect_args.txt")


@pytest.mark.parametrize("classes", [(), (10,)], ids=["last-token", "all-classes"])
def test_three_files_with_the_contracts_names_shapes_dtypes_and_arguments(classes, step_1, tmp_path, tiny_folder):
    """float32 for a model in half precision too, and the same bytes each time."""
    for root in ("out", "again"):
        options = {"last_token_only": "False", "dtype": "bfloat16", "seed": 5} if classes else {}
        assert step_1("hot_Hindi", save_path_root=tmp_path / root, **options) == 0
    folder = tmp_path / "out" / "hot_Hindi"
    assert {path.name for path in folder.iterdir()} == {EFFECT, MEANS, "indirect_effect_args.txt"}
    effects, means = (torch.load(folder / name, weights_only=True) for name in (EFFECT, MEANS))
    assert effects.dtype == means.dtype == torch.float32
    assert effects.shape == (N_TRIALS, N_LAYERS, N_HEADS, *classes)
    assert means.shape == (N_LAYERS, N_HEADS, N_SLOTS, HEAD_DIM)
    assert tensors(tmp_path / "out") == tensors(tmp_path / "again")
    said = facts(folder)
    assert said["dataset_name"] == "hot_Hindi" and said["model_name"] == str(tiny_folder("llama"))
    assert (said["n_shots"], said["n_trials"], said["test_split"]) == (N_SHOTS, N_TRIALS, 0.3)
    assert said["last_token_only"] is not bool(classes) and said["seed"] == (5 if classes else 42)
    assert said["prefixes"]["input"] == "Q:" and said["separators"]["output"] == "\n\n"
    dtypes = ("bfloat16", "bfloat16") if classes else ("auto", "float32")
    assert said["device"] == "cpu" and (said["dtype"], said["model_dtype"]) == dtypes
    assert said["versions"]["torch"] == torch.__version__ and said["seconds"] >= 0


def test_the_settings_beside_scores_do_not_say_where_the_repository_lies(tmp_path):
    run = DatasetRun("ag_news_Hindi", tmp_path, ScoringSettings(), "hash")
    assert run.described["root_data_dir"] == "data/icl" and str(paths.ROOT) not in str(run.described)


def test_the_settings_beside_scores_name_no_other_folder_of_the_machine_and_decide_by_hashes(
    step_1, tiny_folder, data, tmp_path
):
    assert step_1("hot_Hindi", save_path_root=tmp_path / "first") == 0
    (tmp_path / "given").mkdir()
    given = shutil.copy(tmp_path / "first" / "hot_Hindi" / MEANS, tmp_path / "given" / "means.pt")
    assert step_1("hot_Hindi", mean_activations_path=given) == 0
    assert not [text for text in map(str, facts(tmp_path / "out" / "hot_Hindi").values()) if str(tmp_path) in text]
    before, moved = contents(tmp_path / "out"), tmp_path / "moved"
    shutil.copytree(tiny_folder("llama"), moved / "model")
    given = shutil.move(given, moved)
    options = {"model_name": moved / "model", "root_data_dir": shutil.copytree(data, moved / "icl")}
    assert step_1("hot_Hindi", **options, mean_activations_path=given) == 0 and contents(tmp_path / "out") == before
    save_tensor(load_tensor(Path(given)) + 1, Path(given))  # under the same name
    assert step_1("hot_Hindi", **options, mean_activations_path=given) == 2
    assert step_1("hot_Hindi", **options) == 2 and contents(tmp_path / "out") == before


def test_scores_go_under_the_models_slug_by_default_and_those_of_whole_answers_beside(
    step_1, tmp_path, monkeypatch, tiny_folder
):
    monkeypatch.setattr(paths, "RESULTS", tmp_path / "results")
    assert step_1("hot_Hindi", save_path_root=None) == 0
    assert step_1("hot_Hindi", save_path_root=None, answer="whole") == 0
    slug, root = tiny_folder("llama").name, tmp_path / "results" / "indirect_effect"
    first, whole = (root / name / "hot_Hindi" for name in (slug, f"{slug}_whole"))
    assert (facts(first)["answer"], facts(whole)["answer"]) == ("first", "whole")
    assert (first / MEANS).read_bytes() == (whole / MEANS).read_bytes()
    assert (first / EFFECT).read_bytes() != (whole / EFFECT).read_bytes()
    assert not (load_tensor(first / EFFECT) == load_tensor(whole / EFFECT)).any()


def test_answers_that_share_a_first_token_are_counted_and_warned_of(step_1, tmp_path, run_script, capsys):
    icl = tmp_path / "icl"
    for dataset, outputs in {"one_Hindi": ("no no", "no yes"), "two_Hindi": ("no no", "no yes", "yes")}.items():
        rows = [{"input": str(i), "output": outputs[i % len(outputs)]} for i in range(24)]
        files.write_json(icl / f"{dataset}.json", rows)
    assert step_1("*_Hindi", root_data_dir=icl) == 0
    one, two, _ = capsys.readouterr().out.splitlines()
    assert one.startswith("one_Hindi: 2 different answers, 1 different first tokens; warning")
    assert "cannot mean the task" in one and "--answer whole" in one
    assert two.startswith("two_Hindi: 3 different answers, 2 different first tokens; warning")
    assert "cannot" not in two and "--answer whole" in two
    assert facts(tmp_path / "out" / "one_Hindi")["query_answers"] == {"answers": 2, "first_tokens": 1}
    meanings = {"one_Hindi": CANNOT_MEAN, "two_Hindi": MIXES}
    assert ambiguous_datasets(tmp_path / "out", ["one_Hindi", "two_Hindi", "hot_Hindi"]) == meanings
    selected = ["--results", tmp_path / "out", "--language", "Hindi", "--tasks", "one", "two", "--head_folder", "mine"]
    assert run_script(select_heads, *selected, "--heads_root", tmp_path / "heads") == 0
    assert capsys.readouterr().out.splitlines()[1:] == [one, two]
    assert step_1("one_Hindi", root_data_dir=icl, save_path_root=tmp_path / "whole", answer="whole") == 0
    assert "one_Hindi: 2 different answers, 1 different first tokens\n" in capsys.readouterr().out
    shutil.copytree(tmp_path / "whole" / "one_Hindi", tmp_path / "out" / "one_Hindi", dirs_exist_ok=True)
    with pytest.raises(UserError, match="do not mix"):
        mean_effect(tmp_path / "out", "Hindi", ["one", "two"])
    assert step_1("hot_Hindi", save_path_root=tmp_path / "plain") == 0
    assert "warning" not in capsys.readouterr().out and not ambiguous_datasets(tmp_path / "plain", ["hot_Hindi"])


def test_a_glob_scores_the_unfinished_datasets_with_one_load_as_each_alone(step_1, tmp_path, monkeypatch, capsys):
    loads, load = [], soteria_models.load_model
    step_1("hot_Hindi", save_path_root=tmp_path / "alone")
    step_1("big_Hindi")
    finished = contents(tmp_path / "out")
    monkeypatch.setattr(soteria_models, "load_model", lambda *given: loads.append(given) or load(*given))
    assert step_1("*_*") == 0
    assert len(loads) == 1
    assert {path.name for path in (tmp_path / "out").iterdir()} == set(DATASETS)
    everything = contents(tmp_path / "out")
    assert finished.items() <= everything.items()
    assert tensors(tmp_path / "out" / "hot_Hindi") == tensors(tmp_path / "alone" / "hot_Hindi") != {}
    capsys.readouterr()
    assert step_1("*_*") == 0
    assert "3 of 3 datasets are finished already" in capsys.readouterr().out
    assert len(loads) == 1 and contents(tmp_path / "out") == everything


def test_a_datasets_own_name_is_not_a_glob(tmp_path):
    for name in ("a[1]_Hindi", "a1_Hindi"):
        (tmp_path / f"{name}.json").touch()
    assert expand_datasets(["a[1]_Hindi"], tmp_path) == ["a[1]_Hindi"]
    assert expand_datasets(["a[0-9]_*"], tmp_path) == ["a1_Hindi"]


def test_changed_arguments_or_data_are_refused_and_nothing_overwritten(
    step_1, tmp_path, data, tiny_folder, monkeypatch, capsys
):
    step_1("hot_Hindi")
    with monkeypatch.context() as context:
        interrupt_after(1, context, "indirect_effects")
        assert step_1("hot_Tamil") == 130
    capsys.readouterr()
    moved = shutil.copytree(tiny_folder("llama"), tmp_path / "moved")
    assert step_1("hot_Hindi", model_name=moved) == 0  # the same weights at another path
    changed_data = tmp_path / "icl"
    shutil.copytree(data, changed_data)
    for dataset in ("hot_Hindi", "hot_Tamil"):
        files.write_json(changed_data / f"{dataset}.json", files.read_json(data / f"{dataset}.json")[1:])
    before = contents(tmp_path)
    for changed in (
        {"seed": 1},
        {"n_trials": 2},
        {"last_token_only": "no"},
        {"dtype": "bfloat16"},
        {"answer": "whole"},
        {"prefixes": "{}"},
        {"root_data_dir": changed_data},
    ):
        for dataset in ("hot_Hindi", "hot_Tamil"):
            assert step_1(dataset, **changed) == 2
            error = capsys.readouterr().err
            name = "data_sha256" if "root_data_dir" in changed else next(iter(changed))
            assert f"was made with {name} " in error and "--save_path_root" in error and error.count("\n") == 1
            assert contents(tmp_path) == before
    arguments = tmp_path / "out" / "hot_Hindi" / "indirect_effect_args.txt"
    for broken in ("{", None):
        arguments.unlink() if broken is None else arguments.write_text(broken)
        before = contents(tmp_path)
        assert step_1("hot_Hindi") == 2
        assert "but no readable indirect_effect_args.txt" in capsys.readouterr().err
        assert contents(tmp_path) == before


@pytest.mark.parametrize("last_token_only", ["True", "False"])
def test_an_interrupted_run_is_resumed_and_ends_with_the_same_bytes(
    last_token_only, step_1, tmp_path, monkeypatch, capsys
):
    with monkeypatch.context() as context:
        interrupt_after(0, context, "head_activations")
        assert step_1("hot_Hindi", seed=1) == 130  # before the first score: leaves nothing to refuse
    step_1("hot_Hindi", save_path_root=tmp_path / "whole", last_token_only=last_token_only)
    with monkeypatch.context() as context:
        interrupt_after(1, context, "indirect_effects")
        assert step_1("hot_Hindi", last_token_only=last_token_only) == 130
    folder = tmp_path / "out" / "hot_Hindi"
    partial = folder / "hot_Hindi_indirect_effect.partial.pt"
    assert len(torch.load(partial, weights_only=True)) == 1
    assert not (folder / EFFECT).exists()
    assert "Traceback" not in capsys.readouterr().err

    interrupt_after(N_TRIALS - 1, monkeypatch, "indirect_effects")  # a run from the start would need one prompt more
    assert step_1("hot_Hindi", last_token_only=last_token_only) == 0
    assert tensors(tmp_path / "out") == tensors(tmp_path / "whole") != {}
    shutil.copy(folder / EFFECT, partial)  # as if killed before the partial file was removed
    assert step_1("hot_Hindi", last_token_only=last_token_only) == 0
    assert tensors(tmp_path / "out") == tensors(tmp_path / "whole")


def test_a_run_begun_in_another_dtype_is_not_gone_on_with(step_1, tmp_path, monkeypatch, capsys):
    """As where `auto` was a GPU's half precision: the settings are the same."""
    with monkeypatch.context() as context:
        interrupt_after(1, context, "indirect_effects")
        assert step_1("hot_Hindi") == 130
    begun, file = contents(tmp_path / "out"), tmp_path / "out" / "hot_Hindi" / "indirect_effect_args.txt"
    files.write_json(file, files.read_facts(file) | {"model_dtype": "bfloat16"})
    assert step_1("hot_Hindi") == 2
    assert "was begun in bfloat16, not float32; give --dtype bfloat16" in capsys.readouterr().err
    assert contents(tmp_path / "out").keys() == begun.keys()
    assert step_1("hot_Hindi", dtype="bfloat16") == 0


@pytest.mark.parametrize("n_scored", [1, N_TRIALS])
def test_a_folder_of_an_earlier_version_is_resumed_or_skipped(n_scored, step_1, data, tiny_folder, tmp_path):
    """Its arguments file is spelled out here: its keys and values must keep their meaning."""
    step_1("hot_Hindi", save_path_root=tmp_path / "whole")
    whole, folder = tmp_path / "whole" / "hot_Hindi", tmp_path / "out" / "hot_Hindi"
    folder.mkdir(parents=True)
    said = {
        "dataset_name": "hot_Hindi",
        "model_name": str(tiny_folder("llama")),
        "root_data_dir": str(data),
        "save_path_root": str(tmp_path / "out"),
        "seed": 42,
        "n_shots": N_SHOTS,
        "n_trials": N_TRIALS,
        "test_split": 0.3,
        "device": "cpu",
        "mean_activations_path": None,
        "last_token_only": True,
        "prefixes": {"input": "Q:", "output": "A:", "instructions": ""},
        "separators": {"input": "\n", "output": "\n\n", "instructions": ""},
        "max_rows": facts(whole)["max_rows"],
        "dtype": "auto",
        "data_sha256": hashlib.sha256((data / "hot_Hindi.json").read_bytes()).hexdigest(),
    }
    files.write_json(folder / "indirect_effect_args.txt", said)
    shutil.copy(whole / MEANS, folder)
    effects = load_tensor(whole / EFFECT)[:n_scored]
    kind = "" if n_scored == N_TRIALS else ".partial"
    save_tensor(effects, folder / f"hot_Hindi_indirect_effect{kind}.pt")
    before = contents(folder)
    is_whole = n_scored == N_TRIALS
    assert step_1("hot_Hindi") == (0 if is_whole else 2)
    assert contents(folder) == before  # a hash that is noted at the end would hold for the beginning too
    if not is_whole:
        return
    written = facts(folder)
    assert [name for name in written if name in said] == list(said) and said.items() <= written.items()


def test_what_an_earlier_run_left_counts_only_where_it_is_sound(step_1, tmp_path, capsys):
    assert step_1("hot_Hindi") == 0
    folder = tmp_path / "out" / "hot_Hindi"
    whole, effects, means = tensors(folder), load_tensor(folder / EFFECT), load_tensor(folder / MEANS)
    partial = folder / "hot_Hindi_indirect_effect.partial.pt"
    unsound = [
        torch.full_like(effects, torch.nan),
        effects.double(),
        effects[:, :2],
        effects[:0],
        effects.repeat(2, 1, 1),
        effects.to_sparse(),
        effects.to("meta"),
    ]
    for damage in unsound:
        (folder / EFFECT).unlink(missing_ok=True)
        save_tensor(damage, partial)
        save_tensor(means * torch.nan, folder / MEANS)
        assert step_1("hot_Hindi") == 0 and tensors(folder) == whole
    for damage in unsound:
        save_tensor(damage, folder / EFFECT)
        capsys.readouterr()
        assert step_1("hot_Hindi") == 0 and tensors(folder) == whole
        assert "damaged" in capsys.readouterr().err
    (folder / EFFECT).write_bytes((folder / EFFECT).read_bytes()[:-100])
    assert step_1("hot_Hindi") == 0 and tensors(folder) == whole


def test_scores_of_other_weights_under_the_same_name_are_refused(step_1, tiny_folder, tmp_path, capsys):
    model, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(tiny_folder("llama"), model)
    assert step_1("hot_Hindi", model_name=model) == 0
    given = out / "hot_Hindi" / MEANS
    before, weights = contents(out), model / "model.safetensors"
    tensors_of = {name: tensor + 0.01 for name, tensor in safetensors.torch.load_file(weights).items()}
    safetensors.torch.save_file(tensors_of, weights, metadata={"format": "pt"})
    assert step_1("hot_Hindi", model_name=model) == 2
    assert "had other weights" in capsys.readouterr().err and contents(out) == before
    elsewhere = {"model_name": model, "save_path_root": tmp_path / "more"}
    assert step_1("hot_Hindi", **elsewhere, mean_activations_path=given) == 2
    assert "of a model with other weights" in capsys.readouterr().err and not (tmp_path / "more").exists()
    for task, digest in {"a": "x", "b": "y"}.items():
        shutil.copytree(out / "hot_Hindi", tmp_path / "mixed" / f"{task}_Hindi", dirs_exist_ok=True)
        shutil.copy(out / "hot_Hindi" / EFFECT, effect_path(tmp_path / "mixed", f"{task}_Hindi"))
        noted = facts(out / "hot_Hindi") | {"model_sha256": digest, "dataset_name": f"{task}_Hindi"}
        files.write_json(tmp_path / "mixed" / f"{task}_Hindi" / "indirect_effect_args.txt", noted)
    for tasks, digest in ((["a", "b"], None), (["a"], "y")):
        with pytest.raises(UserError, match="has scores of Hindi of"):
            mean_effect(tmp_path / "mixed", "Hindi", tasks, digest)


def test_two_identical_runs_at_once_score_each_prompt_once_and_write_the_same(
    step_1, tmp_path, data, tiny_folder, monkeypatch
):
    assert step_1("hot_*", save_path_root=tmp_path / "one") == 0
    scored, count = ie.indirect_effects, multiprocessing.Value("i", 0)

    def counted(*given):
        with count.get_lock():
            count.value += 1
        return scored(*given)

    monkeypatch.setattr(ie, "indirect_effects", counted)
    words = [
        "--dataset_name",
        "hot_*",
        "--model_name",
        tiny_folder("llama"),
        "--root_data_dir",
        data,
        "--device",
        "cpu",
    ]
    words += ["--n_shots", N_SHOTS, "--n_trials", N_TRIALS, "--save_path_root", tmp_path / "two"]
    run_at_once(compute_indirect_effect, words, words)
    assert count.value == 2 * N_TRIALS  # of two datasets
    assert tensors(tmp_path / "two") == tensors(tmp_path / "one")
    assert not list((tmp_path / "two").rglob(".*"))


def test_given_means_are_used_and_copied_and_those_of_another_shape_or_not_finite_are_refused(step_1, tmp_path, capsys):
    means = tmp_path / "means.pt"
    torch.save(torch.zeros(1, 2, 3, 4), means)
    assert step_1("hot_Hindi", mean_activations_path=means) == 2
    assert "shape (1, 2, 3, 4), but the model needs" in capsys.readouterr().err
    for values in (torch.nan, torch.inf):
        save_tensor(torch.full((N_LAYERS, N_HEADS, N_SLOTS, HEAD_DIM), values), means)
        assert step_1("hot_Hindi", mean_activations_path=means) == 2
        assert "means.pt are not finite" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    save_tensor(torch.zeros(N_LAYERS, N_HEADS, N_SLOTS, HEAD_DIM), means)
    assert step_1("hot_Hindi", mean_activations_path=means) == 0
    assert (tmp_path / "out" / "hot_Hindi" / MEANS).read_bytes() == means.read_bytes()


@pytest.mark.parametrize("given", [False, True], ids=["model", "means"])
def test_numbers_that_are_not_finite_are_refused_and_leave_nothing(given, step_1, tiny_folder, tmp_path, capsys):
    """Only the first patched pass shows them, after the means were saved."""
    model, means = tmp_path / "model", tmp_path / "given.pt"
    shutil.copytree(tiny_folder("llama"), model)
    if given:
        save_tensor(torch.full((N_LAYERS, N_HEADS, N_SLOTS, HEAD_DIM), 3e38), means)
    else:
        weights = safetensors.torch.load_file(model / "model.safetensors")
        weights["lm_head.weight"] *= 1e38
        safetensors.torch.save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    assert step_1("hot_Hindi", model_name=model, mean_activations_path=means if given else None) == 2
    refused = capsys.readouterr().err
    assert "not finite on hot_Hindi in float32" in refused and "architecture" not in refused
    assert not (tmp_path / "out").exists()


def test_bad_input_ends_with_one_sentence_and_status_2(step_1, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for datasets, options, said in [
        (["cold_Hindi"], {}, "no dataset 'cold_Hindi'"),
        (["hot_Hindi", "*_Thai"], {}, "no dataset '*_Thai'"),
        (["hot_Hindi"], {"root_data_dir": "nowhere"}, "no folder nowhere"),
        (["hot_Hindi"], {"model_name": "nowhere/at-all"}, "nowhere/at-all"),
        (["hot_Hindi"], {"device": "cuda:99"}, "cuda:99"),
        (["hot_Hindi"], {"n_shots": 17}, "--n_shots 17 is more than the 16 training rows"),
        (["hot_Hindi"], {"n_shots": 0}, "must be a whole number >= 1"),
        (["hot_Hindi"], {"test_split": 1.5}, "--test_split 1.5 is not between 0 and 1; give"),
        (["hot_Hindi"], {"test_split": "nan"}, "--test_split nan is not between 0 and 1; give"),
        (["hot_Hindi"], {"test_split": 0.99}, "24 rows are too few for --test_split 0.99; give"),
        (["hot_Hindi"], {"seed": -1}, "argument --seed: '-1' must be a whole number >= 0, and at most 4,294,967,295"),
        (["hot_Hindi"], {"n_shots": 10**30}, "and at most 1,000"),
        (["hot_Hindi"], {"n_trials": 10**9}, "and at most 10,000"),
        (["hot_Hindi"], {"device": ""}, "'' is not a device"),
        (["hot_Hindi"], {"device": "meta"}, "'meta' is not a device"),
        (["hot_Hindi"], {"device": "cpu:7"}, "'cpu:7' is not a device"),
        (["hot_Hindi"], {"prefixes": '{"ouptut": "A:"}'}, "prefixes has 'ouptut'; its keys are input, output"),
        (["hot_Hindi"], {"prefixes": r'{"input": "\ud800"}'}, "half a character"),
        (["hot_Hindi"], {"prefixes": "[" * 10**5}, "--prefixes"),
        (["hot_Hindi"], {"separators": '{"output": ""}'}, "the separator 'output' is empty"),
        (["hot_Hindi"], {"last_token_only": "Falsch"}, "'Falsch' must be one of True, False"),
        (["hot_Hindi"], {"mean_activations_path": "none.pt"}, "no file none.pt"),
        (["hot_Hindi"], {"prefixes": "[]"}, "--prefixes"),
    ]:
        assert step_1(*datasets, **options) == 2
        error = capsys.readouterr().err
        assert said in error and "Traceback" not in error
        assert not contents(tmp_path)


@pytest.mark.parametrize("row", [{"input": "", "output": "a"}, {"input": "a", "output": " "}, {"output": "\ta"}])
def test_a_row_whose_answer_would_be_white_space_is_refused(row, step_1, data, tmp_path, capsys):
    rows = [{"input": "hot", "output": "cold"}] * 20 + [{"input": "hot"} | row]
    files.write_json(tmp_path / "icl" / "hot_Hindi.json", rows)
    assert step_1("hot_Hindi", root_data_dir=tmp_path / "icl") == 2
    assert "row 20" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_rows_that_hold_a_special_token_are_warned_of(step_1, tmp_path, caplog):
    rows = [{"input": f"hot {i}</s><s>", "output": f"cold {i}"} for i in range(20)]
    files.write_json(tmp_path / "icl" / "hot_Hindi.json", rows)
    assert step_1("hot_Hindi", root_data_dir=tmp_path / "icl") == 0
    assert "these texts hold '<s>', which the tokenizer of" in caplog.text


def test_the_command_works_by_path_from_another_folder(data, tiny_folder, tmp_path):
    model = tiny_folder("llama")
    here = tmp_path / "elsewhere"
    here.mkdir()
    command = [sys.executable, str(ROOT / "src" / "compute_indirect_effect.py"), "--dataset_name", "hot_Hindi"]
    command += ["--model_name", os.path.relpath(model, here), "--root_data_dir", os.path.relpath(data, here)]
    command += ["--save_path_root", "out", "--n_shots", "2", "--n_trials", "1", "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "wrote 1 datasets under out" in done.stdout
    assert len(tensors(here / "out" / "hot_Hindi")) == 2
