"""What scripts may write over, and journals beside files of the user's."""

import pytest

from soteria.errors import UserError
from soteria.scoring.heads import read_heads, write_heads
from soteria.storage import outputs
from soteria.storage.journal import Journal


def test_only_a_csv_with_facts_of_its_kind_is_written_over(tmp_path):
    csv, facts = tmp_path / "a.csv", tmp_path / "a.json"
    outputs.check_csv(csv, "columns")
    csv.write_text("mine")
    for text in (None, "[1]", "{", '{"inputs_sha256": ""}'):
        if text:
            facts.write_text(text)
        with pytest.raises(UserError, match="another --output"):
            outputs.check_csv(csv, "columns")
    facts.write_text('{"columns": {}}')
    outputs.check_csv(csv, "columns", [None, tmp_path / "missing.csv"])
    for read in (csv, facts):
        with pytest.raises(UserError, match="that this command reads"):
            outputs.check_csv(csv, "columns", [read])


def test_a_folder_is_ours_by_its_facts_or_if_it_holds_only_what_killed_runs_leave(tmp_path):
    folder = tmp_path / "out.partial"
    for name in (None, ".settings.json.1a2b.tmp", "checkpoint-3"):
        (folder / (name or "")).mkdir(parents=True)
        outputs.check_folder(folder, "key", "a run", "settings.json", ["checkpoint-*"])
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is not a run"):
        outputs.check_folder(folder, "key", "a run", "settings.json", ["checkpoint-*"])
    (folder / "settings.json").write_text('{"key": 1}')
    outputs.check_folder(folder, "key", "a run", "settings.json", ["checkpoint-*"])


def test_a_head_list_is_replaced_if_this_project_wrote_it_and_nobody_has_changed_it(tmp_path):
    path = tmp_path / "heads" / "Hindi_Heads.json"
    for heads in ([(0, 1)], [(2, 1), (0, 0)]):
        write_heads(path, heads)
        assert read_heads(path) == heads
    for text in ("[[7, 7]]", "notes"):
        path.write_text(text)
        with pytest.raises(UserError, match="another --head_folder"):
            write_heads(path, [(0, 1)])
        assert path.read_text() == text


@pytest.mark.parametrize("is_link", [True, False], ids=["through a link", "itself"])
def test_another_file_at_a_journals_name_is_not_cut_off(is_link, tmp_path):
    mine, place = tmp_path / "mine.txt", tmp_path / ".a.csv.journal"
    target = mine if is_link else place
    target.write_text("years of work")
    if is_link:
        place.symlink_to(mine)
    with pytest.raises(UserError, match=r"\.a\.csv\.journal"), Journal(place, {"a": 1}):
        pass
    assert target.read_text() == "years of work"
