"""How scripts end: on full disks, closed pipes, and signals while they load and while they work."""

import errno
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from soteria import cli, disk
from soteria.errors import UserError
from soteria.models.tensors import Planned, save_tensor, write_tensors
from soteria.storage import files
from soteria.storage.journal import Journal

SRC = Path(__file__).resolve().parents[1] / "src"


def exit_status(main) -> int:
    with pytest.raises(SystemExit) as end:
        cli.run(main)
    return end.value.code


def fails(error: BaseException):
    def main() -> None:
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (UserError("a thing; mend it"), 2, "error: a thing; mend it\n"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), 2, "error: the disk is full; free"),
        (OSError(errno.EIO, "Input/output error"), 2, "error: a file cannot be read or written"),
        (PermissionError(errno.EACCES, "Permission denied", "x"), 2, "error: x cannot be used (Permission denied)"),
        (KeyboardInterrupt(), 130, "interrupted; "),
        (BrokenPipeError(), 141, ""),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_an_error_ends_a_script_with_its_status_and_one_sentence(error, status, said, capsys):
    assert exit_status(fails(error)) == status
    shown = capsys.readouterr().err
    assert shown.startswith(said) and shown.count("\n") == bool(said)


def test_a_fault_of_the_program_is_still_a_traceback():
    for error in (ValueError("a bug"), RuntimeError("a bug")):
        with pytest.raises(type(error)):
            cli.run(fails(error))


def test_sigterm_ends_a_script_with_143_after_it_cleaned_up(tmp_path, capsys):
    def main() -> None:
        with files.whole_file(tmp_path / "sub" / "a"):
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pause()

    before = signal.getsignal(signal.SIGTERM)
    assert exit_status(main) == 143
    assert capsys.readouterr().err.startswith("terminated; run") and not list(tmp_path.iterdir())
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_second_signal_does_not_interrupt_the_cleaning_up(tmp_path, capsys):
    def main() -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                os.kill(os.getpid(), number)
            (tmp_path / "cleaned").touch()

    assert exit_status(main) == 130 and (tmp_path / "cleaned").exists()
    assert capsys.readouterr().err.count("interrupted; run") == 1


@pytest.mark.parametrize(
    ("module", "said"),
    [
        ("raise ModuleNotFoundError('no', name='sklearn')", "error: the package sklearn is not installed; run `source"),
        ("raise ValueError('TQDM_NCOLS')", "error: the modules cannot be loaded (TQDM_NCOLS); check the environment"),
    ],
)
def test_modules_that_cannot_be_loaded_are_one_sentence(module, said, tmp_path):
    (tmp_path / "sklearn.py").write_text(module)
    command = [sys.executable, SRC / "compute_indirect_effect.py", "--help"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.returncode == 2 and ended.stderr.startswith(said) and ended.stderr.count("\n") == 1
    assert exit_status(fails(ModuleNotFoundError("no", name="sklearn"))) == 2


def test_python_without_docstrings_is_refused():
    command = [sys.executable, SRC / "select_heads.py", "--results", "x", "--language", "hi", "--head_folder", "x"]
    ended = subprocess.run(command, env=os.environ | {"PYTHONOPTIMIZE": "2"}, capture_output=True, text=True)
    assert ended.returncode == 2 and "PYTHONOPTIMIZE" in ended.stderr and ended.stderr.count("\n") == 1


def test_closed_streams_are_no_traceback_and_nothing_printed_gets_into_files(tmp_path):
    command = f"exec {sys.executable} {SRC / 'select_heads.py'}"
    for arguments, status in (("--help", 0), ("--results x --language hi --head_folder x", 2)):
        shell = ["bash", "-c", f"{command} {arguments} <&- >&- 2>{tmp_path / 'shown'}"]
        assert subprocess.run(shell, cwd=tmp_path).returncode == status
        assert "Traceback" not in (tmp_path / "shown").read_text()
        assert subprocess.run(["bash", "-c", f"{command} {arguments} <&- >&- 2>&-"], cwd=tmp_path).returncode == status


WRITES = {
    "tensor": lambda folder, big: save_tensor(big, folder / "a.pt"),
    "pickle": lambda folder, big: torch.save(big, folder / "b.pt"),
    "weights": lambda folder, big: write_tensors({"a": Planned(big.dtype, big.shape, lambda: big)}, folder / "c"),
    "safetensors": lambda folder, big: safetensors.torch.save_file({"a": big}, folder / "d"),
    "text": lambda folder, big: files.write_text(folder / "e", "x" * big.nbytes),
    "journal": lambda folder, big: Journal(folder / "f", {}).__enter__().add({0: "x" * big.nbytes}),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_a_disk_that_cannot_hold_a_file_is_called_full_whoever_writes(write, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**14, hard))
    try:
        with pytest.raises(Exception) as error:
            write(tmp_path, torch.zeros(2**16))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "the disk is full" in str(disk.explained(error.value))


def test_output_that_nobody_reads_or_that_has_no_room_is_no_traceback(monkeypatch):
    command = [sys.executable, SRC / "select_heads.py", "--help"]
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)  # argparse itself passes over what it cannot write at once
    reader, writer = os.pipe()
    os.close(reader)
    ended = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (141, "")
    if not Path("/dev/full").is_char_device():
        pytest.skip("no device that is always full")
    with Path("/dev/full").open("w") as full:
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert ended.returncode == 2 and ended.stderr.startswith("error: the output cannot be written (No space left")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_modules_load_ends_a_script_with_one_sentence(number, tmp_path):
    (tmp_path / "sklearn").mkdir()
    (tmp_path / "sklearn" / "__init__.py").write_text(
        f"import os, signal\nos.kill(os.getpid(), {number})\nsignal.pause()"
    )
    command = [sys.executable, SRC / "compute_indirect_effect.py", "--help"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert ended.returncode == 128 + number and not ended.stdout
    assert ended.stderr.endswith("; run the same command again to resume\n") and ended.stderr.count("\n") == 1
