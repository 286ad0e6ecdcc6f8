"""Fixtures that several test files share: tiny checkpoints, the checking kit beside the repository."""

import itertools
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
import torch
from fake_endpoint import KEY, FakeEndpoint
from nbclient import NotebookClient
from tiny_models import save_tiny_model
from tqdm import tqdm

from soteria import cli
from soteria.models.loading import LoadedModel, load_model
from soteria.models.processes import Processes
from soteria.models.tensors import load_tensor
from soteria.scoring.run import DatasetRun, ScoringSettings, score_runs
from soteria.storage import paths

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"

# Threads waiting for one another make tiny tensors a hundred times slower on a busy machine.
torch.set_num_threads(1)
# A shell that runs them in the background has them ignore Ctrl-C, which some tests send.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def run_script(monkeypatch) -> Callable[..., int]:
    """`run_script(module, *arguments)`: run a script's `main` as the command line does; gives the exit status."""

    def run(script, *arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, arguments)])
        try:
            cli.run(script.main)
        except SystemExit as end:
            return end.code
        return 0

    return run


def _main_in_child(script, arguments: list[str]) -> None:
    tqdm.set_lock(threading.RLock())  # tqdm's own lock is shared among forks, and a killed one never releases it
    sys.argv, sys.stderr = [f"{script.__name__}.py", *arguments], Path(os.devnull).open("w")  # noqa: SIM115
    sys.stdout = sys.stderr
    cli.run(script.main)


def run_in_child(
    script, arguments: list[str], kill_after: float | None = None, kill_when: Callable | None = None
) -> float:
    """Run a script's `main` in a process of its own; gives the seconds it took.

    It is ended by SIGKILL after so many seconds, or when `kill_when(process)` returns.

    The process is forked and has torch loaded: most of its time is then the work, where the kills are to fall.
    """
    child = multiprocessing.get_context("fork").Process(target=_main_in_child, args=(script, arguments))
    started = time.monotonic()
    child.start()
    if kill_when:
        kill_when(child)
    child.join(0 if kill_when else kill_after)
    if child.is_alive():
        child.kill()
        child.join()
    else:
        assert child.exitcode == 0
    return time.monotonic() - started


def run_at_once(script, *every: list[str]) -> None:
    """Run a script's `main` with each of several argument lists, all at the same time, to a successful end."""
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=_main_in_child, args=(script, list(map(str, words)))) for words in every]
    for child in children:
        child.start()
    for child in children:
        child.join(120)
    assert [child.exitcode for child in children] == [0] * len(children)


def named_by(source: str, folder: Path) -> list[Path]:
    """The files in a folder that a table's source names, its braces expanded as a shell does."""
    choices = [part[1:-1].split(",") if part.startswith("{") else [part] for part in source.split("/")]
    return [path for parts in itertools.product(*choices) if (path := folder.joinpath(*parts)).exists()]


def shown_by(notebook: Path) -> list[dict]:
    """Run a notebook from top to bottom; gives what its cells showed, by kind of content."""
    cells = nbformat.read(notebook, as_version=4)
    NotebookClient(cells, timeout=300, resources={"metadata": {"path": str(notebook.parent)}}).execute()
    return [output.get("data", {}) for cell in cells.cells for output in cell.get("outputs", [])]


@pytest.fixture
def endpoint(monkeypatch) -> Callable[..., FakeEndpoint]:
    """`endpoint(reply, **options)` starts a fake endpoint that the openai client's own variables lead to."""
    started = []
    monkeypatch.delenv("AZURE_OPENAI_ENDPOINT", raising=False)

    def start(reply, **options) -> FakeEndpoint:
        started.append(FakeEndpoint(reply, **options))
        monkeypatch.setenv("OPENAI_BASE_URL", f"{started[-1].address}/v1")
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        return started[-1]

    yield start
    for one in started:
        one.shutdown()
        one.server_close()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of checks that lies beside a checkout, or a skip where there is none."""
    if not SHARED.is_dir():
        pytest.skip(f"no folder {SHARED}: the parity kit and the published head lists lie there")
    return SHARED


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Callable[..., Path]:
    """`tiny_folder(architecture, **options of save_tiny_model)`: a checkpoint's folder, written once a session."""
    folders: dict[tuple, Path] = {}

    def folder(architecture: str, **options) -> Path:
        key = (architecture, repr(sorted(options.items())))
        if key not in folders:
            folders[key] = save_tiny_model(tmp_path_factory.mktemp(architecture), architecture, **options)
        return folders[key]

    return folder


@pytest.fixture(scope="session")
def tiny_loaded(tiny_folder) -> Callable[..., LoadedModel]:
    """`tiny_loaded(architecture, **options of save_tiny_model)`: the same, loaded in float32 on the CPU."""
    loaded: dict[Path, LoadedModel] = {}

    def load(architecture: str, **options) -> LoadedModel:
        folder = tiny_folder(architecture, **options)
        if folder not in loaded:
            loaded[folder] = load_model(str(folder), "cpu", "float32")
        return loaded[folder]

    return load


def shipped(loaded, root: Path, dataset: str, *, data: Path = paths.DATA / "icl", **options):
    """Effects and means as `compute_indirect_effect.py` writes them, with the options that `oracle.score` takes."""
    options = {"n_shots": 3, "n_trials": 2, "dtype": "float32", **options}
    settings = ScoringSettings(model_name=loaded.name, root_data_dir=data, **options)
    run = DatasetRun(dataset, root, settings, model_sha256="")  # of a model that may lie nowhere
    score_runs([run], Processes("cpu"), lambda: loaded)
    return load_tensor(run.effect_file), load_tensor(run.means_file)
