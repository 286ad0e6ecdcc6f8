"""Step 2: heads ranked by their mean effect, the files of the lists, and the group rule."""

import json
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch

import select_heads
from soteria.errors import UserError
from soteria.languages import PAPER_LANGUAGES, group_languages
from soteria.models.tensors import save_tensor
from soteria.scoring import heads
from soteria.scoring.prompts import TASKS, TOKEN_CLASSES
from soteria.storage.paths import effect_path

GROUPS = {
    "High": ["English", "Spanish", "German", "French", "Chinese"],
    "Mid": ["Arabic", "Bulgarian", "Thai", "Hindi"],
    "Low": ["Bengali", "Tamil", "Telugu"],
}


def write_effect(results: Path, dataset: str, effect: torch.Tensor) -> Path:
    path = effect_path(results, dataset)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_tensor(effect, path)
    return path


def random_effects(results: Path, language: str) -> list[list[int]]:
    """Effect files of all tasks for a language, of 3 layers of 5 heads; its heads by the mean effect, largest first."""
    generator = torch.Generator().manual_seed(len(language) + ord(language[0]))
    effects = torch.randn(len(TASKS), 4, 3, 5, generator=generator)
    for task, effect in zip(TASKS, effects, strict=True):
        write_effect(results, f"{task}_{language}", effect.clone())
    mean = effects.double().mean(dim=(0, 1))
    return sorted([[i, j] for i in range(3) for j in range(5)], key=lambda head: -mean[head[0], head[1]].item())


@pytest.fixture
def select(run_script, tmp_path):
    """Run `select_heads.py` for head folder m of `tmp_path`; returns the exit status."""
    return partial(run_script, select_heads, "--head_folder", "m", "--heads_root", tmp_path)


def selected(tmp_path: Path, name: str = "Hindi_Heads.json") -> list[list[int]]:
    return json.loads((tmp_path / "m" / name).read_text())


def refusal(capsys, status: int) -> str:
    """The one sentence on stderr of a command that ended with status 2."""
    sentence = capsys.readouterr().err
    assert status == 2 and sentence.startswith("error: ") and sentence.count("\n") == 1
    return sentence


def test_heads_are_ranked_by_effect_largest_first_and_ties_by_layer_then_head():
    assert heads.rank_heads(torch.tensor([[0.1, 0.4], [-0.3, 0.2]])) == [(0, 1), (1, 1), (0, 0), (1, 0)]
    effect = torch.zeros(40, 40, dtype=torch.float64)
    effect[20, 7], effect[3, 3] = 1.0, -0.0  # the two zeros are a tie
    others = [(layer, head) for layer in range(40) for head in range(40) if (layer, head) != (20, 7)]
    assert heads.rank_heads(effect) == [(20, 7), *others]


def test_top_is_a_fraction_below_one_rounded_down_or_a_number_of_heads():
    for top, total, count in [(0.5, 32, 16), (0.5, 15, 7), (0.01, 32, 1), (0.29, 100, 29), (0.99, 2, 1), (1, 32, 1)]:
        assert heads.count_top(top, total) == count
    assert heads.count_top(32, 32) == 32 and heads.count_top(7.0, 32) == 7
    for top in (0, -1, -0.5, 1.5, 33, float("nan"), float("inf")):
        with pytest.raises(UserError, match="up to 32"):
            heads.count_top(top, 32)


def test_the_effect_is_the_mean_over_trials_then_tasks_whatever_their_number_of_trials(tmp_path):
    write_effect(tmp_path, "antonym_Hindi", torch.tensor([[[1.0, 0.0]]]))
    write_effect(tmp_path, "sentiment_Hindi", torch.tensor([[[0.0, 2.0]], [[0.0, 4.0]], [[0.0, 0.0]]]))
    assert heads.mean_effect(tmp_path, "Hindi", ["antonym", "sentiment"]).tolist() == [[0.5, 1.0]]


def test_a_four_dimensional_effect_counts_by_its_query_predictive_class(tmp_path):
    effect = torch.randn(3, 2, 4, len(TOKEN_CLASSES), generator=torch.Generator().manual_seed(0))
    write_effect(tmp_path, "antonym_Hindi", effect)
    mean = effect[..., 9].double().mean(0)
    assert torch.equal(heads.mean_effect(tmp_path, "Hindi", ["antonym"]), mean)
    write_effect(tmp_path, "sentiment_Hindi", torch.ones(1, 2, 4))  # three dimensions
    assert torch.equal(heads.mean_effect(tmp_path, "Hindi", ["antonym", "sentiment"]), (mean + 1) / 2)


def test_only_heads_that_the_settings_say_are_not_there_may_have_no_effect(tmp_path):
    noted = {"n_layers": 3, "layers": [0, 2], "heads": [2, 1]}
    scores = torch.tensor([[[1.0, 2.0], [3.0, torch.nan]]])
    found = heads.by_layer(scores, noted, tmp_path)
    assert heads.rank_heads(found) == [(2, 0), (0, 1), (0, 0)] and heads.count_heads(found) == 3
    for wrong in ({}, noted | {"heads": [2, 2]}, noted | {"layers": [0]}):
        with pytest.raises(UserError, match=r"not finite|score it again"):
            heads.by_layer(scores, wrong, tmp_path)


def test_effect_files_that_are_misshapen_not_finite_or_of_two_models_are_refused_by_name(tmp_path):
    bad = [torch.zeros(shape) for shape in [(2, 4), (2, 2, 4, 3), (0, 2, 4), ()]]
    bad += [torch.zeros(2, 2, 2).index_put((torch.tensor(1),) * 3, torch.tensor(x)) for x in (torch.nan, torch.inf)]
    bad.append(torch.zeros(2, 2, 2).index_fill(2, torch.tensor(1), torch.nan))  # of a head in every trial
    for effect in bad:
        path = write_effect(tmp_path, "antonym_Hindi", effect)
        with pytest.raises(UserError, match=path.name):
            heads.mean_effect(tmp_path, "Hindi", ["antonym"])
    for odd in (
        torch.ones(2, 2, 4).to_sparse(),
        torch.ones(2, 2, 4, device="meta"),
        torch.zeros(1).expand(10**5, 10**4, 10**4),
        torch.ones(2, 2, 4).to(torch.float8_e4m3fn),
        torch.nested.nested_tensor([torch.ones(2, 4), torch.ones(1, 4)]),
    ):
        path = effect_path(tmp_path, "antonym_Hindi")
        torch.save(odd, path)
        with pytest.raises(UserError, match=path.name):
            heads.mean_effect(tmp_path, "Hindi", ["antonym"])
    write_effect(tmp_path, "antonym_Hindi", torch.zeros(2, 2, 2))
    path = write_effect(tmp_path, "sentiment_Hindi", torch.zeros(2, 2, 3))
    with pytest.raises(UserError, match=f"{path.name} comes from a different model"):
        heads.mean_effect(tmp_path, "Hindi", ["antonym", "sentiment"])


def test_the_tasks_that_were_scored_come_with_the_languages_that_have_all_of_them(tmp_path):
    with pytest.raises(UserError, match="no scores; run"):
        heads.scored_tasks(tmp_path)
    write_effect(tmp_path, "sentiment_Hindi", torch.zeros(2, 2, 2))
    assert heads.scored_tasks(tmp_path) == (["sentiment"], ["Hindi"])
    write_effect(tmp_path, "antonym_Thai", torch.zeros(2, 2, 2))
    with pytest.raises(UserError, match="all of antonym, sentiment"):
        heads.scored_tasks(tmp_path)


def test_a_group_holds_the_heads_of_more_than_half_of_its_lists_by_frequency_then_appearance():
    in_two_of_four, in_three_of_four = (0, 0), (5, 1)
    lists = [[in_two_of_four, in_three_of_four], [in_two_of_four, in_three_of_four], [in_three_of_four], [(9, 9)]]
    assert heads.group_heads(lists) == [in_three_of_four]
    a, b, c, d = (3, 1), (0, 2), (7, 7), (1, 0)  # counts: a 2, b 3, c 2, d 3
    assert heads.group_heads([[a, b, c, d], [d, b, a], [c, d, b]]) == [b, d, a, c]
    assert heads.group_heads([[a, a], [b], [b]]) == [b]  # a list counts once


def test_a_groups_languages_come_in_the_group_rules_order():
    assert {group: group_languages(group) for group in GROUPS} == GROUPS
    assert group_languages("Universal") == GROUPS["High"] + GROUPS["Mid"] + GROUPS["Low"]


def test_a_group_is_made_from_its_languages_lists_or_refused_naming_what_is_missing(tmp_path):
    def refused(group: str, match: str) -> None:
        with pytest.raises(UserError, match=match):
            heads.group_list(tmp_path, group, {})

    refused("Middle", r"Middle.*High, Mid, Low, Universal")
    for head, language in enumerate(["Bengali", "Telugu"]):
        heads.write_heads(tmp_path / f"{language}_Heads.json", [(0, head)])
    refused("Low", r"Tamil_Heads\.json")
    heads.write_heads(tmp_path / "Tamil_Heads.json", [(0, 2)])
    refused("Low", "no head is in more than half")
    new = {tmp_path / "Tamil_Heads.json": [(0, 1)]}  # not yet in the place of the one that is there
    assert heads.group_list(tmp_path, "low", new) == [(0, 1)]  # in any case


@pytest.mark.parametrize("model", ["llama3_1", "Mistral"])
def test_the_published_group_lists_come_out_exactly(shared, model):
    folder = shared / "published_heads" / model
    if not folder.is_dir():
        pytest.skip(f"no folder {folder}: the published head lists lie there")
    for group in GROUPS:
        lists = [heads.read_heads(folder / f"{language}_Heads.json") for language in group_languages(group)]
        published = json.loads((folder / f"{group}_Lang.json").read_text())
        assert [list(head) for head in heads.group_heads(lists)] == published


def test_a_written_head_list_reads_back_in_order_and_a_malformed_one_is_refused_by_name(tmp_path):
    listed, path = [(3, 1), (0, 0), (12, 31)], tmp_path / "Hindi_Heads.json"
    with pytest.raises(UserError, match=r"no head list .*Hindi_Heads.json; make it with select_heads.py"):
        heads.read_heads(path)
    heads.write_heads(path, listed)
    assert heads.read_heads(path) == listed
    assert path.read_text() == "[[3, 1], [0, 0], [12, 31]]\n"
    complaints = {
        "not valid JSON|not UTF-8": ["[[0, 1], [2", "", b"\xff\xfe[[0, 1]]", "[" * 3000 + "]" * 3000],
        "not a list of": ["[]", "{}", "null", '{"heads": [[0, 1]]}'],
        "entry 0 is": ["[0, 1]", "[[0, 1.5]]", "[[0, true]]", '[["0", "1"]]'],
        r"entry 1 is \[-?\d": ["[[0, 1], [2, 3, 4]]", "[[0, 1], [-1, 0]]"],
        r"has head \[0, 1\] more than once": ["[[0, 1], [2, 2], [0, 1]]"],
    }
    for complaint, texts in complaints.items():
        for text in texts:
            path.write_bytes(text if isinstance(text, bytes) else text.encode())
            with pytest.raises(UserError, match=complaint) as refused:
                heads.read_heads(path)
            assert str(path) in str(refused.value)


def test_select_heads_writes_the_better_half_or_a_whole_number_of_heads_best_first(tmp_path, select):
    ranked = random_effects(tmp_path / "effects", "Hindi")
    select("--results", tmp_path / "effects", "--language", "hi")
    assert selected(tmp_path) == ranked[:7]  # half of 15, rounded down
    select("--results", tmp_path / "effects", "--language", "Hindi", "--top", 4)
    assert selected(tmp_path) == ranked[:4]


def test_select_heads_averages_over_the_named_tasks_only(tmp_path, select):
    write_effect(tmp_path, "antonym_Hindi", torch.tensor([[[0.0, 1.0]]]))
    write_effect(tmp_path, "sentiment_Hindi", torch.tensor([[[9.0, 0.0]]]))
    select("--results", tmp_path, "--language", "Hindi", "--tasks", "antonym", "--top", 1)
    assert selected(tmp_path) == [[0, 1]]
    select("--results", tmp_path, "--language", "Hindi", "--tasks", *["antonym"] * 10, "sentiment", "--top", 1)
    assert selected(tmp_path) == [[0, 0]]  # a name that is given twice counts once


def test_select_heads_of_all_languages_and_their_groups_with_and_without_effects(tmp_path, select):
    names = GROUPS["High"] + GROUPS["Mid"] + GROUPS["Low"]
    assert sorted(names) == sorted(language.name for language in PAPER_LANGUAGES)
    lists = {name: random_effects(tmp_path / "effects", name)[:10] for name in names}
    select("--results", tmp_path / "effects", "--language", "all", "--top", 10, "--group", "Universal")
    select("--group", "Mid")  # from the lists that are there
    assert {name: selected(tmp_path, f"{name}_Heads.json") for name in names} == lists
    for group, members in {"Universal": names, "Mid": GROUPS["Mid"]}.items():
        counts = Counter(tuple(head) for name in members for head in lists[name])
        common = [list(head) for head, count in counts.most_common() if count > len(members) / 2]
        assert selected(tmp_path, f"{group}_Lang.json") == common != []


def test_select_heads_refuses_in_one_sentence_and_leaves_nothing(tmp_path, select, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for options, named in [
        ((), "--language"),
        (("--language", "Hindi"), "--results"),
        (("--language", "Hindi", "--results", "effects"), "antonym_Hindi_indirect_effect.pt"),
        (("--language", "Klingon", "--results", "effects"), "Klingon"),
        (("--group", "Mid"), "Arabic_Heads.json"),
        (("--group", "North"), "North"),
    ]:
        assert named in refusal(capsys, select(*options))
        assert not list(tmp_path.iterdir())
    random_effects(tmp_path / "effects", "Hindi")
    assert "Bengali" in refusal(capsys, select("--results", "effects", "--language", "Hindi", "Bengali"))
    path = write_effect(tmp_path / "effects", "antonym_Hindi", torch.zeros(1, 2, 2))
    torch.save({"run": print}, path)  # a file that would run code
    options = ("--results", "effects", "--tasks", "antonym", "--language", "Hindi")
    assert path.name in refusal(capsys, select(*options))
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("left", ["Arabic_Heads.json", "Mid_Lang.json"], ids=["missing", "of the user's"])
def test_select_heads_writes_no_languages_list_before_a_group_that_is_refused(left, tmp_path, select, capsys):
    names = [name for name in GROUPS["Mid"] if left != f"{name}_Heads.json"]
    for name in names:
        random_effects(tmp_path / "effects", name)
    if left == "Mid_Lang.json":
        (tmp_path / "m").mkdir()
        (tmp_path / "m" / left).write_text("[[9, 9]]")
    status = select("--results", tmp_path / "effects", "--language", *names, "--group", "Mid")
    assert left in refusal(capsys, status) and not list(tmp_path.rglob("*_Heads.json"))


@pytest.mark.parametrize("noted", [[1], {"Hindi_Heads.json": 5}, "text", None])
def test_facts_of_other_types_beside_head_lists_are_refused_and_kept(noted, tmp_path, select, capsys):
    random_effects(tmp_path / "effects", "Hindi")
    (tmp_path / "m").mkdir()
    facts = tmp_path / "m" / "soteria.json"
    facts.write_text(json.dumps({"lists_sha256": noted, "mine": 1}))
    assert str(facts) in refusal(capsys, select("--results", tmp_path / "effects", "--language", "Hindi"))
    assert [*facts.parent.iterdir()] == [facts] and json.loads(facts.read_text())["mine"] == 1


def test_scores_of_unlike_notes_are_refused_or_said_to_be_unlike(tmp_path, select, capsys):
    """Without a hash, names tell models apart; other prompts are still effects on the same answers."""
    signed = {"model_name": "a/one", "model_sha256": "x", "n_shots": 10}
    for name, other, said in [
        ("moved", signed | {"dataset_name": "antonym_Hindi"}, "has the scores of antonym_Hindi"),
        ("hash", signed | {"model_sha256": "y"}, "of several models"),
        ("name", {"model_name": "a/two"}, "of several models"),
        ("unsigned", {"model_name": "/there/one"}, "without a hash of their model"),
        ("shots", signed | {"n_shots": 3}, "scored with unlike n_shots"),
        ("alike", signed, ""),
    ]:
        results = tmp_path / name
        for task in TASKS:
            path = write_effect(results, f"{task}_Hindi", torch.rand(2, 2, 4)).parent
            noted = {"dataset_name": path.name} | (other if task == "sentiment" else signed)
            (path / "indirect_effect_args.txt").write_text(json.dumps(noted))
        status, is_refused = select("--results", results, "--language", "Hindi"), name in ("moved", "hash", "name")
        shown = capsys.readouterr().err
        assert status == (2 if is_refused else 0) and said in shown and shown.count("\n") == (name != "alike")
