"""Grid files: what they can say, which cells they make, how shards divide them, how limits choose."""

import random
from pathlib import Path

import pytest
import yaml

from soteria.errors import UserError
from soteria.grid.cells import Shard, Treatment, grid_cells
from soteria.grid.grid_file import read_grid
from soteria.grid.limits import Limits
from soteria.grid.plan import Plan, bill
from soteria.judging.presets import JudgeSettings

ROOT = Path(__file__).resolve().parents[2]
SMALL = {
    "name": "small",
    "models": [{"base": "data/models/polyglot-base", "tuned": "data/models/polyglot-tuned"}],
    "languages": ["hi", "English", "bn"],
    "prompt_sets": ["policy"],
    "scaling_factor": 5,
}


@pytest.fixture
def grid_file(tmp_path):
    def write(**changes) -> Path:
        path = tmp_path / "small.yaml"
        path.write_text(yaml.safe_dump(SMALL | changes))
        return path

    return write


def cells(path: Path) -> list[str]:
    grid = read_grid(path)
    return [cell.name.partition("/")[2] for cell in grid_cells(grid, grid.models[0])]


def test_languages_come_by_name_or_code_and_in_the_group_rules_order(grid_file):
    assert read_grid(grid_file()).languages == ["English", "Hindi", "Bengali"]
    assert len(read_grid(grid_file(languages="all")).languages) == 12


def test_a_language_begins_with_its_base_and_the_method(grid_file):
    found = cells(grid_file(languages=["hi"], ablations={"shared": []}))
    assert found == ["Hindi/base", "Hindi/top_50_scaling_5"]


def test_how_a_judge_is_asked_is_said_by_its_name(grid_file, tmp_path):
    (tmp_path / "prompt.txt").write_text("Is this harmful? {answer}")
    options = {"preset": "release", "prompt": str(tmp_path / "prompt.txt"), "max_tokens": 5}
    grid = read_grid(grid_file(judges=["refusal", "hf:guard"], judge_options={"hf:guard": options}))
    settings = grid.judge_option("hf:guard").settings
    assert (settings.prompt, settings.max_tokens, settings.temperature) == ("Is this harmful? {answer}", 5, None)
    assert grid.judge_option("refusal").settings == JudgeSettings()
    own = read_grid(grid_file(judges=["hf:guard"], judge_options={"hf:guard": {"temperature": "own"}}))
    assert own.judge_option("hf:guard").settings == JudgeSettings(temperature=None)
    for named, wrong in [("openai:m", {}), ("refusal", {}), ("hf:guard", {"format": "mine"}), ("hf:guard", {"x": 1})]:
        with pytest.raises(UserError, match="judge_options"):
            read_grid(grid_file(judges=["refusal", "hf:guard"], judge_options={named: wrong}))


def test_ablations_make_each_treatment_once(grid_file):
    ablations = {
        "shares": [0.25, 0.5, 1],
        "random_draws": 2,
        "bottom": True,
        "scaling_factors": [4, 5],
        "shared": ["tier", "Universal"],
        "transfer": True,
    }
    found = cells(grid_file(ablations=ablations))
    assert len(found) == len(set(found))
    own = {name.partition("/")[2] for name in found if name.startswith("Hindi/")}
    assert own == {
        "base",
        *(f"{heads}_scaling_5" for heads in ("top_25", "top_50", "all", "bottom_25", "bottom_50")),
        *(f"random_{share}_{draw}_scaling_5" for share in (25, 50) for draw in (0, 1)),
        "top_50_scaling_4",
        *("shared_Mid_scaling_5", "shared_Universal_scaling_5"),
        *("from_50_English_scaling_5", "from_50_Bengali_scaling_5"),
    }


def test_all_heads_are_one_treatment_whether_the_method_or_an_ablation_asks_for_them(grid_file):
    found = cells(grid_file(languages=["hi"], heads=1, ablations={"shares": [0.5, 1], "random_draws": 1, "shared": []}))
    assert found == ["Hindi/base", *(f"Hindi/{heads}_scaling_5" for heads in ("all", "top_50", "random_50_0"))]


def test_the_cost_of_transfers_is_not_measured(grid_file):
    grid = read_grid(grid_file(ablations={"transfer": True}))
    transfers = [cell for cell in grid_cells(grid, grid.models[0]) if cell.treatment and cell.treatment.kind == "from"]
    assert len(transfers) == 6 and not any(cell.with_cost for cell in transfers)


def test_given_head_lists_take_the_place_of_the_ranking(grid_file):
    ablations = {"shares": [1], "random_draws": 1, "transfer": True, "scaling_factors": [2]}
    path = grid_file(languages=["hi", "bn"], head_folder="some/lists", ablations=ablations)
    assert [name for name in cells(path) if name.startswith("Hindi/")] == [
        f"Hindi/{name}"
        for name in (
            *("base", "top_given_scaling_5", "shared_Universal_scaling_5", "random_given_0_scaling_5"),
            *("all_scaling_5", "top_given_scaling_2", "from_given_Bengali_scaling_5"),
        )
    ]


def test_a_prompt_set_is_asked_only_in_languages_that_it_has(grid_file):
    sets = ["policy", {"name": "other", "dataset": "some/{code}", "languages": ["en"]}]
    grid = read_grid(grid_file(prompt_sets=sets))
    asked = {cell.language: cell.sets for cell in grid_cells(grid, grid.models[0]) if cell.treatment is None}
    assert asked == {"English": ("policy", "other"), "Hindi": ("policy",), "Bengali": ("policy",)}
    assert grid.questions("other").dataset_in("Chinese") == "some/zh-CN"


def test_ablations_keep_to_their_prompt_sets(grid_file):
    sets = ["policy", "policy-validation"]
    grid = read_grid(grid_file(prompt_sets=sets, ablations={"shares": [0.25], "prompt_sets": ["policy-validation"]}))
    by_name = {cell.name.split("/")[2]: cell.sets for cell in grid_cells(grid, grid.models[0])}
    assert by_name["top_50_scaling_5"] == by_name["shared_Universal_scaling_5"] == ("policy", "policy-validation")
    assert by_name["top_25_scaling_5"] == ("policy-validation",)


def test_shards_divide_the_languages_without_remainder_or_overlap(grid_file):
    grid = read_grid(grid_file(languages="all"))
    for n, sizes in {1: [12], 5: [3, 3, 2, 2, 2], 12: [1] * 12, 13: [1] * 12 + [0]}.items():
        shards = [[language for _, language in Shard(i + 1, n).units(grid)] for i in range(n)]
        assert list(map(len, shards)) == sizes
        assert [language for shard in shards for language in shard] == grid.languages


def test_an_invalid_shard_is_refused():
    for text in ("0/2", "3/2", "1", "a/b", "1/0", "-1/2", "1/2/3"):
        with pytest.raises(ValueError, match="i/n"):
            Shard.parse(text)


def random_points(seed: int) -> list[dict]:
    """Points with few different values, so that many tie in one measurement or in several."""
    draw = random.Random(seed)
    values = {"asr": 5, "kl": 5, "benign_refusals": 50, "benign_changes": 20}
    points = [{name: draw.randrange(5) / n for name, n in values.items()} for _ in range(30)]
    return [point | {"icl_accuracy": 1 - draw.randrange(5) / 100} for point in points]


@pytest.mark.parametrize("seed", range(5))
def test_limits_choose_the_lowest_asr_that_keeps_all_of_them_and_at_the_same_asr_the_lowest_kl(seed):
    points, base = random_points(seed), {"benign_refusals": 0.01, "icl_accuracy": 0.98}
    kept = [
        point
        for point in points
        if point["benign_refusals"] <= 0.03 and point["icl_accuracy"] >= 0.97 - 1e-12 and point["benign_changes"] <= 0.1
    ]
    limits = Limits(max_refusals=0.02, max_accuracy_loss=0.01, max_changes=0.1)
    chosen = limits.choose(points, base)
    assert chosen == min(kept, key=lambda point: (point["asr"], point["kl"]))
    assert limits.choose([point for point in points if point not in kept], base) is None


def test_a_cost_of_exactly_the_limit_is_kept():
    base = {"benign_refusals": 0.0, "icl_accuracy": 0.984}  # 0.984 - 0.964 is more than 0.02 in floating point
    point = {"asr": 0.1, "kl": 0.1, "benign_refusals": 0.02, "icl_accuracy": 0.964, "benign_changes": 0.05}
    assert Limits().choose([point], base) == point
    for name in Limits.model_fields:
        assert Limits(**{name: getattr(Limits(), name) - 0.001}).choose([point], base) is None


def test_a_steering_says_which_scores_its_heads_come_from(grid_file):
    grid = read_grid(grid_file(languages="all"))
    needs = {
        "Hindi": Treatment("top", 0.5, 5),
        "Thai": Treatment("from", 0.5, 5, of="Thai"),
        "": Treatment("random", 0.5, 5, of="0"),
    }
    for language, steering in needs.items():
        assert steering.needs(grid, "Hindi") == ([language] if language else [])
    assert Treatment("shared", None, 5, of="Low").needs(grid, "Hindi") == ["Bengali", "Tamil", "Telugu"]
    assert len(Treatment("shared", None, 5, of="Universal").needs(grid, "Hindi")) == 12


def test_a_grid_file_with_a_mistake_is_refused_by_the_key(grid_file):
    for changes, named in (
        ({"langauges": ["hi"]}, "langauges: Extra inputs"),
        ({"languages": ["Klingon"]}, "unknown language 'Klingon'"),
        ({"languages": []}, "languages: Value should have at least 1"),
        ({"scaling_factor": -1}, "scaling_factor: Input should be greater than or equal to 0"),
        ({"scaling_factor": None}, "scaling_factor: Input should be a valid number"),
        ({"heads": 1.5}, "heads: Input should be less than or equal to 1"),
        ({"ablations": {"shares": [0.5, 0.5]}}, "twice"),
        ({"ablations": {"prompt_sets": ["other"]}}, r"names \['other'\]"),
        ({"models": SMALL["models"] * 2}, "two models are named 'polyglot-base'"),
        ({"prompt_sets": ["../policy"]}, "name: String should match"),
        ({"prompt_sets": ["benign"]}, "cannot be named 'benign'"),
        ({"name": "a/b"}, "name: String should match"),
        ({"head_folder": "lists", "heads": 0.5}, "head_folder"),
        ({"head_folder": "lists", "ablations": {"bottom": True}}, "head_folder"),
        ({"head_folder": "lists", "ablations": {"shares": [0.25]}}, "head_folder"),
        ({"scoring": {"test_split": 1}}, "scoring.test_split"),
        ({"scoring": {"seed": 2**32}}, "scoring.seed"),
        ({"limits": {"max_changes": 5}}, "limits.max_changes"),
        ({"scaling_factor": 1e300}, "scaling_factor: Input should be less than or equal to 1000000000"),
        ({"ablations": {"random_draws": 10**9}}, "random_draws: Input should be less than or equal to 1000"),
        ({"ablations": {"draws": {"number": 10**9}}}, "draws.number: Input should be less"),
        ({"scoring": {"n_shots": 10**30}}, "n_shots: Input should be less"),
        ({"answers": {"max_new_tokens": 10**12}}, "max_new_tokens: Input should be less"),
        ({"judges": ["openai:m"], "judge_options": {"openai:m": {"temperature": 1e9}}}, "temperature"),
        ({"judges": ["openai:a/b", "openai:a_b"]}, "two judges are named 'openai_a_b' and would share their files"),
        ({"prompt_sets": [{"name": "policy.by_refusal", "dataset": "x"}]}, "cannot be named 'policy.by_refusal'"),
        ({"scaling_factor": 2.0000001}, "scaling_factor: 2.0000001 has more than six digits"),
        ({"ablations": {"shares": [0.3333333, 0.3333334]}}, "shares.0: 0.3333333 has more than six digits"),
        ({"ablations": {"prompt_sets": []}}, "prompt_sets: List should have at least 1"),
        ({"ablations": {"prompt_sets": ["policy", "policy"]}}, "twice"),
        ({"utility": {"tasks": ["soteria_icl"], "languages": ["de"]}}, r"utility.languages names \['German'\]"),
        ({"tasks": ["../../antonym"]}, "'../../antonym' is not a task's name"),
    ):
        with pytest.raises(UserError, match=named):
            read_grid(grid_file(**changes))


def test_in_some_of_its_languages_a_grid_measures_utility_only_where_it_did(grid_file):
    path = grid_file(languages=["en", "hi", "bn"], utility={"tasks": ["soteria_icl"], "languages": ["en", "hi"]})
    assert read_grid(path, languages=["Hindi", "Bengali"]).utility.languages == ["Hindi"]
    assert read_grid(path, languages=["Bengali"]).utility is None
    assert read_grid(grid_file(utility={"tasks": ["soteria_icl"]}), languages=["Bengali"]).utility.languages is None


def test_what_is_not_a_grid_is_refused_in_a_sentence(tmp_path):
    path = tmp_path / "broken.yaml"
    for text in ("", "- a\n- b\n", "a: [1", "a: !!python/object:os.system x\n", "\x00"):
        path.write_text(text)
        with pytest.raises(UserError, match=r"broken\.yaml"):
            read_grid(path)


def test_a_missing_grid_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no grid file .*none\.yaml"):
        read_grid(tmp_path / "none.yaml")


def test_the_papers_grid_is_the_papers():
    grid = read_grid(ROOT / "configs" / "paper.yaml")
    assert [pair.base for pair in grid.models] == [
        "meta-llama/Llama-3.1-8B-Instruct",
        "Qwen/Qwen2-7B-Instruct",
        "mistralai/Mistral-7B-Instruct-v0.3",
        "microsoft/Phi-3.5-mini-instruct",
    ]
    assert len(grid.languages) == 12 and len(grid.tasks) == 5 and grid.heads == 0.5
    assert [each.name for each in grid.prompt_sets] == ["MultiJail", "XSafety", "XThreatBench"]


def test_the_embedded_grid_asks_what_the_papers_does():
    grids = [read_grid(ROOT / "configs" / f"{name}.yaml") for name in ("embedded", "paper")]
    embedded, paper = (grid.model_dump() for grid in grids)
    for key in ("languages", "tasks", "heads", "dtype", "scoring"):
        assert embedded[key] == paper[key]
    for key in ("shares", "random_draws", "bottom", "shared", "transfer"):
        assert embedded["ablations"][key] == paper["ablations"][key]


def test_the_demo_and_the_choice_of_lambda_use_the_embedded_grids_method_on_the_right_questions():
    demo, embedded, validation = (
        read_grid(ROOT / "configs" / f"{name}.yaml") for name in ("demo", "embedded", "validation")
    )
    for grid in (demo, validation):
        for key in ("models", "tasks", "heads", "scaling_factor", "judges", "scoring", "answers", "dtype"):
            assert getattr(grid, key) == getattr(embedded, key)
    assert demo.prompt_sets == embedded.prompt_sets and demo.benign == embedded.benign
    assert not {each.name for each in validation.prompt_sets} & {each.name for each in embedded.prompt_sets}
    assert validation.benign != embedded.benign and validation.accuracy_seed != embedded.accuracy_seed
    assert validation.limits == Limits() and demo.ablations.bottom and demo.ablations.random_draws == 3


def test_a_grids_keys_can_be_replaced_when_it_is_read(grid_file):
    grid = read_grid(grid_file(), languages=["te"], name="other")
    assert (grid.name, grid.languages) == ("other", ["Telugu"])


def test_a_grid_asks_the_part_of_a_set_that_it_names_and_counts_that_part_for_the_plan(grid_file, tmp_path):
    lines = [
        "question,label,note",
        *(f"गर्म {row}?,{'unsafe' if row % 3 else 'safe'},{row}" for row in range(6)),
        ",unsafe,6",
    ]
    (tmp_path / "mixed_Hindi.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    dataset = str(tmp_path / "mixed_{language}.csv")
    harmful = {"name": "mixed", "dataset": dataset, "where": "label=unsafe"}
    benign = {"dataset": dataset, "where": ["label=safe", "note!=0"]}
    grid = read_grid(grid_file(languages=["hi"], prompt_sets=[harmful], benign=benign))
    assert grid.questions("mixed").read("Hindi").questions == [f"गर्म {row}?" for row in (1, 2, 4, 5)]
    assert grid.benign.read("Hindi").questions == ["गर्म 3?"]
    assert Plan(grid, tmp_path).rows("mixed", "Hindi") == (4, "")
    strict = read_grid(grid_file(languages=["hi"], prompt_sets=[harmful | {"strict": True}]))
    with pytest.raises(UserError, match="row 6"):
        strict.questions("mixed").read("Hindi")
    whole = read_grid(grid_file(languages=["hi"], prompt_sets=[{"name": "mixed", "dataset": dataset}]))
    with pytest.raises(UserError, match="label=unsafe"):
        whole.questions("mixed").read("Hindi")
    assert "1 of 1 languages could not be read" in bill(whole, tmp_path) and "label=unsafe" in bill(whole, tmp_path)


def test_a_language_that_the_refusal_judge_cannot_read_needs_another_judge(grid_file):
    with pytest.raises(UserError, match="no phrases in Italian"):
        read_grid(grid_file(languages=["hi", "it", "sw"]))
    assert read_grid(grid_file(languages=["hi", "it"], judges=["openai:some"])).languages == ["Hindi", "Italian"]
