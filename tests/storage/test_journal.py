"""Journals: what a killed run wrote is found again, and one process at a time writes."""

import errno
import multiprocessing
import time
from pathlib import Path

import pytest

from soteria.storage import files
from soteria.storage.journal import Journal

ROWS = {0: 'a\nb\r"c"', 7: {"क": [1.5, None]}, 3: "\u2028"}


def test_a_journal_cut_at_any_byte_gives_the_rows_before_the_cut_and_can_be_continued(tmp_path):
    with Journal(tmp_path / "sub" / "j", {"a": 1}) as journal:
        journal.add(ROWS)
        whole = journal.path.read_bytes()  # on disk already
    for cut in range(len(whole) + 1):
        journal.path.write_bytes(whole[:cut])
        rows = list(ROWS.items())[: max(0, whole[:cut].count(b"\n") - 1)]
        with Journal(journal.path, {"a": 1}) as again:
            assert again.done == dict(rows)
            again.add({99: "more"})
        assert Journal(journal.path, {"a": 1}).done == again.done == dict(rows) | {99: "more"}


def test_nothing_counts_from_a_broken_line_on_or_under_other_settings(tmp_path):
    for line in (b"nonsense\n", b"3\n", b"[1]\n", b"[[], 1]\n", b"\xff\n"):
        (tmp_path / "j").write_bytes(b'{"a": 1}\n[0, "x"]\n' + line + b'[1, "y"]\n')
        with Journal(tmp_path / "j", {"a": 1}) as journal:
            assert journal.done == {0: "x"}
    assert (tmp_path / "j").read_bytes() == b'{"a": 1}\n[0, "x"]\n'
    with Journal(tmp_path / "j", {"a": 2}) as journal:
        assert journal.done == {}
    assert not list(tmp_path.iterdir())  # a journal without rows is removed


def hold(path: Path, entered, go_on) -> None:
    with Journal(path, {}) as journal:
        journal.add({0: "theirs"})
        entered.set()
        go_on.wait(60)
        journal.remove()
        time.sleep(0.2)  # removed, but still locked


@pytest.mark.parametrize("ending", ["removed", "killed"])
def test_a_second_process_waits_says_so_and_writes_to_the_file_that_stays(tmp_path, ending, monkeypatch, capsys):
    fork = multiprocessing.get_context("fork")
    entered, go_on = fork.Event(), fork.Event()
    child = fork.Process(target=hold, args=(tmp_path / "j", entered, go_on), daemon=True)
    child.start()
    assert entered.wait(60)
    lock_descriptor = files.lock_descriptor

    def lock(descriptor, *, blocking=True):
        if blocking:  # only now is it known that we wait
            assert str(tmp_path / "j") in capsys.readouterr().err
            go_on.set() if ending == "removed" else child.kill()
        return lock_descriptor(descriptor, blocking=blocking)

    monkeypatch.setattr(files, "lock_descriptor", lock)
    with Journal(tmp_path / "j", {}) as journal:
        assert journal.done == ({} if ending == "removed" else {0: "theirs"})
        journal.add({1: "ours"})
    child.join()
    assert Journal(tmp_path / "j", {}).done == journal.done
    assert [path.name for path in tmp_path.iterdir()] == ["j"]


def test_a_file_system_without_locks_has_journals_too(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("fcntl.flock", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOLCK, "no locks")))
    with Journal(tmp_path / "j", {}) as journal:
        journal.add({0: "x"})
    assert Journal(tmp_path / "j", {}).done == {0: "x"} and not capsys.readouterr().err
