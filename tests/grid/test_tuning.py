"""Tuning: which points are drawn, which make the front, which is chosen, and where an interrupted run goes on."""

import random
import time
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial

import optuna
import pytest
import torch
from conftest import run_in_child
from tiny_models import save_tiny_model

import tune as script
from soteria.errors import UserError
from soteria.grid.comparison import METHOD, RATES, VALIDATION_SEED, Bench, Benign, Measurement, compare
from soteria.grid.tuning import N_RANDOM_TRIALS, Limits, Space, SteeredBench, Trial, Tuning, bench_hash, count_share
from soteria.judging.refusal import RefusalJudge
from soteria.judging.statistics import Rate
from soteria.languages import find_language
from soteria.models.task_vector import TaskVector
from soteria.scoring.heads import count_top, mean_effect, rank_heads
from soteria.scoring.prompts import TASKS
from soteria.scoring.run import save_tensor
from soteria.storage import files, paths
from soteria.storage.paths import effect_path

RANKING = [(layer, head) for layer in range(4) for head in range(8)]
BASE = Measurement(Rate(40, 100), Rate(1, 100), Rate(0, 100), Rate(98, 100), (0.0,))


def measured(heads, factor) -> Measurement:
    """A made-up model: steering takes ASR away and, beyond a point, harms."""
    if not heads:
        return BASE
    strength = factor * len(heads) / len(RANKING)
    harm = max(0, round(4 * strength) - 8)
    counts = max(0, 40 - round(10 * strength)), 1 + harm, 2 * harm, 98 - harm
    return Measurement(*(Rate(min(count, 100), 100) for count in counts), (strength**2 / 10,))


class Meter:
    """Measures the made-up model and notes what was asked; `breaks_at` interrupts a call by its number."""

    def __init__(self, breaks_at: int | None = None):
        self.asked, self.breaks_at = [], breaks_at

    def __call__(self, heads, factor) -> Measurement:
        if len(self.asked) == self.breaks_at:
            raise KeyboardInterrupt
        self.asked.append((tuple(heads), factor))
        return measured(heads, factor)


@pytest.fixture
def tuning(tmp_path):
    """`tuning(**changes)`: 24 trials of the made-up model into a folder, in a dozen of which TPE has its say."""
    whole = Tuning(tmp_path / "a" / "model_Hindi.json", {"base_model": "model"}, Space(), RANKING, 24, Limits())
    return partial(replace, whole)


def trial(number=0, asr=0.1, kl=0.1, refusals=0.0, accuracy=1.0) -> Trial:
    return Trial(number, 1.0, 0.5, 16, asr, kl, refusals, 0.0, accuracy)


def random_trials(seed: int, n: int) -> list[Trial]:
    """Trials with few different values, so that many are equal in one objective or in both."""
    draw = random.Random(seed)
    return [
        trial(i, draw.randrange(6) / 5, draw.randrange(6) / 5, draw.randrange(5) / 100, 1 - draw.randrange(5) / 100)
        for i in range(n)
    ]


# Points


def test_points_lie_in_the_space_and_differ():
    space, trials = Space((2, 3), (0.4, 0.6)), []
    for number in range(N_RANDOM_TRIALS + 10):
        factor, share = space.next_point(trials)
        assert 2 <= factor <= 3 and 0.4 <= share <= 0.6
        trials.append(replace(trial(number, factor / 3, share), scaling_factor=factor, share=share))
    assert len({(each.scaling_factor, each.share) for each in trials}) == len(trials)


def test_a_range_of_one_value_holds_that_value_fixed():
    space, trials = Space((5, 5), (0.1, 1)), []
    for number in range(N_RANDOM_TRIALS + 3):
        factor, share = space.next_point(trials)
        trials.append(replace(trial(number, share, 1 - share), scaling_factor=factor, share=share))
    assert {each.scaling_factor for each in trials} == {5}
    assert len({each.share for each in trials}) == len(trials)


def test_another_seed_draws_other_points():
    """Not the same ones a trial later either, which a sampler seeded with seed + number would."""

    def drawn(seed: int) -> set[tuple[float, float]]:
        trials = []
        for number in range(5):
            factor, share = Space(seed=seed).next_point(trials)
            trials.append(replace(trial(number), scaling_factor=factor, share=share))
        return {(each.scaling_factor, each.share) for each in trials}

    assert drawn(0) == drawn(0)
    assert not drawn(0) & drawn(1)


def test_a_share_is_a_number_of_heads_as_select_heads_counts_it():
    assert [count_share(share, 32) for share in (0.001, 0.05, 0.5, 0.99, 1.0)] == [1, 1, 16, 31, 32]
    assert all(
        count_share(k / 100, total) == count_top(k / 100, total) for k in range(1, 100) for total in (7, 32, 384)
    )


def test_the_study_knows_each_trials_costs():
    attributes = Space().study([trial(refusals=0.03, accuracy=0.9)]).trials[0].user_attrs
    assert attributes == {"n_heads": 16, "benign_refusals": 0.03, "benign_changes": 0.0, "icl_accuracy": 0.9}


def test_the_study_makes_both_asr_and_divergence_small():
    study = Space().study([trial(asr=0.3, kl=0.7)])
    assert study.directions == [optuna.study.StudyDirection.MINIMIZE] * 2
    assert study.trials[0].values == [0.3, 0.7]


# The front and the chosen point


def dominates(a: Trial, b: Trial) -> bool:
    return a.asr <= b.asr and a.kl_first_token <= b.kl_first_token and a.objectives != b.objectives


@pytest.mark.parametrize("seed", range(10))
def test_the_front_is_every_trial_that_no_other_dominates_lowest_asr_first(seed):
    trials = random_trials(seed, 3 + 3 * seed)
    oracle = [b for b in trials if not any(dominates(a, b) for a in trials)]
    front = Space().front(trials)
    assert set(front) == set(oracle) and len(front) == len(oracle)
    assert [each.asr for each in front] == sorted(each.asr for each in front)


@pytest.mark.parametrize("seed", range(10))
def test_the_chosen_trial_keeps_both_limits_and_none_that_does_has_a_lower_asr_or_the_same_at_less_kl(seed):
    trials, base = random_trials(seed, 30), BASE.as_json()
    limits = Limits(0.02, 0.01)
    kept = [t for t in trials if t.benign_refusals <= 0.03 and t.icl_accuracy >= 0.97 - 1e-12]  # base: 1 %, 98 %
    chosen = limits.choose(trials, base)
    assert chosen in kept
    assert min(t.asr for t in kept) == chosen.asr
    assert min(t.kl_first_token for t in kept if t.asr == chosen.asr) == chosen.kl_first_token


def test_a_cost_of_exactly_the_limit_is_kept():
    base = Measurement(Rate(4, 10), Rate(0, 50), Rate(0, 50), Rate(123, 125), (0.0,)).as_json()
    at_limit = trial(refusals=1 / 50, accuracy=0.964)  # 0.984 - 0.964 is above 0.02 in floating point
    assert Limits(0.02, 0.02).choose([at_limit], base) == at_limit
    assert Limits(0.02, 0.019).choose([at_limit], base) is None
    assert Limits(0.019, 0.02).choose([at_limit], base) is None


def test_none_is_chosen_where_every_trial_costs_too_much_and_the_file_says_why(tuning):
    strong = tuning(space=Space((8, 10), (0.9, 1)))
    found = strong.run(measured)
    assert found["chosen"] is None and "none of 24 trials" in found["why_none"]
    assert found["front"]


def test_the_file_names_the_front_and_the_chosen_trial_among_all_trials(tuning):
    whole = tuning()
    found = whole.run(measured)
    assert files.read_json(whole.path) == found
    trials = [Trial(**row) for row in found["trials"]]
    assert [each.number for each in trials] == list(range(24))
    assert found["front"] == [each.number for each in Space().front(trials)]
    assert found["chosen"] == asdict(Limits().choose(trials, found["base"])) and found["why_none"] is None
    assert found["versions"] == {"optuna": optuna.__version__}
    assert (found["scaling_factors"], found["shares"], found["seed"]) == ([0.5, 10.0], [0.05, 1.0], 0)
    assert "other questions" in found["note"]


# Going on


def test_the_base_is_measured_once_and_a_trials_heads_are_the_rankings_first(tuning):
    meter = Meter()
    found = tuning().run(meter)
    assert [heads for heads, _ in meter.asked].count(()) == 1 and meter.asked[0] == ((), 0.0)
    for (heads, factor), row in zip(meter.asked[1:], found["trials"], strict=True):
        assert list(heads) == RANKING[: row["n_heads"]]
        assert factor == row["scaling_factor"]


@pytest.mark.parametrize("breaks_at", [0, 1, 2, 11, 17, 24])
def test_interrupted_and_resumed_the_bytes_are_the_same_and_nothing_is_measured_twice(breaks_at, tuning, tmp_path):
    tuning().run(measured)
    other = tuning(path=tmp_path / "b" / "model_Hindi.json")
    first, second = Meter(breaks_at), Meter()
    with pytest.raises(KeyboardInterrupt):
        other.run(first)
    assert not other.path.exists()
    other.run(second)
    assert len(first.asked) + len(second.asked) == 1 + 24
    assert other.path.read_bytes() == tuning().path.read_bytes()


def test_what_is_done_is_told_as_it_is_done_and_comes_to_all_trials(tuning):
    with pytest.raises(KeyboardInterrupt):
        tuning().run(Meter(breaks_at=8))
    told = []
    tuning().run(measured, told.append)
    assert told == [7] + [1] * 17


def test_a_finished_file_is_the_same_inputs(tuning):
    assert tuning().finished() is None
    found = tuning().run(measured)
    assert tuning().finished() == found


@pytest.mark.parametrize(
    "change",
    [
        {"inputs": {"base_model": "other"}},
        {"space": Space(seed=1)},
        {"space": Space((1, 10))},
        {"space": Space(shares=(0.1, 1.0))},
        {"ranking": RANKING[::-1]},
    ],
    ids=["model", "seed", "scaling factors", "shares", "ranking"],
)
def test_with_other_inputs_everything_is_measured_anew(change, tuning):
    tuning().run(measured)
    assert tuning(**change).finished() is None
    meter = Meter()
    tuning(**change).run(meter)
    assert len(meter.asked) == 1 + 24


def test_a_journal_of_other_rates_is_not_read(tuning, monkeypatch):
    tuning().run(measured)
    monkeypatch.setattr("soteria.grid.tuning.RATES", (*RATES, "another"))
    assert tuning().finished() is None and not tuning().journal().done


def test_more_trials_go_on_from_those_before_and_end_as_if_asked_for_at_once(tuning, tmp_path):
    tuning(n_trials=9).run(measured)
    meter = Meter()
    tuning().run(meter)
    assert len(meter.asked) == 24 - 9
    at_once = tuning(path=tmp_path / "b" / "model_Hindi.json")
    at_once.run(measured)
    assert at_once.path.read_bytes() == tuning().path.read_bytes()


def test_fewer_trials_are_the_first_ones_and_the_others_are_kept(tuning):
    every = tuning().run(measured)
    fewer = tuning(n_trials=9).run(Meter(breaks_at=0))
    assert fewer["trials"] == every["trials"][:9]
    assert tuning().run(Meter(breaks_at=0)) == every


def test_with_other_limits_a_point_is_chosen_without_measuring(tuning):
    narrow, wide = tuning(), tuning(limits=Limits(0.5, 0.5))
    first = narrow.run(measured)
    assert wide.finished() is None
    second = wide.run(Meter(breaks_at=0))
    assert second["trials"] == first["trials"]
    assert second["chosen"]["asr"] < first["chosen"]["asr"]


def test_a_trial_that_was_half_written_is_measured_again(tuning):
    expected = tuning().run(measured)
    journal = tuning().journal().path
    journal.write_bytes(journal.read_bytes()[:-10])
    tuning().path.unlink()
    meter = Meter()
    assert tuning().run(meter) == expected and len(meter.asked) == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_model_that_steering_breaks_is_refused_with_a_sentence(value, tuning):
    with pytest.raises(UserError, match="smaller --max_scaling"):
        tuning().run(lambda heads, _: BASE if not heads else replace(BASE, divergences=(value,)))
    assert not tuning().path.exists()


@pytest.mark.parametrize(
    "make",
    [
        lambda: Space((3, 2)),
        lambda: Space((-1, 2)),
        lambda: Space((1, float("inf"))),
        lambda: Space((float("nan"), 2)),
        lambda: Space(shares=(0, 1)),
        lambda: Space(shares=(0.5, 1.01)),
        lambda: Space(shares=(0.5, 0.4)),
        lambda: Space(shares=(float("nan"), 1)),
        lambda: Space(seed=-1),
        lambda: Limits(max_refusals=1.1),
        lambda: Limits(max_accuracy_loss=-0.1),
        lambda: Limits(max_refusals=float("nan")),
    ],
)
def test_ranges_and_limits_that_make_no_sense_are_refused(make):
    with pytest.raises(UserError):
        make()


# A model


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A tiny pair with made-up effects in two languages: the folder of all that tune.py reads."""
    root = tmp_path_factory.mktemp("pair")
    save_tiny_model(root / "base", "llama")
    save_tiny_model(root / "tuned", "llama", seed=1)
    for seed, language in enumerate(("English", "Hindi")):
        for task in TASKS:
            effect = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(seed))
            save_tensor(effect, effect_path(root / "effects", f"{task}_{language}"))
    return root


@pytest.fixture
def small_bench() -> Bench:
    bench = Bench.read(find_language("en"), "policy-validation", "everyday-validation", VALIDATION_SEED)
    return replace(bench, policy=bench.policy[:4], benign=bench.benign[:4], n_prompts=1)


def test_a_point_is_measured_as_the_comparison_measures_it(pair, tiny_loaded, small_bench, monkeypatch):
    monkeypatch.setattr("soteria.grid.comparison.MAX_NEW_TOKENS", 4)
    loaded, judge = tiny_loaded("llama"), RefusalJudge()
    vector = TaskVector.open(str(pair / "base"), str(pair / "tuned"))
    heads = [(0, 1), (2, 3)]
    want = compare(loaded, vector, {"base": [[]], METHOD: [heads]}, 0.5, small_bench, judge)
    bench = SteeredBench(loaded, vector, small_bench, judge)
    assert bench.measure(heads, 0.5) == want[METHOD]
    assert bench.measure([], 0.0) == want["base"]
    assert want[METHOD] != want["base"]


def test_every_question_and_prompt_counts_in_a_benchs_hash(small_bench):
    tasks = {task: replace(split, test=split.test[1:]) for task, split in small_bench.tasks.items()}
    changes = [
        {"policy": small_bench.policy[1:]},
        {"benign": small_bench.benign[1:]},
        {"tasks": tasks},
        {"seed": 1},
        {"n_prompts": 2},
    ]
    assert len({bench_hash(replace(small_bench, **change)) for change in [{}, *changes]}) == 1 + len(changes)


# tune.py


@pytest.fixture
def weighed(monkeypatch) -> list:
    """Benches judge a model by how far its weights are from the first one met. Gives the languages asked, in order."""
    asked = []

    def measure(bench, loaded, judge, base=None):
        weights = torch.cat([projection.weight.detach().flatten() for projection in loaded.projections])
        moved = float((weights - base.log_probs).norm()) if base else 0.0
        asked.append(bench.language.name)
        counts = (max(0, 50 - round(moved)), round(moved / 20), round(moved / 10), 100 - round(moved / 20))
        rates = [Rate(min(max(count, 0), 100), 100) for count in counts]
        return Measurement(*rates, (moved**2 / 100,)), Benign([], weights.clone())

    monkeypatch.setattr(Bench, "measure", measure)
    return asked


def command(pair, *more: object) -> list[str]:
    words = ["--base_model", pair / "base", "--finetune_model", pair / "tuned", "--results", pair / "effects"]
    return [str(word) for word in [*words, "--language", "en", "hi", "--trials", 14, *more]]


@pytest.fixture
def tune(run_script, pair, weighed, tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "RESULTS", tmp_path)
    return lambda *more: run_script(script, *command(pair, *more))


def written(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_each_language_gets_a_file_a_table_and_its_own_base(tune, weighed, tmp_path, capsys):
    assert tune() == 0
    assert {name for name in written(tmp_path / "tuning") if name.endswith(".json")} == {
        "base_English.json",
        "base_Hindi.json",
    }
    assert weighed == ["English"] * 15 + ["Hindi"] * 15
    found = [files.read_json(tmp_path / "tuning" / f"base_{name}.json") for name in ("English", "Hindi")]
    assert [item["language"] for item in found] == ["English", "Hindi"]
    assert found[0]["ranking_sha256"] != found[1]["ranking_sha256"]
    out, error = capsys.readouterr()
    assert all(
        f"{name}: 14 trials on policy-validation and everyday-validation" in out for name in ("English", "Hindi")
    )
    assert "other questions" in out and "proxy" in out
    assert "study" not in error and "Trial" not in error  # Optuna's own log


def test_the_table_has_the_base_the_front_and_the_chosen_point(tune, tmp_path, capsys):
    assert tune("--language", "en") == 0
    found = files.read_json(tmp_path / "tuning" / "base_English.json")
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines[2 : 3 + len(found["front"])]]
    assert [row[0] for row in rows] == ["base", *map(str, found["front"])]
    assert sum("<- chosen" in line for line in lines) == 1
    chosen = found["chosen"]
    assert any(f"--scaling_factor {chosen['scaling_factor']}" in x and f"--top {chosen['n_heads']}" in x for x in lines)


def test_without_a_point_to_choose_the_table_says_so(tune, tmp_path, capsys):
    assert tune("--language", "en", "--max_refusals", 0, "--min_scaling", 9, "--shares", 1, 1) == 0
    assert "chosen: none, none of 14 trials" in capsys.readouterr().out
    assert files.read_json(tmp_path / "tuning" / "base_English.json")["chosen"] is None


def test_a_finished_language_is_told_again_and_not_measured(tune, weighed, tmp_path, capsys, monkeypatch):
    assert tune() == 0
    first, files_before = capsys.readouterr().out, written(tmp_path)
    weighed.clear()
    monkeypatch.setattr("soteria.models.loading.load_model", lambda *_: pytest.fail("a model was loaded"))
    assert tune() == 0
    assert (capsys.readouterr().out, written(tmp_path)) == (first, files_before)
    assert not weighed


def test_one_more_language_leaves_the_finished_one_alone(tune, weighed):
    assert tune("--language", "hi") == 0
    weighed.clear()
    assert tune() == 0
    assert weighed == ["English"] * 15


@pytest.mark.parametrize(
    "option", [("--seed", 1), ("--policy", "policy"), ("--benign", "everyday"), ("--max_scaling", 9)]
)
def test_other_options_are_measured_anew(option, tune, weighed):
    assert tune("--language", "en", "--trials", 2) == 0
    weighed.clear()
    assert tune("--language", "en", "--trials", 2, *option) == 0
    assert len(weighed) == 3


def test_another_tuned_model_behind_the_same_name_is_measured_anew(run_script, pair, weighed, tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "RESULTS", tmp_path / "results")
    options = ["--finetune_model", tmp_path / "tuned", "--language", "en", "--trials", 2]
    for seed in (1, 2):
        weighed.clear()
        save_tiny_model(tmp_path / "tuned", "llama", seed=seed)
        assert run_script(script, *command(pair, *options)) == 0
        assert len(weighed) == 3


def test_ctrl_c_ends_with_130_and_the_same_command_goes_on(tune, weighed, tmp_path, monkeypatch, capsys):
    measure = Bench.measure

    def interrupted(*arguments):
        if len(weighed) == 20:
            raise KeyboardInterrupt
        return measure(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Bench, "measure", interrupted)
        assert tune() == 130
    assert "goes on from here" in capsys.readouterr().err
    weighed.clear()
    assert tune() == 0
    assert weighed == ["Hindi"] * (1 + 14 - 4)  # the base once more: its answers are not kept
    resumed = written(tmp_path)
    monkeypatch.setattr(paths, "RESULTS", tmp_path / "whole")
    assert tune() == 0
    assert written(tmp_path / "whole") == resumed


def test_killed_at_any_moment_and_resumed_the_bytes_are_the_same(pair, weighed, tmp_path, monkeypatch):
    def run(name, **kill) -> None:
        monkeypatch.setattr(paths, "RESULTS", tmp_path / name)
        run_in_child(script, command(pair), **kill)

    def size(name) -> int:
        return sum(path.stat().st_size for path in (tmp_path / name).rglob("*.jsonl"))

    run("whole")
    expected, draw, stages = written(tmp_path / "whole"), random.Random(0), set()
    for index in range(6):
        name, enough, later = str(index), draw.uniform(0.05, 1) * size("whole"), draw.uniform(0, 0.02)

        def kill_when(child, name=name, enough=enough, later=later):
            while child.is_alive() and size(name) < enough:
                time.sleep(0.001)
            time.sleep(later)

        run(name, kill_when=kill_when)
        stages.add(tuple(sorted((each, len(text)) for each, text in written(tmp_path / name).items())))
        run(name)
        assert written(tmp_path / name) == expected
    assert len(stages) >= 3  # the kills fell into different stages


def test_effects_of_another_model_are_refused(run_script, pair, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(paths, "RESULTS", tmp_path)
    for task in TASKS:
        save_tensor(torch.rand(2, 2, 4), effect_path(tmp_path / "other", f"{task}_English"))
    assert run_script(script, *command(pair, "--language", "en", "--results", tmp_path / "other")) == 2
    assert "(2, 4)" in capsys.readouterr().err and not (tmp_path / "tuning").exists()


def test_the_ranking_is_that_of_the_effects(tune, pair, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "soteria.grid.tuning.steered_in_place", lambda loaded, steering: nullcontext(asked.append(steering.heads))
    )
    assert tune("--language", "hi", "--trials", 3) == 0
    ranking = rank_heads(mean_effect(pair / "effects", "Hindi", list(TASKS)))
    assert len(asked) == 3 and all(heads == ranking[: len(heads)] for heads in asked)
