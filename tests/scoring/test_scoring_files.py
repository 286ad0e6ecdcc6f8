"""What `compute_indirect_effect.py` leaves on the disk: names, shapes, and what a second run makes of them."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
import torch
from conftest import ROOT

import compute_indirect_effect
from soteria.models import loading as soteria_models
from soteria.scoring import indirect_effect as ie
from soteria.storage import files, paths

DATASETS = ("big_Hindi", "hot_Hindi", "hot_Tamil")
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


@pytest.mark.parametrize(
    ("last_token_only", "shape"),
    [
        ("True", (N_TRIALS, N_LAYERS, N_HEADS)),
        ("yes", (N_TRIALS, N_LAYERS, N_HEADS)),
        (None, (N_TRIALS, N_LAYERS, N_HEADS)),
        ("False", (N_TRIALS, N_LAYERS, N_HEADS, 10)),
        ("0", (N_TRIALS, N_LAYERS, N_HEADS, 10)),
    ],
)
def test_three_files_with_the_contracts_names_shapes_and_dtypes(last_token_only, shape, step_1, tmp_path):
    assert step_1("hot_Hindi", last_token_only=last_token_only) == 0
    folder = tmp_path / "out" / "hot_Hindi"
    assert sorted(path.name for path in folder.iterdir()) == [
        "hot_Hindi_indirect_effect.pt",
        "hot_Hindi_mean_head_activations.pt",
        "indirect_effect_args.txt",
    ]
    effects = torch.load(folder / "hot_Hindi_indirect_effect.pt", weights_only=True)
    means = torch.load(folder / "hot_Hindi_mean_head_activations.pt", weights_only=True)
    assert effects.dtype == means.dtype == torch.float32
    assert effects.shape == shape
    assert means.shape == (N_LAYERS, N_HEADS, N_SLOTS, HEAD_DIM)


def test_arguments_file_says_how_the_scores_were_made(step_1, tmp_path, tiny_folder):
    step_1("hot_Hindi", seed=5)
    said = json.loads((tmp_path / "out" / "hot_Hindi" / "indirect_effect_args.txt").read_text(encoding="utf-8"))
    assert said["dataset_name"] == "hot_Hindi" and said["model_name"] == str(tiny_folder("llama"))
    assert (said["seed"], said["n_shots"], said["n_trials"], said["test_split"]) == (5, N_SHOTS, N_TRIALS, 0.3)
    assert said["last_token_only"] is True
    assert said["prefixes"]["input"] == "Q:" and said["separators"]["output"] == "\n\n"
    assert said["device"] == "cpu" and said["dtype"] == "auto" and said["model_dtype"] == "float32"
    assert said["versions"]["torch"] == torch.__version__ and said["seconds"] >= 0


def test_half_precision_models_still_give_float32_files(step_1, tmp_path):
    assert step_1("hot_Hindi", dtype="bfloat16") == 0
    for path in (tmp_path / "out" / "hot_Hindi").glob("*.pt"):
        assert torch.load(path, weights_only=True).dtype == torch.float32
    said = files.read_json(tmp_path / "out" / "hot_Hindi" / "indirect_effect_args.txt")
    assert said["model_dtype"] == "bfloat16"


def test_scores_go_under_the_models_slug_by_default(step_1, tmp_path, monkeypatch, tiny_folder):
    monkeypatch.setattr(paths, "RESULTS", tmp_path / "results")
    assert step_1("hot_Hindi", save_path_root=None) == 0
    slug = tiny_folder("llama").name
    assert (tmp_path / "results" / "indirect_effect" / slug / "hot_Hindi" / "hot_Hindi_indirect_effect.pt").exists()


def test_the_same_command_gives_the_same_bytes(step_1, tmp_path):
    step_1("hot_Hindi", save_path_root=tmp_path / "one")
    step_1("hot_Hindi", save_path_root=tmp_path / "two")
    assert tensors(tmp_path / "one") == tensors(tmp_path / "two") != {}


def test_a_glob_scores_its_datasets_with_one_load(step_1, tmp_path, monkeypatch):
    loads, load = [], soteria_models.load_model
    monkeypatch.setattr(soteria_models, "load_model", lambda *given: loads.append(given) or load(*given))
    assert step_1("*_Hindi") == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["big_Hindi", "hot_Hindi"]
    assert len(loads) == 1


def test_a_dataset_scores_the_same_alone_and_after_another(step_1, tmp_path):
    step_1("hot_Hindi", save_path_root=tmp_path / "alone")
    step_1("big_Hindi", "hot_Hindi", save_path_root=tmp_path / "both")
    assert tensors(tmp_path / "alone" / "hot_Hindi") == tensors(tmp_path / "both" / "hot_Hindi") != {}


def test_a_finished_dataset_is_skipped_untouched_and_no_model_is_loaded(step_1, tmp_path, monkeypatch, capsys):
    step_1("hot_Hindi")
    before = contents(tmp_path)
    monkeypatch.setattr(soteria_models, "load_model", lambda *_: pytest.fail("loaded a model"))
    assert step_1("hot_Hindi") == 0
    assert contents(tmp_path) == before
    assert "1 of 1 datasets are finished already" in capsys.readouterr().out


def test_only_the_unfinished_of_several_datasets_are_scored(step_1, tmp_path):
    step_1("hot_Hindi")
    before = contents(tmp_path / "out" / "hot_Hindi")
    assert step_1("hot_*") == 0
    assert contents(tmp_path / "out" / "hot_Hindi") == before
    assert len(tensors(tmp_path / "out" / "hot_Tamil")) == 2


@pytest.mark.parametrize(
    "changed", [{"seed": 1}, {"n_trials": 2}, {"last_token_only": "no"}, {"dtype": "bfloat16"}, {"prefixes": "{}"}]
)
def test_a_changed_argument_is_refused_and_nothing_overwritten(changed, step_1, tmp_path, capsys):
    step_1("hot_Hindi")
    before = contents(tmp_path)
    assert step_1("hot_Hindi", **changed) == 2
    error = capsys.readouterr().err
    (name,) = changed
    assert f"was made with {name} " in error and "--save_path_root" in error and error.count("\n") == 1
    assert contents(tmp_path) == before


def test_changed_data_is_refused(step_1, tmp_path, data, capsys):
    own = tmp_path / "icl"
    own.mkdir()
    rows = json.loads((data / "hot_Hindi.json").read_text())
    files.write_json(own / "hot_Hindi.json", rows)
    assert step_1("hot_Hindi", root_data_dir=own) == 0
    files.write_json(own / "hot_Hindi.json", rows[1:])
    assert step_1("hot_Hindi", root_data_dir=own) == 2
    assert "was made with data_sha256" in capsys.readouterr().err


@pytest.mark.parametrize("broken", [None, "{"])
def test_scores_without_readable_arguments_are_refused_and_kept(broken, step_1, tmp_path, capsys):
    step_1("hot_Hindi")
    arguments = tmp_path / "out" / "hot_Hindi" / "indirect_effect_args.txt"
    arguments.unlink() if broken is None else arguments.write_text(broken)
    before = contents(tmp_path)
    assert step_1("hot_Hindi") == 2
    assert "no readable indirect_effect_args.txt" in capsys.readouterr().err
    assert contents(tmp_path) == before


@pytest.mark.parametrize("last_token_only", ["True", "False"])
def test_an_interrupted_run_goes_on_and_ends_with_the_same_bytes(
    last_token_only, step_1, tmp_path, monkeypatch, capsys
):
    step_1("hot_Hindi", save_path_root=tmp_path / "whole", last_token_only=last_token_only)
    with monkeypatch.context() as context:
        interrupt_after(1, context, "indirect_effects")
        assert step_1("hot_Hindi", last_token_only=last_token_only) == 130
    folder = tmp_path / "out" / "hot_Hindi"
    partial = folder / "hot_Hindi_indirect_effect.partial.pt"
    assert len(torch.load(partial, weights_only=True)) == 1
    assert not (folder / "hot_Hindi_indirect_effect.pt").exists()
    assert "Traceback" not in capsys.readouterr().err

    interrupt_after(N_TRIALS - 1, monkeypatch, "indirect_effects")  # a run from the start would need one prompt more
    assert step_1("hot_Hindi", last_token_only=last_token_only) == 0
    assert tensors(tmp_path / "out") == tensors(tmp_path / "whole") != {}


def test_a_partial_run_is_not_added_to_with_other_arguments(step_1, tmp_path, monkeypatch):
    with monkeypatch.context() as context:
        interrupt_after(1, context, "indirect_effects")
        step_1("hot_Hindi")
    before = contents(tmp_path)
    assert step_1("hot_Hindi", seed=1) == 2
    assert contents(tmp_path) == before


def test_an_interruption_before_the_first_score_leaves_nothing_to_refuse(step_1, tmp_path, monkeypatch):
    with monkeypatch.context() as context:
        interrupt_after(0, context, "head_activations")
        assert step_1("hot_Hindi", seed=1) == 130
    assert step_1("hot_Hindi") == 0


def test_a_run_killed_before_its_partial_file_was_removed_is_finished_by_the_next(step_1, tmp_path):
    step_1("hot_Hindi")
    folder = tmp_path / "out" / "hot_Hindi"
    before = tensors(folder)
    partial = folder / "hot_Hindi_indirect_effect.partial.pt"
    partial.write_bytes((folder / "hot_Hindi_indirect_effect.pt").read_bytes())
    assert step_1("hot_Hindi") == 0
    assert tensors(folder) == before  # the partial file is gone


def test_given_means_are_used_and_copied(step_1, tmp_path):
    step_1("hot_Hindi", save_path_root=tmp_path / "first")
    means = tmp_path / "first" / "hot_Hindi" / "hot_Hindi_mean_head_activations.pt"
    assert step_1("hot_Hindi", mean_activations_path=means) == 0
    assert (tmp_path / "out" / "hot_Hindi" / means.name).read_bytes() == means.read_bytes()


def test_given_means_of_another_shape_are_refused_and_the_next_try_is_free(step_1, tmp_path, capsys):
    means = tmp_path / "means.pt"
    torch.save(torch.zeros(1, 2, 3, 4), means)
    assert step_1("hot_Hindi", mean_activations_path=means) == 2
    assert "shape (1, 2, 3, 4), the model needs" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert step_1("hot_Hindi") == 0


@pytest.mark.parametrize(
    ("datasets", "options", "said"),
    [
        (["cold_Hindi"], {}, "no dataset 'cold_Hindi'"),
        (["hot_Hindi", "*_Thai"], {}, "no dataset '*_Thai'"),
        (["hot_Hindi"], {"root_data_dir": "nowhere"}, "no folder nowhere"),
        (["hot_Hindi"], {"model_name": "nowhere/at-all"}, "nowhere/at-all"),
        (["hot_Hindi"], {"device": "cuda:99"}, "cuda:99"),
        (["hot_Hindi"], {"n_shots": 17}, "--n_shots 17 is more than the 16 training rows"),
        (["hot_Hindi"], {"n_shots": 0}, "0 is below 1"),
        (["hot_Hindi"], {"test_split": 1.5}, "--test_split 1.5"),
        (["hot_Hindi"], {"seed": -1}, "--seed -1"),
        (["hot_Hindi"], {"last_token_only": "Falsch"}, "'Falsch' is not one of True, False"),
        (["hot_Hindi"], {"mean_activations_path": "none.pt"}, "no file none.pt"),
        (["hot_Hindi"], {"prefixes": "[]"}, "--prefixes"),
    ],
)
def test_bad_input_ends_with_one_sentence_and_status_2(datasets, options, said, step_1, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert step_1(*datasets, **options) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error
    assert not contents(tmp_path)


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
