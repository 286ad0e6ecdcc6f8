"""Step 2: heads ranked by their average effect, the lists' files, and the rule that makes a group of languages."""

import json
import sys
from pathlib import Path

import pytest
import torch

import select_heads
from soteria import cli
from soteria.errors import UserError
from soteria.languages import PAPER_LANGUAGES, group_languages
from soteria.scoring import heads
from soteria.scoring.prompts import TASKS, TOKEN_CLASSES
from soteria.scoring.run import save_tensor
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


def random_effects(results: Path, language: str, tasks=TASKS, shape=(4, 3, 5)) -> torch.Tensor:
    """Effect files of a language, (trials, layers, heads) each; their mean over tasks and trials, taken one by one."""
    generator = torch.Generator().manual_seed(len(language) + ord(language[0]))
    effects = [torch.randn(shape, generator=generator) for _ in tasks]
    for task, effect in zip(tasks, effects, strict=True):
        write_effect(results, f"{task}_{language}", effect)
    total = torch.zeros(shape[1:], dtype=torch.float64)
    for effect in effects:
        for trial in effect:
            total += trial.double() / (len(tasks) * shape[0])
    return total


def best_first(mean: torch.Tensor) -> list[list[int]]:
    pairs = [[layer, head] for layer in range(mean.shape[0]) for head in range(mean.shape[1])]
    return sorted(pairs, key=lambda pair: -mean[pair[0], pair[1]].item())


@pytest.fixture
def select(monkeypatch):
    """Run `select_heads.py` with a command line."""

    def run(*arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", ["select_heads.py", *map(str, arguments)])
        cli.run(select_heads.main)

    return run


def refusal(capsys, call) -> str:
    """The one sentence on stderr with which a call ends in status 2."""
    with pytest.raises(SystemExit) as ended:
        call()
    assert ended.value.code == 2
    sentence = capsys.readouterr().err
    assert sentence.startswith("error: ")
    assert sentence.count("\n") == 1
    return sentence


# Ranking


def test_heads_are_ranked_by_effect_largest_first():
    assert heads.rank_heads(torch.tensor([[0.1, 0.4], [-0.3, 0.2]])) == [(0, 1), (1, 1), (0, 0), (1, 0)]


def test_equal_effects_are_ranked_by_layer_then_head():
    effect = torch.zeros(40, 40, dtype=torch.float64)
    effect[20, 7] = 1.0
    others = [(layer, head) for layer in range(40) for head in range(40) if (layer, head) != (20, 7)]
    assert heads.rank_heads(effect) == [(20, 7), *others]


def test_a_positive_and_a_negative_zero_are_a_tie():
    assert heads.rank_heads(torch.tensor([[-0.0, 0.0], [0.0, -0.0]])) == [(0, 0), (0, 1), (1, 0), (1, 1)]


@pytest.mark.parametrize(
    ("top", "total", "count"),
    [(0.5, 32, 16), (0.5, 15, 7), (0.01, 32, 1), (0.29, 100, 29), (0.99, 2, 1), (1, 32, 1), (32, 32, 32), (7.0, 32, 7)],
)
def test_top_is_a_fraction_below_one_rounded_down_or_a_number_of_heads(top, total, count):
    assert heads.count_top(top, total) == count


@pytest.mark.parametrize("top", [0, -1, -0.5, 1.5, 33, float("nan"), float("inf")])
def test_top_that_is_neither_a_fraction_nor_a_number_of_heads_is_refused(top):
    with pytest.raises(UserError, match="up to 32"):
        heads.count_top(top, 32)


def test_the_effect_is_the_mean_over_trials_and_tasks(tmp_path):
    want = random_effects(tmp_path, "Hindi")
    torch.testing.assert_close(heads.mean_effect(tmp_path, "Hindi", list(TASKS)), want, rtol=0, atol=1e-12)


def test_each_task_counts_alike_whatever_its_number_of_trials(tmp_path):
    write_effect(tmp_path, "antonym_Hindi", torch.tensor([[[1.0, 0.0]]]))
    write_effect(tmp_path, "sentiment_Hindi", torch.tensor([[[0.0, 2.0]], [[0.0, 4.0]], [[0.0, 0.0]]]))
    assert heads.mean_effect(tmp_path, "Hindi", ["antonym", "sentiment"]).tolist() == [[0.5, 1.0]]


def test_a_four_dimensional_effect_counts_by_its_query_predictive_class(tmp_path):
    effect = torch.randn(3, 2, 4, len(TOKEN_CLASSES), generator=torch.Generator().manual_seed(0))
    write_effect(tmp_path, "antonym_Hindi", effect)
    want = effect[..., 9].double().mean(0)
    assert torch.equal(heads.mean_effect(tmp_path, "Hindi", ["antonym"]), want)


def test_four_and_three_dimensional_effects_of_one_model_average_together(tmp_path):
    all_classes = torch.zeros(1, 2, 2, len(TOKEN_CLASSES))
    all_classes[0, 1, 0, 9] = 4.0
    write_effect(tmp_path, "antonym_Hindi", all_classes)
    write_effect(tmp_path, "sentiment_Hindi", torch.ones(1, 2, 2))
    assert heads.mean_effect(tmp_path, "Hindi", ["antonym", "sentiment"]).tolist() == [[0.5, 0.5], [2.5, 0.5]]


@pytest.mark.parametrize("shape", [(2, 4), (2, 2, 4, 3), (0, 2, 4), ()])
def test_an_effect_file_of_another_shape_is_refused_by_name(tmp_path, shape):
    path = write_effect(tmp_path, "antonym_Hindi", torch.zeros(shape))
    with pytest.raises(UserError, match=path.name):
        heads.mean_effect(tmp_path, "Hindi", ["antonym"])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_effects_that_are_no_numbers_are_refused_by_name(tmp_path, bad):
    effect = torch.zeros(2, 2, 2)
    effect[1, 0, 1] = bad
    path = write_effect(tmp_path, "antonym_Hindi", effect)
    with pytest.raises(UserError, match=path.name):
        heads.mean_effect(tmp_path, "Hindi", ["antonym"])


def test_effects_of_two_models_are_not_averaged(tmp_path):
    write_effect(tmp_path, "antonym_Hindi", torch.zeros(2, 2, 2))
    path = write_effect(tmp_path, "sentiment_Hindi", torch.zeros(2, 2, 3))
    with pytest.raises(UserError, match=f"{path.name} is of another model"):
        heads.mean_effect(tmp_path, "Hindi", ["antonym", "sentiment"])


# Groups


def test_a_group_holds_the_heads_of_more_than_half_of_its_lists():
    in_two_of_four, in_three_of_four = (0, 0), (5, 1)
    lists = [[in_two_of_four, in_three_of_four], [in_two_of_four, in_three_of_four], [in_three_of_four], [(9, 9)]]
    assert heads.group_heads(lists) == [in_three_of_four]


def test_a_group_is_ordered_by_frequency_then_by_first_appearance():
    a, b, c, d = (3, 1), (0, 2), (7, 7), (1, 0)
    # Counts: a 2, b 3, c 2, d 3. First seen in the order a, b, c, d.
    assert heads.group_heads([[a, b, c, d], [d, b, a], [c, d, b]]) == [b, d, a, c]


def test_a_head_that_one_list_names_twice_counts_once():
    assert heads.group_heads([[(0, 0), (0, 0)], [(1, 1)], [(1, 1)]]) == [(1, 1)]


@pytest.mark.parametrize("group", GROUPS)
def test_a_tiers_languages_come_in_the_group_rules_order(group):
    assert group_languages(group) == GROUPS[group]


def test_the_universal_group_is_all_twelve_languages_tier_by_tier():
    assert group_languages("Universal") == GROUPS["High"] + GROUPS["Mid"] + GROUPS["Low"]


def test_a_group_name_counts_in_any_case(tmp_path):
    for language in GROUPS["Low"]:
        heads.write_heads(tmp_path / f"{language}_Heads.json", [(0, 1)])
    heads.write_group(tmp_path, "low")
    assert json.loads((tmp_path / "Low_Lang.json").read_text()) == [[0, 1]]


def test_an_unknown_group_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"Middle.*High, Mid, Low, Universal"):
        heads.write_group(tmp_path, "Middle")


def test_a_group_without_one_of_its_languages_is_refused_naming_the_missing_list(tmp_path):
    for language in ("Bengali", "Telugu"):
        heads.write_heads(tmp_path / f"{language}_Heads.json", [(0, 1)])
    with pytest.raises(UserError, match=r"Tamil_Heads\.json"):
        heads.write_group(tmp_path, "Low")
    assert not (tmp_path / "Low_Lang.json").exists()


def test_a_group_whose_languages_share_no_head_is_refused(tmp_path):
    for head, language in enumerate(GROUPS["Low"]):
        heads.write_heads(tmp_path / f"{language}_Heads.json", [(0, head)])
    with pytest.raises(UserError, match="no head is in more than half"):
        heads.write_group(tmp_path, "Low")
    assert not (tmp_path / "Low_Lang.json").exists()


@pytest.mark.parametrize("model", ["llama3_1", "Mistral"])
@pytest.mark.parametrize("group", GROUPS)
def test_the_published_group_lists_come_out_exactly(shared, model, group):
    folder = shared / "published_heads" / model
    if not folder.is_dir():
        pytest.skip(f"no folder {folder}: the published head lists lie there")
    lists = [heads.read_heads(folder / f"{language}_Heads.json") for language in group_languages(group)]
    assert [list(head) for head in heads.group_heads(lists)] == json.loads((folder / f"{group}_Lang.json").read_text())


# Files


def test_a_written_head_list_reads_back_in_order(tmp_path):
    listed = [(3, 1), (0, 0), (12, 31)]
    heads.write_heads(tmp_path / "Hindi_Heads.json", listed)
    assert heads.read_heads(tmp_path / "Hindi_Heads.json") == listed


def test_a_head_list_is_a_json_list_of_layer_and_head(tmp_path):
    heads.write_heads(tmp_path / "Hindi_Heads.json", [(3, 1), (0, 0)])
    assert (tmp_path / "Hindi_Heads.json").read_text() == "[[3, 1], [0, 0]]\n"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[[0, 1], [2", "no JSON head list"),
        ("", "no JSON head list"),
        ("[]", "no list of"),
        ("{}", "no list of"),
        ("null", "no list of"),
        ('{"heads": [[0, 1]]}', "no list of"),
        ("[[0, 1], [2, 3, 4]]", r"entry 1 is \[2, 3, 4\]"),
        ("[0, 1]", "entry 0 is 0"),
        ("[[0, 1], [-1, 0]]", r"entry 1 is \[-1, 0\]"),
        ("[[0, 1.5]]", r"entry 0 is \[0, 1.5\]"),
        ("[[0, true]]", r"entry 0 is \[0, True\]"),
        ('[["0", "1"]]', "entry 0 is"),
        ("[[0, 1], [2, 2], [0, 1]]", r"names head \[0, 1\] twice"),
    ],
)
def test_a_malformed_head_list_is_refused_with_its_name(tmp_path, text, complaint):
    path = tmp_path / "Hindi_Heads.json"
    path.write_text(text)
    with pytest.raises(UserError, match=complaint) as refused:
        heads.read_heads(path)
    assert str(path) in str(refused.value)


def test_a_head_list_that_is_not_utf8_is_refused(tmp_path):
    path = tmp_path / "Hindi_Heads.json"
    path.write_bytes(b"\xff\xfe[[0, 1]]")
    with pytest.raises(UserError, match="no JSON head list"):
        heads.read_heads(path)


def test_a_missing_head_list_is_refused_with_the_mend(tmp_path):
    with pytest.raises(UserError, match=r"no head list .*Hindi_Heads.json; make it with select_heads.py"):
        heads.read_heads(tmp_path / "Hindi_Heads.json")


# The command


def test_select_heads_writes_the_better_half_of_all_heads_best_first(tmp_path, select):
    want = best_first(random_effects(tmp_path / "effects", "Hindi"))[:7]  # half of 15, rounded down
    select("--results", tmp_path / "effects", "--language", "hi", "--head_folder", "m", "--heads_root", tmp_path)
    assert json.loads((tmp_path / "m" / "Hindi_Heads.json").read_text()) == want


def test_select_heads_keeps_a_whole_number_of_heads(tmp_path, select):
    want = best_first(random_effects(tmp_path / "effects", "Hindi"))[:4]
    options = ("--results", tmp_path / "effects", "--language", "Hindi", "--head_folder", "m", "--heads_root", tmp_path)
    select(*options, "--top", 4)
    assert json.loads((tmp_path / "m" / "Hindi_Heads.json").read_text()) == want


def test_select_heads_averages_over_the_named_tasks_only(tmp_path, select):
    write_effect(tmp_path, "antonym_Hindi", torch.tensor([[[0.0, 1.0]]]))
    write_effect(tmp_path, "sentiment_Hindi", torch.tensor([[[9.0, 0.0]]]))
    options = ("--results", tmp_path, "--language", "Hindi", "--head_folder", "m", "--heads_root", tmp_path)
    select(*options, "--tasks", "antonym", "--top", 1)
    assert json.loads((tmp_path / "m" / "Hindi_Heads.json").read_text()) == [[0, 1]]


def test_select_heads_of_all_languages_and_their_universal_group_in_one_command(tmp_path, select):
    names = [language.name for language in PAPER_LANGUAGES]
    lists = {name: best_first(random_effects(tmp_path / "effects", name))[:10] for name in names}
    options = ("--results", tmp_path / "effects", "--head_folder", "m", "--heads_root", tmp_path)
    select(*options, "--language", "all", "--top", 10, "--group", "Universal")
    for name in names:
        assert json.loads((tmp_path / "m" / f"{name}_Heads.json").read_text()) == lists[name]
    seen: dict[tuple, int] = {}
    for name in GROUPS["High"] + GROUPS["Mid"] + GROUPS["Low"]:
        for layer, head in lists[name]:
            seen[layer, head] = seen.get((layer, head), 0) + 1
    want = [list(head) for head in sorted(seen, key=lambda head: -seen[head]) if seen[head] >= 7]
    assert json.loads((tmp_path / "m" / "Universal_Lang.json").read_text()) == want


def test_select_heads_makes_a_group_from_lists_that_are_there_without_effects(tmp_path, select):
    for language in GROUPS["Mid"]:
        heads.write_heads(tmp_path / "m" / f"{language}_Heads.json", [(2, 2), (1, 0)])
    select("--group", "Mid", "--head_folder", "m", "--heads_root", tmp_path)
    assert json.loads((tmp_path / "m" / "Mid_Lang.json").read_text()) == [[2, 2], [1, 0]]


def test_select_heads_twice_writes_the_same_bytes(tmp_path, select):
    random_effects(tmp_path / "effects", "Hindi")
    written = []
    for _ in range(2):
        select("--results", tmp_path / "effects", "--language", "hi", "--head_folder", "m", "--heads_root", tmp_path)
        written.append((tmp_path / "m" / "Hindi_Heads.json").read_bytes())
    assert written[0] == written[1]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ((), "--language"),
        (("--language", "Hindi"), "--results"),
        (("--language", "Hindi", "--results", "effects"), "antonym_Hindi_indirect_effect.pt"),
        (("--language", "Klingon", "--results", "effects"), "Klingon"),
        (("--group", "Mid"), "Arabic_Heads.json"),
        (("--group", "North"), "North"),
    ],
)
def test_select_heads_refuses_in_one_sentence_and_leaves_nothing(tmp_path, select, capsys, monkeypatch, options, named):
    monkeypatch.chdir(tmp_path)
    assert named in refusal(capsys, lambda: select(*options, "--head_folder", "m", "--heads_root", tmp_path))
    assert not list(tmp_path.iterdir())


def test_select_heads_writes_no_language_where_one_of_several_cannot_be_had(tmp_path, select, capsys):
    random_effects(tmp_path / "effects", "Hindi")
    options = ("--results", tmp_path / "effects", "--head_folder", "m", "--heads_root", tmp_path)
    assert "Bengali" in refusal(capsys, lambda: select(*options, "--language", "Hindi", "Bengali"))
    assert not (tmp_path / "m").exists()


def test_select_heads_refuses_an_effect_file_that_would_run_code(tmp_path, select, capsys):
    path = write_effect(tmp_path / "effects", "antonym_Hindi", torch.zeros(1, 2, 2))
    torch.save({"run": print}, path)
    options = ("--results", tmp_path / "effects", "--head_folder", "m", "--heads_root", tmp_path, "--tasks", "antonym")
    assert path.name in refusal(capsys, lambda: select(*options, "--language", "Hindi"))
