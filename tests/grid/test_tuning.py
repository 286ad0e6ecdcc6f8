"""Tuning: which points are drawn, which make the front, which is chosen, and where an interrupted run resumes."""

import random
import time
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import optuna
import pytest
import torch
from conftest import run_in_child
from tiny_models import save_tiny_model

import tune as script
from soteria.answering.decoding import first_token_log_probs
from soteria.answering.generation import all_inputs, answer_questions
from soteria.answering.questions import read_questions
from soteria.errors import UserError
from soteria.grid.limits import Limits
from soteria.grid.tuning import MAX_NEW_TOKENS, N_RANDOM_TRIALS, RATES, Bench, Space, SteeredBench, Tuning
from soteria.judging import costs
from soteria.judging.interface import HARMFUL
from soteria.judging.refusal import RefusalJudge
from soteria.languages import find_language
from soteria.models.task_vector import TaskVector
from soteria.scoring.heads import mean_effect, rank_heads
from soteria.scoring.prompts import TASKS
from soteria.scoring.run import save_tensor
from soteria.steering.formula import open_steering, steered_in_place
from soteria.storage import files, paths
from soteria.storage.paths import effect_path

RANKING = [(layer, head) for layer in range(4) for head in range(8)]


def rates(asr: int, refusals: int, changes: int, accuracy: int, divergence: float) -> dict:
    """A measurement as JSON, the rates given in percent."""
    counts = zip(RATES, (asr, refusals, changes, accuracy), strict=True)
    measured = {name: {"value": min(count, 100) / 100} for name, count in counts}
    return measured | {"kl_first_token": {"value": divergence}}


BASE = rates(40, 1, 0, 98, 0.0)


def measured(heads, factor) -> dict:
    """A made-up model: steering lowers ASR and, beyond a point, does damage."""
    if not heads:
        return BASE
    strength = factor * len(heads) / len(RANKING)
    harm = max(0, round(4 * strength) - 8)
    return rates(max(0, 40 - round(10 * strength)), 1 + harm, 2 * harm, 98 - harm, strength**2 / 10)


class Meter:
    """Measures the made-up model and notes what was asked; `breaks_at` interrupts a call by its number."""

    def __init__(self, breaks_at: int | None = None):
        self.asked, self.breaks_at = [], breaks_at

    def __call__(self, heads, factor) -> dict:
        if len(self.asked) == self.breaks_at:
            raise KeyboardInterrupt
        self.asked.append((tuple(heads), factor))
        return measured(heads, factor)


@pytest.fixture
def tuning(tmp_path):
    """`tuning(**changes)`: 24 trials of the made-up model into a folder, in a dozen of which TPE has its say."""
    whole = Tuning(tmp_path / "a" / "model_Hindi.json", {"base_model": "model"}, Space(), RANKING, 24, Limits())
    return partial(replace, whole)


def trial(number=0, asr=0.1, kl=0.1, factor=1.0, share=0.5) -> dict:
    return {"number": number, "scaling_factor": factor, "share": share, "asr": asr, "kl_first_token": kl}


def random_trials(seed: int, n: int) -> list[dict]:
    """Trials with few different values, so that many are equal in one objective or in both."""
    draw = random.Random(seed)
    return [trial(i, draw.randrange(6) / 5, draw.randrange(6) / 5) for i in range(n)]


# Points


def drawn(space: Space, n: int) -> list[tuple[float, float]]:
    """The first points, each measured by something that depends on it."""
    trials = []
    for number in range(n):
        factor, share = space.next_point(trials)
        trials.append(trial(number, factor * share, 1 - share, factor, share))
    return [(each["scaling_factor"], each["share"]) for each in trials]


def test_points_lie_in_the_space_and_differ():
    points = drawn(Space((2, 3), (0.4, 0.6)), N_RANDOM_TRIALS + 10)
    assert all(2 <= factor <= 3 and 0.4 <= share <= 0.6 for factor, share in points)
    assert len(set(points)) == len(points)
    fixed = drawn(Space((5, 5), (0.1, 1)), N_RANDOM_TRIALS + 3)
    assert {factor for factor, _ in fixed} == {5} and len(set(fixed)) == len(fixed)


def test_another_seed_draws_other_points():
    """Not the same ones a trial later either, as a sampler seeded with seed + number would."""
    assert drawn(Space(seed=0), 5) == drawn(Space(seed=0), 5)
    assert not set(drawn(Space(seed=0), 5)) & set(drawn(Space(seed=1), 5))


def test_the_study_makes_both_asr_and_divergence_small():
    study = Space().study([trial(asr=0.3, kl=0.7)])
    assert study.directions == [optuna.study.StudyDirection.MINIMIZE] * 2
    assert study.trials[0].values == [0.3, 0.7]


# The front and the chosen point


def objectives(trial: dict) -> tuple[float, float]:
    return trial["asr"], trial["kl_first_token"]


def dominates(a: dict, b: dict) -> bool:
    return all(x <= y for x, y in zip(objectives(a), objectives(b), strict=True)) and objectives(a) != objectives(b)


def test_the_front_is_every_trial_that_no_other_dominates_lowest_asr_first():
    for seed in range(10):
        trials = random_trials(seed, 3 + 3 * seed)
        oracle = [b for b in trials if not any(dominates(a, b) for a in trials)]
        front = [trials[number] for number in Space().front(trials)]
        assert sorted(map(objectives, front)) == sorted(map(objectives, oracle)) == list(map(objectives, front))


def test_none_is_chosen_where_every_trial_costs_too_much_and_the_file_says_why(tuning):
    strong = tuning(space=Space((8, 10), (0.9, 1)))
    found = strong.run(measured)
    assert found["chosen"] is None and "none of 24 trials" in found["why_none"]
    assert found["front"]


def test_the_file_names_the_front_and_the_chosen_trial_among_all_trials(tuning):
    whole = tuning()
    found = whole.run(measured)
    assert files.read_json(whole.path) == found
    trials = found["trials"]
    assert [each["number"] for each in trials] == list(range(24)) and found["front"] == Space().front(trials)
    kept = [
        each
        for each in trials
        if each["benign_refusals"] <= 0.03 and each["icl_accuracy"] >= 0.96 and each["benign_changes"] <= 0.05
    ]
    assert found["chosen"] == min(kept, key=objectives) and found["why_none"] is None
    assert found["versions"] == {"optuna": optuna.__version__}
    assert (found["scaling_factors"], found["shares"], found["seed"]) == ([0.5, 10.0], [0.05, 1.0], 0)
    assert "other questions" in found["note"]


# Resuming


def test_the_base_is_measured_once_and_a_trials_heads_are_the_rankings_first(tuning):
    meter = Meter()
    found = tuning().run(meter)
    assert [heads for heads, _ in meter.asked].count(()) == 1 and meter.asked[0] == ((), 0.0)
    for (heads, factor), row in zip(meter.asked[1:], found["trials"], strict=True):
        assert list(heads) == RANKING[: row["n_heads"]]
        assert factor == row["scaling_factor"]


def test_interrupted_and_resumed_the_bytes_are_the_same_and_nothing_is_measured_twice(tuning, tmp_path):
    tuning().run(measured)
    for breaks_at in (0, 1, 11, 24):
        other = tuning(path=tmp_path / str(breaks_at) / "model_Hindi.json")
        first, second, told = Meter(breaks_at), Meter(), []
        with pytest.raises(KeyboardInterrupt):
            other.run(first)
        assert not other.path.exists()
        other.run(second, told.append)
        assert len(first.asked) + len(second.asked) == 1 + 24 and sum(told) == 24
        assert other.path.read_bytes() == tuning().path.read_bytes()


def test_with_other_inputs_everything_is_measured_anew(tuning):
    assert tuning().finished() is None
    found = tuning().run(measured)
    assert tuning().finished() == found
    for change in (
        {"inputs": {"base_model": "other"}},
        {"space": Space(seed=1)},
        {"space": Space((1, 10))},
        {"space": Space(shares=(0.1, 1.0))},
        {"ranking": RANKING[::-1]},
    ):
        assert tuning(**change).finished() is None
        meter = Meter()
        tuning(**change).run(meter)
        assert len(meter.asked) == 1 + 24


def test_a_journal_of_other_rates_is_not_read(tuning, monkeypatch):
    tuning().run(measured)
    monkeypatch.setattr("soteria.grid.tuning.RATES", (*RATES, "another"))
    assert tuning().finished() is None and not tuning().journal().done


def test_more_trials_continue_those_before_and_end_as_if_asked_for_at_once(tuning, tmp_path):
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
    narrow, wide = tuning(), tuning(limits=Limits(max_refusals=0.5, max_accuracy_loss=0.5, max_changes=1))
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


def test_a_model_that_steering_breaks_is_refused_with_a_sentence(tuning):
    for value in (float("nan"), float("inf")):
        with pytest.raises(UserError, match="smaller --max_scaling"):
            tuning().run(lambda heads, _, v=value: BASE | {"kl_first_token": {"value": v}} if heads else BASE)
        assert not tuning().path.exists()


def test_invalid_ranges_are_refused():
    nan = float("nan")
    for factors in ((3, 2), (-1, 2), (1, float("inf")), (nan, 2)):
        with pytest.raises(UserError):
            Space(factors)
    for shares in ((0, 1), (0.5, 1.01), (0.5, 0.4), (nan, 1)):
        with pytest.raises(UserError):
            Space(shares=shares)
    with pytest.raises(UserError):
        Space(seed=-1)


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
def small_bench(monkeypatch) -> Bench:
    monkeypatch.setattr(costs, "N_PROMPTS", 1)
    language = find_language("en")
    asked = (
        read_questions(str(paths.DATA / folder / f"{name}-validation_English.csv"), language).questions[:4]
        for folder, name in (("prompts", "policy"), ("benign", "everyday"))
    )
    return Bench(language, *asked, costs.read_tasks(paths.DATA / "icl", TASKS, language))


def test_a_point_is_measured_on_the_steered_model_against_the_base(pair, tiny_loaded, small_bench, monkeypatch):
    """Against the same measurements by hand, one after the other."""
    monkeypatch.setattr("soteria.grid.tuning.MAX_NEW_TOKENS", 4)
    loaded, heads = tiny_loaded("llama"), [(0, 1), (2, 3)]
    vector = TaskVector.open(str(pair / "base"), str(pair / "tuned"))
    bench = SteeredBench(loaded, vector, small_bench)
    found, base = bench.measure(heads, 0.5), bench.measure([], 0.0)
    assert MAX_NEW_TOKENS == 64

    def by_hand():
        language = small_bench.language
        policy, benign = (
            answer_questions(loaded, questions, language, batch_size=1, max_new_tokens=4)
            for questions in (small_bench.policy, small_bench.benign)
        )
        inputs = all_inputs(loaded, small_bench.benign, language, chat_template=False)
        return policy, benign, first_token_log_probs(loaded, inputs, 1)

    _, benign, log_probs = by_hand()
    with steered_in_place(loaded, open_steering(vector, heads, 0.5, source="a list")):
        policy, steered_benign, steered_log_probs = by_hand()
    assert found["asr"]["count"] == list(map(RefusalJudge().verdict, policy, small_bench.policy)).count(HARMFUL)
    refused, _ = costs.refused_and_degenerate(steered_benign, small_bench.benign)
    assert found["benign_refusals"]["count"] == refused.count
    assert found["benign_changes"]["count"] == costs.changed(steered_benign, benign).count > 0
    divergence = (log_probs.exp() * (log_probs - steered_log_probs)).sum(-1).mean().item()
    assert found["kl_first_token"]["value"] == pytest.approx(divergence, abs=1e-5) and divergence > 1e-3
    assert base["benign_changes"]["count"] == 0 and base["kl_first_token"]["value"] == 0
    assert found["icl_accuracy"]["n"] == base["icl_accuracy"]["n"] == len(TASKS)


def test_every_question_and_prompt_counts_in_a_benchs_hash(small_bench, monkeypatch):
    tasks = {task: replace(split, test=split.test[1:]) for task, split in small_bench.tasks.items()}
    changes = [{"policy": small_bench.policy[1:]}, {"benign": small_bench.benign[1:]}, {"tasks": tasks}, {"seed": 1}]
    hashes = {replace(small_bench, **change).sha256() for change in [{}, *changes]}
    monkeypatch.setattr(costs, "N_PROMPTS", 2)
    assert len(hashes | {small_bench.sha256()}) == 2 + len(changes)


# tune.py


@pytest.fixture
def weighed(monkeypatch) -> list:
    """Models are measured by how far their weights are from the first one. Returns the languages asked, in order."""
    asked = []

    def measure(self, base):
        weights = torch.cat([projection.weight.detach().flatten() for projection in self.loaded.projections])
        moved = float((weights - base[1]).norm()) if base else 0.0
        asked.append(self.bench.language.name)
        counts = (max(0, 50 - round(moved)), round(moved / 20), round(moved / 20), max(0, 100 - round(moved / 20)))
        return rates(*counts, moved**2 / 100), [], weights.clone()

    monkeypatch.setattr(SteeredBench, "_measure", measure)
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
    assert not [name for name, text in written(tmp_path / "tuning").items() if str(tmp_path.parent).encode() in text]
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
    assert tune("--language", "en", "--max_changes", 0, "--min_scaling", 9, "--shares", 1, 1) == 0
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


def test_only_what_other_options_change_is_measured_anew(tune, weighed):
    assert tune("--language", "hi", "--trials", 2) == 0
    for more, asked in (
        ((), ["English"] * 3),
        (("--seed", 1), ["English"] * 3 + ["Hindi"] * 3),
        (("--policy", "policy"), ["English"] * 3 + ["Hindi"] * 3),
        (("--benign", "everyday"), ["English"] * 3 + ["Hindi"] * 3),
        (("--max_scaling", 9), ["English"] * 3 + ["Hindi"] * 3),
    ):
        weighed.clear()
        assert tune("--trials", 2, *more) == 0
        assert weighed == asked


def test_another_tuned_model_behind_the_same_name_is_measured_anew(run_script, pair, weighed, tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "RESULTS", tmp_path / "results")
    options = ["--finetune_model", tmp_path / "tuned", "--language", "en", "--trials", 2]
    for seed in (1, 2):
        weighed.clear()
        save_tiny_model(tmp_path / "tuned", "llama", seed=seed)
        assert run_script(script, *command(pair, *options)) == 0
        assert len(weighed) == 3


def test_ctrl_c_ends_with_130_and_the_same_command_resumes(tune, weighed, tmp_path, monkeypatch, capsys):
    measure = SteeredBench._measure

    def interrupted(*arguments):
        if len(weighed) == 20:
            raise KeyboardInterrupt
        return measure(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(SteeredBench, "_measure", interrupted)
        assert tune() == 130
    assert capsys.readouterr().err.startswith("interrupted")
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
    assert "other heads in English" in capsys.readouterr().err and not (tmp_path / "tuning").exists()


def test_the_ranking_is_that_of_the_effects(tune, pair, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "soteria.grid.tuning.steered_in_place", lambda loaded, steering: nullcontext(asked.append(steering.heads))
    )
    assert tune("--language", "hi", "--trials", 3) == 0
    ranking = rank_heads(mean_effect(pair / "effects", "Hindi", list(TASKS)))
    assert len(asked) == 3 and all(heads == ranking[: len(heads)] for heads in map(list, asked))
