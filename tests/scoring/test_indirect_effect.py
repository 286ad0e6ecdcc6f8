"""Indirect effects against the slow, obvious scorer and against a planted circuit, and the prompts behind them."""

import logging
import random
import shutil
from dataclasses import replace

import numpy as np
import oracle
import pytest
import torch
from conftest import shipped
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.model_selection import train_test_split
from tiny_models import (
    ARCHITECTURES,
    EOS,
    ending_with,
    tiny_config,
    tiny_model,
    tiny_tokenizer,
    without_letters,
)
from transformers import AutoModelForCausalLM

from soteria.errors import UserError
from soteria.models.geometry import read_geometry
from soteria.models.loading import LoadedModel, load_geometry, load_model
from soteria.scoring import indirect_effect as ie
from soteria.scoring.indirect_effect import TokenizedPrompt, indirect_effects, tokenize
from soteria.scoring.prompts import (
    ANSWERS,
    FIRST,
    TOKEN_CLASSES,
    WHOLE,
    Example,
    MeanSlots,
    Prompt,
    PromptForm,
    answer_tokens,
    load_examples,
    token_roles,
)
from soteria.scoring.sweep import ForkingSweep
from soteria.storage import files, paths

ICL = paths.DATA / "icl"
ENGLISH, HINDI = "country-capital_English", "country-capital_Hindi"


def assert_same_scores(got, want, least=2e-5):
    """Within 1e-6, and within a thousandth of the largest effect, which must stand out from rounding."""
    (effects, means), (expected_effects, expected_means) = got, want
    assert effects.shape == expected_effects.shape and means.shape == expected_means.shape
    largest = expected_effects.abs().max().item()
    assert largest > least
    assert (effects - expected_effects).abs().max().item() <= min(1e-6, 1e-3 * largest)
    torch.testing.assert_close(means, expected_means, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("last_token_only", [True, False], ids=["last-token", "all-classes"])
@pytest.mark.parametrize("answer", ANSWERS)
def test_effects_and_means_equal_one_forward_a_head(architecture, last_token_only, answer, tiny_loaded, tmp_path):
    loaded = tiny_loaded(architecture, adds_bos=architecture != "gpt2")
    options = {"n_shots": 3, "n_trials": 2, "last_token_only": last_token_only, "answer": answer}
    got = shipped(loaded, tmp_path, ENGLISH, **options)
    # A random model gives answers of several tokens tiny probabilities, of which the effects are parts.
    assert_same_scores(
        got, oracle.score(loaded, ICL / f"{ENGLISH}.json", **options), 2e-5 if answer == FIRST else 1e-30
    )


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_another_seed_and_language_equal_one_forward_a_head(architecture, tiny_loaded, tmp_path):
    loaded = tiny_loaded(architecture, adds_bos=architecture != "gpt2")
    options = {"seed": 7, "n_shots": 4, "n_trials": 2, "test_split": 0.4}
    got = shipped(loaded, tmp_path, HINDI, **options)
    assert_same_scores(got, oracle.score(loaded, ICL / f"{HINDI}.json", **options))


# --- a circuit whose answer is known -------------------------------------------------------------------------------

PLANTED = (1, 2)


def _planted_model(tokenizer) -> LoadedModel:
    """A Llama whose every answer comes from one head.

    The residual stream has a direction each for the words yes (0) and no (1), and one that every token has (2). Head
    PLANTED looks at all tokens alike (queries and keys are zero) and copies directions 0 and 1 as they are: its output
    at the last token is the share of yes and of no in the prompt. The unembedding reads these two directions alone, so
    the more often the prompt says the answer, the likelier it is. All other heads write random values to directions
    from 8 up, which nothing reads: they change the last norm's scale a little and nothing else. Head (1, 3) has the
    same keys and values as the planted one (they share a KV head): only the output projection tells the two apart.
    """
    model = tiny_model("llama", num_hidden_layers=2)
    yes, no = (tokenizer(f" {word}").input_ids[-1] for word in ("yes", "no"))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if "norm" in name else 0.0)  # q, k and the MLPs stay zero
        embedding = model.model.embed_tokens.weight
        embedding[:, 2] = 1
        embedding[yes, 0] = embedding[no, 1] = 1
        model.lm_head.weight[yes, 0] = model.lm_head.weight[no, 1] = 8
        for layer in model.model.layers:
            values, output = layer.self_attn.v_proj.weight, layer.self_attn.o_proj.weight
            values.copy_(torch.randn(values.shape, generator=generator) * 0.3)
            output[8:] = torch.randn(output[8:].shape, generator=generator) * 0.02
        own_kv, own_head = slice(8, 16), slice(16, 24)  # KV head 1 of 2, head 2 of 4; heads are 8 wide
        layer = model.model.layers[PLANTED[0]].self_attn
        layer.v_proj.weight[own_kv] = 0
        layer.v_proj.weight[8, 0] = layer.v_proj.weight[9, 1] = 1
        layer.o_proj.weight[:, own_head] = 0
        layer.o_proj.weight[0, 16] = layer.o_proj.weight[1, 17] = 1
    return LoadedModel("planted", model, tokenizer, read_geometry(model))


def test_the_head_that_carries_the_answer_ranks_first_and_raises_it_where_the_mean_says_it_more(tmp_path):
    """The inputs are numbers of three digits, so that all prompts have as many tokens and a share is a count."""
    rows = [{"input": str(101 + i), "output": "yes" if i % 3 == 0 else "no"} for i in range(120)]
    files.write_json(tmp_path / "numbers.json", rows)
    options = {"seed": 3, "n_shots": 8, "n_trials": 12}
    effects, _ = shipped(_planted_model(tiny_tokenizer()), tmp_path / "out", "numbers", data=tmp_path, **options)
    clean, shuffled = oracle.draw(tmp_path / "numbers.json", test_split=0.3, **options)

    def count(examples, answer):
        return sum(output == answer for _, output in examples)

    # How often the means' prompts say each scored answer more than its own prompt says it.
    excess = torch.tensor(
        [np.mean([count(x, query[1]) for x, _ in clean]) - count(own, query[1]) for own, query in shuffled]
    )
    told_apart = excess.abs() >= 0.5
    effects, excess = effects[told_apart].flatten(1), excess[told_apart]
    assert len(effects) >= 4
    planted = PLANTED[0] * 4 + PLANTED[1]
    own = effects[:, planted].clone()
    effects[:, planted] = 0
    assert (own.abs() > 10 * effects.abs().max(dim=1).values).all()
    assert (own.sign() == excess.sign()).all() and (own > 0).any() and (own < 0).any()


# --- the prompts ---------------------------------------------------------------------------------------------------


@pytest.fixture
def tokenized(monkeypatch) -> list[tuple[Prompt, TokenizedPrompt]]:
    """The prompts of the scoring runs in a test, in the order drawn."""
    seen = []

    def remember(prompt, *rest):
        seen.append((prompt, tokenize(prompt, *rest)))
        return seen[-1][1]

    monkeypatch.setattr("soteria.scoring.indirect_effect.tokenize", remember)
    return seen


def test_prompts_are_the_draws_of_the_sampling_protocol(tiny_loaded, tmp_path, tokenized):
    loaded = tiny_loaded("llama")
    shipped(loaded, tmp_path, HINDI, seed=11, n_shots=3, n_trials=2)
    rows = load_examples(ICL / f"{HINDI}.json")
    random.seed(11)
    np.random.seed(11)
    train, rest = train_test_split(rows, test_size=0.3, random_state=11)
    _, valid = train_test_split(rest, test_size=0.3, random_state=11)
    expected = []
    for shuffled in (False, False, True, True):
        shown = np.random.choice(len(train), 3, replace=False)
        query = valid[np.random.choice(np.arange(len(valid)), 1, replace=False)[0]]
        outputs = [train[i].output for i in shown]
        if shuffled:
            outputs = list(np.random.permutation(outputs))
        examples = [f"Q: {train[i].input}\nA: {output}\n\n" for i, output in zip(shown, outputs, strict=True)]
        expected.append(("".join(examples) + f"Q: {query.input}\nA:", f" {query.output}"))
    assert [(prompt.text, prompt.answer) for prompt, _ in tokenized] == expected
    starts = {loaded.tokenizer.decode(found.ids[:2]) for _, found in tokenized}
    assert starts == {f"{loaded.tokenizer.bos_token}Q"}  # nothing is put before the tokenizer's own BOS


def test_a_tokenizer_without_bos_gets_endoftext_in_front(tiny_loaded, tmp_path, tokenized):
    loaded = tiny_loaded("gpt2", adds_bos=False)
    shipped(loaded, tmp_path, ENGLISH)
    assert all(prompt.text.startswith("<|endoftext|>Q: ") for prompt, _ in tokenized)
    assert {(found.ids[0].item(), found.classes[0]) for _, found in tokenized} == {
        (loaded.tokenizer.eos_token_id, "bos")
    }


HOT_COLD = Prompt([Example("hot", "cold")], Example("Zz", "small"), PromptForm())


def test_roles_and_mean_slots_of_a_known_prompt_are_those_written_by_hand():
    tokenizer = tiny_tokenizer()
    tokens = tokenizer.convert_ids_to_tokens(tokenizer(HOT_COLD.text).input_ids)
    roles, slots = token_roles(HOT_COLD, tokenizer), MeanSlots(1, PromptForm(), tokenizer)
    assert list(zip(tokens, [role.token_class for role in roles], strict=True)) == [
        ("<s>", "bos"),
        ("Q", "structural"),
        (":", "structural"),
        ("Ġhot", "demonstration"),
        ("Ċ", "separator"),
        ("A", "structural"),
        (":", "predictive"),
        ("Ġcold", "label"),
        ("Ċ", "end_of_example"),
        ("Ċ", "query_structural"),  # "cold\n\n" ends in one token, which "Q:" then splits in two
        ("Q", "query_structural"),
        (":", "query_structural"),
        *[(piece, "query_demonstration") for piece in ("Ġ", "Z", "z")],
        ("Ċ", "query_separator"),
        ("A", "query_structural"),
        (":", "query_predictive"),
    ]
    assert [slots.of(role) for role in roles] == [*range(12), 12, 12, 12, 13, 14, 15]  # Ġ, Z, z are one word
    assert len(slots) == 16
    assert tokenizer.convert_ids_to_tokens(answer_tokens(HOT_COLD, tokenizer, FIRST)) == ["Ġsmall"]


def test_punctuation_that_melts_into_a_newline_has_a_role_and_the_class_that_is_gone_no_effect(tiny_loaded):
    loaded = tiny_loaded("llama", melts_newlines=True)
    prompt = Prompt([Example("no.", "yes!")], Example("big.", "small"), PromptForm())
    slots = MeanSlots(1, PromptForm(), loaded.tokenizer)
    found = tokenize(prompt, loaded, slots)
    tokens = loaded.tokenizer.convert_ids_to_tokens(found.ids)
    assert list(zip(tokens, found.classes, strict=True)) == [
        ("<s>", "bos"),
        *[("Q", "structural"), (":", "structural"), ("Ġno", "demonstration"), (".Ċ", "demonstration")],
        *[("A", "structural"), (":", "predictive"), ("Ġyes", "label"), ("!ĊĊ", "label")],
        *[("Q", "query_structural"), (":", "query_structural")],
        *[("Ġbig", "query_demonstration"), (".Ċ", "query_demonstration")],
        *[("A", "query_structural"), (":", "query_predictive")],
    ]
    means = torch.randn(3, 4, len(slots), 8, generator=torch.Generator().manual_seed(0))
    effects = indirect_effects(ForkingSweep(loaded), found, means, TOKEN_CLASSES)
    gone = [TOKEN_CLASSES.index(name) for name in ("separator", "end_of_example", "query_separator")]
    assert effects[..., gone].abs().max() == 0
    assert effects[..., TOKEN_CLASSES.index("query_demonstration")].abs().max() > 1e-5


_words = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=12)
_TOKENIZERS = [tiny_tokenizer(adds_bos=bos, melts_newlines=melts) for bos in (True, False) for melts in (True, False)]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(_words, _words), min_size=1, max_size=4), st.sampled_from(range(len(_TOKENIZERS))))
def test_every_token_of_any_words_has_one_role_and_the_last_predicts(pairs, which):
    tokenizer = _TOKENIZERS[which]
    *shown, query = [Example(*pair) for pair in pairs]
    form = PromptForm() if which < 2 else PromptForm().starting_with("<|endoftext|>")
    prompt = Prompt(shown, query, form)
    roles = token_roles(prompt, tokenizer)
    assert len(roles) == len(tokenizer(prompt.text).input_ids)
    assert [i for i, role in enumerate(roles) if role.token_class == "query_predictive"] == [len(roles) - 1]
    slots = MeanSlots(len(shown), form, tokenizer)
    assert all(0 <= slots.of(role) < len(slots) for role in roles)
    assert slots.of(roles[-1]) == len(slots) - 1
    assert tokenizer.decode(answer_tokens(prompt, tokenizer, WHOLE)) == prompt.answer


# --- what is refused -----------------------------------------------------------------------------------------------

UNLIKE = {
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2},  # no attention at all
    "gpt_neo": {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
}


@pytest.mark.parametrize("model_type", UNLIKE)
def test_an_architecture_whose_heads_cannot_be_told_apart_is_refused_by_name(model_type):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config(model_type, **UNLIKE[model_type]))
    with pytest.raises(UserError, match=f"^{type(model).__name__} cannot be handled: "):
        read_geometry(model)


def test_heads_of_another_width_than_the_configs_and_layers_of_unequal_width_are_refused():
    model = tiny_model("llama")
    model.config.head_dim = 4
    with pytest.raises(UserError, match="layer 0's output projection is 32 wide, not 4 heads of 4"):
        read_geometry(model)
    model = tiny_model("llama")
    model.model.layers[1].self_attn.o_proj = torch.nn.Linear(16, 32)
    with pytest.raises(UserError, match="layer 1's output projection is 16 wide, not 4 heads of 8"):
        read_geometry(model)


def test_a_prompt_longer_than_the_context_is_refused_in_one_sentence_before_its_roles_are_sought(
    tiny_loaded, tmp_path, monkeypatch, caplog
):
    """A role takes as long to find as the prompt to encode, and transformers warns of long prompts by itself."""
    loaded = tiny_loaded("gpt2", n_positions=40)
    loaded.tokenizer.model_max_length = 40
    monkeypatch.setattr(ie, "token_roles", lambda *_: pytest.fail("sought"))
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with pytest.raises(UserError, match=r"a prompt has \d+ tokens, .* takes 40; use fewer --n_shots"):
        shipped(loaded, tmp_path, ENGLISH, n_shots=10)
    assert not any(tmp_path.iterdir()) and "Token indices" not in caplog.text


def test_the_end_of_text_that_a_tokenizer_puts_behind_a_prompt_is_left_out_and_another_token_refused(tiny_loaded):
    loaded = tiny_loaded("llama")
    slots = MeanSlots(1, PromptForm(), loaded.tokenizer)
    for scored in (FIRST, WHOLE):
        plain = tokenize(HOT_COLD, loaded, slots, scored)
        ended = tokenize(HOT_COLD, replace(loaded, tokenizer=ending_with(EOS)), slots, scored)
        assert torch.equal(ended.ids, plain.ids) and torch.equal(ended.answer, plain.answer)
        assert (ended.slots, ended.classes) == (plain.slots, plain.classes)
    with pytest.raises(UserError, match="adds tokens"):
        tokenize(HOT_COLD, replace(loaded, tokenizer=ending_with("Q")), slots)


@pytest.mark.parametrize("melted", [": small", ": sma", "\nA: small", "Zz\nA: sm"])
@pytest.mark.parametrize("scored", [FIRST, WHOLE])
def test_a_token_that_spans_the_prompt_and_the_answer_is_refused(melted, scored):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(melted)
    with pytest.raises(UserError, match="merges the answer"):
        answer_tokens(HOT_COLD, tokenizer, scored)


@pytest.mark.parametrize("melted", ["\nA:", "Zz\nA:", "cold\n\nQ: Zz\nA:", "A: cold\n"])
def test_the_last_token_predicts_whatever_a_tokenizer_merges_into_it(melted):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(melted)
    roles = token_roles(HOT_COLD, tokenizer)
    assert len(roles) == len(tokenizer(HOT_COLD.text).input_ids)
    assert [at for at, role in enumerate(roles) if role.token_class == "query_predictive"] == [len(roles) - 1]


def test_a_tokenizer_without_a_languages_letters_scores_nothing(tiny_loaded, tmp_path):
    loaded = replace(tiny_loaded("llama"), tokenizer=without_letters())
    with pytest.raises(UserError, match="cannot read these texts"):
        shipped(loaded, tmp_path, "antonym_Bengali")


def test_weights_that_do_not_fit_the_config_are_refused(tiny_folder, tmp_path):
    shutil.copytree(tiny_folder("llama"), tmp_path, dirs_exist_ok=True)
    config = tmp_path / "config.json"
    files.write_json(config, files.read_json(config) | {"num_hidden_layers": 4})
    with pytest.raises(UserError, match="do not fit its config"):
        load_model(str(tmp_path), "cpu")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers 1000000000, more than any model"),
        ({"max_position_embeddings": 3 * 10**8}, "max_position_embeddings 300000000, more than any model"),
        ({"num_attention_heads": 10**400}, "num_attention_heads 1"),
        ({"text_config": {"vocab_size": 10**12}}, "vocab_size"),
        ({"intermediate_size": 10**6}, "do not fit its config .* parameters in"),  # it would fill a terabyte
    ],
)
def test_a_config_beyond_any_model_or_its_own_weight_files_is_refused_before_it_is_built(
    changed, said, tiny_folder, tmp_path, monkeypatch
):
    shutil.copytree(tiny_folder("llama"), tmp_path, dirs_exist_ok=True)
    config = tmp_path / "config.json"
    files.write_json(config, files.read_json(config) | changed)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("it is built"))
    with pytest.raises(UserError, match=said):
        load_model(str(tmp_path), "cpu")


@pytest.mark.parametrize("device", ["meta", "cpu:7", "", "mps"])
def test_a_device_that_holds_no_numbers_is_refused(device, tiny_folder):
    with pytest.raises(UserError, match=f"device '{device}' cannot be used"):
        load_model(str(tiny_folder("llama")), device)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_geometry_needs_no_weights(architecture, tiny_folder, tiny_loaded):
    options = {"adds_bos": architecture != "gpt2"}
    assert load_geometry(str(tiny_folder(architecture, **options))) == tiny_loaded(architecture, **options).geometry
