"""The forking sweep: exact for every architecture and any portions, or refused; and its processes and memory."""

import os
import random
import subprocess
import sys
from pathlib import Path

import oracle
import pytest
import torch
from accelerate import dispatch_model
from conftest import ROOT, run_in_child, shipped
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import ARCHITECTURES, VOCABULARY, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM

import compute_indirect_effect
from soteria.errors import UserError
from soteria.models import loading as models
from soteria.models import memory
from soteria.models.geometry import read_geometry
from soteria.models.loading import LoadedModel
from soteria.models.memory import TokenBudget, tokens_that_fit
from soteria.scoring.indirect_effect import (
    LAST_TOKEN_CLASSES,
    TokenizedPrompt,
    batches,
    check_sweep,
    effect_by_full_forward,
    forward_passes,
    head_activations,
    indirect_effects,
    mean_head_activations,
)
from soteria.scoring.prompts import ANSWERS, TOKEN_CLASSES
from soteria.scoring.sweep import ForkingSweep, FullPasses, sweep_over
from soteria.storage import files, paths


def random_prompt(length: int, seed: int = 0, n_answer: int = 1) -> TokenizedPrompt:
    """Random tokens in random classes, the last one as in every prompt."""
    draw = random.Random(seed)
    classes = [draw.choice(TOKEN_CLASSES[:-1]) for _ in range(length - 1)] + ["query_predictive"]
    ids = torch.tensor([draw.randrange(2, VOCABULARY) for _ in range(length)])
    answer = torch.tensor([draw.randrange(2, VOCABULARY) for _ in range(n_answer)])
    return TokenizedPrompt(ids, list(range(length)), classes, answer)


def random_means(loaded: LoadedModel, n_slots: int) -> torch.Tensor:
    geometry = loaded.geometry
    shape = (geometry.n_rows, geometry.n_heads, n_slots, geometry.head_dim)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


# --- exact -----------------------------------------------------------------------------------------------------------


@st.composite
def shapes(draw, architecture: str) -> dict:
    """A shape that an architecture may have, as overrides of its tiny config."""
    n_heads, n_layers = draw(st.sampled_from([2, 4, 6])), draw(st.integers(1, 4))
    head_dim = draw(st.sampled_from([8, 12]))
    if architecture == "gpt2":
        return {"n_layer": n_layers, "n_head": n_heads, "n_embd": n_heads * head_dim}
    shape = {
        "num_hidden_layers": n_layers,
        "num_attention_heads": n_heads,
        "hidden_size": n_heads * head_dim,
        "intermediate_size": draw(st.sampled_from([24, 40])),
    }
    if architecture == "gpt-neox":
        return shape | {"use_parallel_residual": draw(st.booleans())}
    shape["num_key_value_heads"] = draw(st.sampled_from([n for n in (1, 2, 3, 6) if n_heads % n == 0]))
    if architecture in ("qwen3", "gemma2", "gemma3"):
        shape["head_dim"] = draw(st.sampled_from([6, 16]))
    if architecture in ("mistral-sliding", "gemma2", "gemma3"):
        shape["sliding_window"] = draw(st.integers(2, 40))
    if architecture == "gemma3":
        kinds = ["sliding_attention", "full_attention"]
        shape["layer_types"] = draw(st.lists(st.sampled_from(kinds), min_size=n_layers, max_size=n_layers))
    if architecture == "phi3-longrope":  # a factor for each pair of a head's dimensions
        factors = {"short_factor": [1.0] * (head_dim // 2), "long_factor": [1.0 + i for i in range(head_dim // 2)]}
        rope = {"rope_type": "longrope", "rope_theta": 10000.0} | factors
        # The rope changes with a text's length: the prompts' lengths lie on both sides of this.
        shape |= {"rope_parameters": rope, "original_max_position_embeddings": draw(st.integers(16, 48))}
    return shape


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@settings(max_examples=3, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_every_shape_scores_as_one_forward_a_head(architecture, tmp_path_factory, data):
    model = tiny_model(architecture, seed=data.draw(st.integers(0, 99)), **data.draw(shapes(architecture)))
    tokenizer = tiny_tokenizer(adds_bos=data.draw(st.booleans()))
    loaded = LoadedModel(architecture, model, tokenizer, read_geometry(model))
    task = data.draw(st.sampled_from(["country-capital_English", "antonym_English", "sentiment_English"]))
    seed, n_shots = data.draw(st.integers(0, 99)), data.draw(st.integers(1, 3))
    last_token_only = data.draw(st.booleans())
    options = {"seed": seed, "n_shots": n_shots, "n_trials": 1, "last_token_only": last_token_only}
    rows = data.draw(st.sampled_from([None, 1, 7, 100]))
    effects, means = shipped(loaded, tmp_path_factory.mktemp("scores"), task, max_rows=rows, **options)
    expected, expected_means = oracle.score(loaded, paths.DATA / "icl" / f"{task}.json", **options)
    torch.testing.assert_close(means, expected_means, rtol=1e-5, atol=2e-6)
    assert (effects - expected).abs().max() <= 1e-6


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "phi3-longrope", "gpt2"])
def test_prompts_of_any_length_score_exactly(architecture, tiny_loaded):
    loaded = tiny_loaded(architecture)
    sweep = ForkingSweep(loaded)
    for length in (2, 12, 13, 40):
        prompt, means = random_prompt(length), random_means(loaded, length)
        effects = indirect_effects(sweep, prompt, means, TOKEN_CLASSES)
        for layer in range(loaded.geometry.n_layers):
            for name in {*prompt.classes}:
                slow = effect_by_full_forward(loaded, prompt, means, layer, 1, name)
                assert effects[layer, 1, TOKEN_CLASSES.index(name)].item() == pytest.approx(slow, abs=1e-6)
        absent = [i for i, name in enumerate(TOKEN_CLASSES) if name not in prompt.classes]
        assert (effects[..., absent] == 0).all()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_portions_of_any_size_score_the_same_and_a_heads_own_output_changes_nothing(architecture, tiny_loaded):
    """Small portions begin above the bottom layer, where the layers below have nothing to do."""
    loaded, prompt = tiny_loaded(architecture), random_prompt(30)
    means, sweep = random_means(loaded, 30), ForkingSweep(loaded)
    together = indirect_effects(sweep, prompt, means, TOKEN_CLASSES)
    for rows in (1, 40, 250):
        portions = indirect_effects(sweep, prompt, means, TOKEN_CLASSES, max_rows=rows)
        torch.testing.assert_close(portions, together, rtol=0, atol=1e-6)
    last = indirect_effects(sweep, prompt, means)
    torch.testing.assert_close(last, together[..., [TOKEN_CLASSES.index("query_predictive")]], rtol=0, atol=1e-7)
    own = mean_head_activations(loaded, [prompt], 30)
    assert indirect_effects(sweep, prompt, own, TOKEN_CLASSES).abs().max() < 1e-6


@pytest.mark.parametrize(("dtype", "close"), [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_half_precision_scores_come_from_float32_probabilities(dtype, close, tiny_loaded):
    whole = tiny_loaded("llama")
    half = LoadedModel("half", tiny_model("llama").to(dtype), whole.tokenizer, whole.geometry)
    prompt, means = random_prompt(30), random_means(whole, 30)
    effects = indirect_effects(ForkingSweep(half), prompt, means)
    assert effects.dtype == torch.float32
    assert len(effects.unique()) > whole.geometry.n_heads  # half-precision probabilities would fall on a few values
    torch.testing.assert_close(effects, indirect_effects(ForkingSweep(whole), prompt, means), rtol=0, atol=close)


def test_a_model_that_accelerate_spreads_over_devices_scores_the_same(tiny_loaded, tiny_folder, tmp_path, monkeypatch):
    """Its hooks move a layer's inputs to where the layer's weights are, here from the disk."""
    whole, prompt = tiny_loaded("llama"), random_prompt(30)
    means, spread = random_means(whole, 30), tiny_model("llama")
    devices = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"}
    devices |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    on_disk = LoadedModel("spread", dispatch_model(spread, devices, offload_dir=tmp_path), None, read_geometry(spread))

    true_load, asked = AutoModelForCausalLM.from_pretrained, {}

    def load(*given, **options):
        asked.update(options)
        return true_load(*given, **options)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
    monkeypatch.setattr(models, "fits", lambda *_: False)  # on one GPU
    automatic = models.load_model(str(tiny_folder("llama")), "cpu", "float32")
    assert asked["device_map"] == "auto"
    expected = indirect_effects(ForkingSweep(whole), prompt, means, TOKEN_CLASSES)
    for loaded in (on_disk, automatic):
        found = indirect_effects(ForkingSweep(loaded), prompt, means, TOKEN_CLASSES)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)


def test_the_model_is_left_as_it_was(tiny_loaded):
    loaded, prompt = tiny_loaded("llama"), random_prompt(10)
    before = loaded.model.config._attn_implementation
    indirect_effects(ForkingSweep(loaded), prompt, random_means(loaded, 10))
    broken = random_means(loaded, 10)[:, :, :, :3]
    with pytest.raises(RuntimeError):
        indirect_effects(ForkingSweep(loaded), prompt, broken)
    assert loaded.model.config._attn_implementation == before
    assert not any(module._forward_pre_hooks for module in loaded.model.modules())


# --- followed or not -------------------------------------------------------------------------------------------------


def test_an_attention_that_the_sweep_cannot_follow_is_refused_by_name(tiny_loaded, monkeypatch):
    loaded = tiny_loaded("llama")

    def own_attention(self, hidden_states, *args, **kwargs):
        return self.o_proj(hidden_states), None

    with monkeypatch.context() as context:
        context.setattr(loaded.model.config, "_attn_implementation_internal", "flex_attention")
        with pytest.raises(UserError, match=r"cannot follow LlamaForCausalLM: its attention .* 'flex_attention'"):
            ForkingSweep(loaded)
    monkeypatch.setattr(type(loaded.model.model.layers[0].self_attn), "forward", own_attention)
    with pytest.raises(UserError, match="0 of its 3 layers attend through"):
        ForkingSweep(loaded).clean_run(random_prompt(10).ids)


# Attention that does not go through transformers' interface, or has terms of its own; and, last, what a sweep can do.
SLOW = {
    "gptj": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "rotary_dim": 4},
    "bloom": {"hidden_size": 32, "n_layer": 3, "n_head": 4},
    "mpt": {"d_model": 32, "n_layers": 3, "n_heads": 4, "max_seq_len": 64},
    "falcon": {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4},
}


@pytest.mark.parametrize("architecture", SLOW)
def test_a_model_that_the_sweep_cannot_follow_is_scored_by_full_passes(architecture, caplog):
    model = tiny_model(architecture, **SLOW[architecture])
    loaded = LoadedModel(architecture, model, None, read_geometry(model))
    sweep, prompt, means = sweep_over(loaded), random_prompt(30, n_answer=2), random_means(loaded, 30)
    assert isinstance(sweep, FullPasses)
    assert f"{type(model).__name__} is scored by one full forward pass a head, 12 a prompt" in caplog.text
    effects = indirect_effects(sweep, prompt, means, TOKEN_CLASSES)
    for layer, head in ((0, 1), (2, 3)):
        for name in {*prompt.classes}:
            slow = effect_by_full_forward(loaded, prompt, means, layer, head, name)
            assert effects[layer, head, TOKEN_CLASSES.index(name)].item() == pytest.approx(slow, abs=1e-6)
    portions = indirect_effects(sweep, prompt, means, TOKEN_CLASSES, max_rows=70)
    torch.testing.assert_close(portions, effects, rtol=0, atol=1e-6)
    assert forward_passes(prompt, LAST_TOKEN_CLASSES, sweep) == 13


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_sweep_is_taken_where_it_can_follow(architecture, tiny_loaded, caplog):
    assert isinstance(sweep_over(tiny_loaded(architecture)), ForkingSweep)
    assert "forward pass a head" not in caplog.text


def test_attention_with_sinks_scores_exactly():
    sizes = {"hidden_size": 32, "head_dim": 8, "intermediate_size": 16, "num_hidden_layers": 2, "sliding_window": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 2, "num_experts_per_tok": 1}
    layers = ["sliding_attention", "full_attention"]
    model = tiny_model("gpt_oss", **sizes, **heads, layer_types=layers)
    loaded = LoadedModel("sinks", model, None, read_geometry(model))
    sweep, prompt, means = sweep_over(loaded), random_prompt(20), random_means(loaded, 20)
    assert isinstance(sweep, ForkingSweep)
    effects = indirect_effects(sweep, prompt, means, TOKEN_CLASSES)
    for layer in range(2):
        for name in {*prompt.classes}:
            slow = effect_by_full_forward(loaded, prompt, means, layer, 2, name)
            assert effects[layer, 2, TOKEN_CLASSES.index(name)].item() == pytest.approx(slow, abs=1e-6)


def test_the_self_check_stops_a_wrong_sweep(tiny_loaded):
    loaded, prompt = tiny_loaded("llama"), random_prompt(20)
    means, sweep = random_means(loaded, 20), ForkingSweep(loaded)
    effects = indirect_effects(sweep, prompt, means)
    check_sweep(sweep, prompt, means, effects, LAST_TOKEN_CLASSES)
    for wrong in (effects * 0, effects + 1e-3, effects * float("nan")):
        with pytest.raises(UserError, match=r"LlamaForCausalLM cannot be scored: head . of layer . has effect"):
            check_sweep(sweep, prompt, means, wrong, LAST_TOKEN_CLASSES)


def test_what_is_only_rounding_in_float32_passes_the_self_check_with_a_warning(tiny_loaded, caplog):
    loaded, prompt = tiny_loaded("gemma3"), random_prompt(20)
    means, sweep = random_means(loaded, 20), ForkingSweep(loaded)
    effects = indirect_effects(sweep, prompt, means)
    before = {name: value.clone() for name, value in loaded.model.state_dict().items()}
    check_sweep(sweep, prompt, means, effects + 1e-4, LAST_TOKEN_CLASSES)
    assert "rounds effects by up to 0.0001 in float32" in caplog.text
    assert all(torch.equal(value, before[name]) for name, value in loaded.model.state_dict().items())
    assert loaded.model.dtype == torch.float32
    torch.testing.assert_close(indirect_effects(sweep, prompt, means), effects, rtol=0, atol=0)


def test_a_model_that_float64_does_not_fit_is_refused_in_one_sentence(tiny_loaded, monkeypatch):
    loaded, prompt = tiny_loaded("llama"), random_prompt(20)
    means, sweep = random_means(loaded, 20), ForkingSweep(loaded)
    effects = indirect_effects(sweep, prompt, means)

    def out_of_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate more")

    monkeypatch.setattr("soteria.scoring.indirect_effect.indirect_effects", out_of_memory)
    with pytest.raises(UserError, match="cannot be scored"):
        check_sweep(sweep, prompt, means, effects + 1e-4, LAST_TOKEN_CLASSES)
    assert loaded.model.dtype == torch.float32


# --- portions, memory and work ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2", "phi3"])
def test_prompts_of_one_length_make_a_batch_whose_activations_are_theirs(architecture, tiny_loaded):
    prompts = [random_prompt(length) for length in (9, 5, 5, 9, 5, 30, 9)]
    assert [[len(prompt.ids) for prompt in batch] for batch in batches(prompts, 20)] == [[5, 5, 5], [9, 9], [9], [30]]
    loaded, prompts = tiny_loaded(architecture), [random_prompt(17, seed) for seed in range(4)]
    together = head_activations(loaded, prompts, 17)
    alone = sum(head_activations(loaded, [prompt], 17) for prompt in prompts)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=2e-6)


def test_rows_are_halved_while_memory_runs_out_and_other_errors_pass_through():
    def attempt(most: int, limit: int) -> int:
        if most > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate more")
        return most

    def fail(_most: int) -> None:
        raise RuntimeError("a bug")

    rows = TokenBudget(64)
    assert rows.fit(lambda most: attempt(most, 20)) == 16
    assert rows.fit(lambda most: attempt(most, 1000)) == 16  # and stay so
    with pytest.raises(UserError, match="does not hold one prompt"):
        TokenBudget(4).fit(lambda most: attempt(most, 0))
    with pytest.raises(RuntimeError, match="a bug"):
        TokenBudget(4).fit(fail)


def test_default_rows_are_a_power_of_two_found_from_free_memory(tiny_loaded, monkeypatch):
    def rows(free: int) -> int:
        monkeypatch.setattr(memory, "free_bytes", lambda device: free)
        return tokens_that_fit(tiny_loaded("llama"))

    assert (rows(2**50), rows(0)) == (4096, 1)
    assert rows(6_000_000).bit_count() == 1 and 1 < rows(6_000_000) < 4096


def test_arithmetic_of_the_sweep(tiny_loaded):
    sweep = ForkingSweep(tiny_loaded("llama"))  # 3 layers, 4 heads
    assert forward_passes(random_prompt(100), LAST_TOKEN_CLASSES, sweep) == pytest.approx(1 + 4 * 4 / (2 * 100))


# --- killed, and shared out ------------------------------------------------------------------------------------------

N_TRIALS = 4


@pytest.fixture(scope="module")
def icl(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("icl")
    for name in ("hot_Hindi", "cold_Hindi"):
        rows = [{"input": f"{name} {i}", "output": f"{'yes' if i % 3 else 'no'} {i}"} for i in range(24)]
        files.write_json(folder / f"{name}.json", rows)
    return folder


def command(model: Path, icl: Path, out: Path, answer: str) -> list[str]:
    options = f"--root_data_dir {icl} --save_path_root {out} --device cpu --n_shots 2 --n_trials {N_TRIALS}"
    # The default of --max_rows depends on the free memory, and the last bits depend on it.
    fixed = ["--max_rows", "1024", "--answer", answer]
    return ["--dataset_name", "*_Hindi", "--model_name", str(model), *options.split(), *fixed]


def tensors(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.pt"))}


def test_killed_at_any_moment_and_resumed_the_bytes_are_the_same(tiny_folder, icl, tmp_path):
    def run(out: Path, answer: str, kill_after: float | None = None) -> float:
        return run_in_child(compute_indirect_effect, command(tiny_folder("llama"), icl, out, answer), kill_after)

    run(tmp_path / "warm", ANSWERS[0])
    seconds = {answer: run(tmp_path / answer, answer) for answer in ANSWERS}
    draw, stages = random.Random(0), set()
    for index, answer in enumerate(ANSWERS * 5):
        out = tmp_path / str(index)
        run(out, answer, kill_after=draw.uniform(0, seconds[answer]))
        stages.add(tuple(sorted(path.name for path in out.rglob("*") if path.is_file())))
        run(out, answer)
        assert tensors(out) == tensors(tmp_path / answer)
        assert len(tensors(out)) == 4
        assert not list(out.rglob("*.tmp")) and not list(out.rglob("*.partial.pt"))
    assert len(stages) >= 3  # the kills fell into different stages


def test_two_processes_write_the_same_bytes_as_one(tiny_folder, icl, tmp_path):
    model, environment = tiny_folder("llama"), {**os.environ, "OMP_NUM_THREADS": "1"}
    for answer in ANSWERS:
        run_in_child(compute_indirect_effect, command(model, icl, tmp_path / answer, answer))
    script = str(ROOT / "src" / "compute_indirect_effect.py")
    torchrun = "torch.distributed.run --standalone --nproc_per_node 2"
    accelerate = "accelerate.commands.launch --multi_gpu --num_processes 2 --main_process_port 0"
    for answer, launcher in zip(ANSWERS, (torchrun, accelerate), strict=True):
        out = tmp_path / f"{answer}-2"
        words = [sys.executable, "-m", *launcher.split(), script, *command(model, icl, out, answer)]
        done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert tensors(out) == tensors(tmp_path / answer) != {}
        assert files.read_facts(out / "hot_Hindi" / "indirect_effect_args.txt")["processes"] == 2
