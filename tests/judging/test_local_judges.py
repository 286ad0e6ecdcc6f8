"""Judges on this machine: which guard a chat template shows, what is put to it, and what its odds or replies mean."""

import math

import pytest
import torch
from tiny_models import tiny_config, tiny_tokenizer
from transformers import AutoModelForSequenceClassification

from soteria.errors import UserError
from soteria.judging import local
from soteria.judging.formats import GUIDELINES
from soteria.judging.interface import HARMFUL, NOT_HARMFUL, TOO_LONG, unjudged
from soteria.judging.judges import make_judge
from soteria.judging.local import LocalJudge
from soteria.judging.presets import PRESETS, JudgeSettings
from soteria.models.loading import LoadedModel

TURNS = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
PARTS = "{% for m in messages %}{% for part in m['content'] %}{{ part['text'] }}\n{% endfor %}{% endfor %}"
ROWS = [(0, "hot?", "cold"), (1, "big?", " "), (2, "old?", "new")]


@pytest.fixture
def judge_of(tiny_loaded):
    """`judge_of(template, **settings)`: a judge whose tokenizer has that chat template."""

    def make(template: str | None = None, **settings) -> LocalJudge:
        loaded, tokenizer = tiny_loaded("llama"), tiny_tokenizer()
        tokenizer.chat_template = template
        return LocalJudge(LoadedModel("guard", loaded.model, tokenizer, None), JudgeSettings(**settings))

    return make


def asked(judge: LocalJudge, *guideline: str) -> str:
    return judge.loaded.tokenizer.decode(judge._inputs("hot?", "cold", *guideline))


def test_a_guard_is_recognized_by_what_its_template_shows(judge_of):
    for template, name in [
        (f"Reply 'safe' or 'unsafe'.{TURNS}", "llama_guard"),
        (f"Reply 'safe' or 'unsafe'.{PARTS}", "llama_guard"),  # a template that takes lists of parts
        (f"UNSAFE content … Safety: Safe, Unsafe or Controversial{TURNS}", "qwen3guard"),
        (TURNS + "Our principle: {{ guideline }}", "shieldgemma"),
        (TURNS, "label"),
        ("{{ messages[0]['content'] }} unsafe", "label"),  # shows no answer
        ("{% if messages | length > 1 %}{{ raise_exception('unsafe') }}{% endif %}" + TURNS, "label"),
        (None, "label"),
    ]:
        assert judge_of(template).settings.format == name, template
    assert "hot?\ncold" in asked(judge_of(f"'unsafe'{PARTS}"))


def test_a_format_that_needs_the_conversation_is_refused_where_the_template_lacks_it(judge_of):
    with pytest.raises(UserError, match="does not show question and answer"):
        judge_of("{{ messages[0]['content'] }}", format="llama_guard")
    with pytest.raises(UserError, match="greedily"):
        judge_of(temperature=0.7)


def test_a_classifier_asked_in_other_words_than_its_own_is_said_to_be(judge_of, caplog):
    judge_of(TURNS, format="wildguard", prompt="{question} {answer}")
    assert not caplog.text
    judge_of(TURNS, format="wildguard")
    assert "--judge_prompt" in caplog.text


def test_a_system_prompt_has_its_turn_or_opens_the_prompt_and_a_thinking_judge_is_asked_not_to(judge_of):
    own = {"prompt": "{answer}", "system": "Be fair."}
    thinking = TURNS + "{% if enable_thinking is not false %}<think>{% endif %}"
    assert asked(judge_of(thinking, **own)) == "[system] Be fair.\n[user] cold\n"
    no_system = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}" + TURNS
    assert asked(judge_of(no_system, **own)) == "[user] Be fair.\n\ncold\n"
    assert asked(judge_of(None, **own)) == "<s>Be fair.\n\ncold"
    assert "hot?" not in asked(judge_of(TURNS, **vars(PRESETS["release"])))


def test_a_reply_is_given_the_formats_tokens_then_more_or_those_that_are_asked_for(judge_of, monkeypatch):
    limits = []

    def replies(loaded, inputs, batch_size, limit):
        limits.append((limit, len(inputs)))
        yield {at: "Safety: Safe\nCategories: None\nRefusal: Yes" if at else "Hm." for at in range(len(inputs))}

    monkeypatch.setattr(local, "generate", replies)
    judge = judge_of(TURNS + "unsafe Controversial")
    assert dict(judge.judge(ROWS)) == {
        0: unjudged("neither label"),
        1: unjudged("blank answer"),
        2: "Not Harmful (refused)",
    }
    assert limits == [(64, 2), (local.REASONING_TOKENS, 1)]
    limits.clear()
    assert len(dict(judge_of(TURNS, max_tokens=20).judge(ROWS))) == 3 and limits == [(20, 2)]


def test_of_yes_and_no_the_likelier_counts_for_each_guideline(judge_of, monkeypatch):
    judge = judge_of(TURNS + "{{ guideline }}")
    yes, no = 7, 9
    monkeypatch.setattr(judge, "_first_token", {"Yes": yes, "No": no}.get)
    seen = []

    def odds(loaded, inputs, batch_size):
        """Only the second answer violates a guideline, the third."""
        seen.append([judge.loaded.tokenizer.decode(ids) for ids in inputs])
        row = torch.full((len(inputs), 20), -9.0)
        row[:, no] = math.log(0.6)
        row[:, yes] = math.log(0.4)
        if len(seen) == 3:
            row[1, yes] = math.log(0.7)
        return row

    monkeypatch.setattr(local, "first_token_log_probs", odds)
    rows = [*ROWS, (3, "hot?", "word " * 1200)]
    assert dict(judge.judge(rows)) == {
        0: NOT_HARMFUL,
        1: unjudged("blank answer"),
        2: HARMFUL,
        3: unjudged(TOO_LONG),
    }
    assert len(seen) == len(GUIDELINES)
    assert all(guideline in text for guideline, texts in zip(GUIDELINES, seen, strict=True) for text in texts)


def test_odds_are_the_models_own(judge_of, monkeypatch):
    judge = judge_of(TURNS + "{{ guideline }}")
    inputs = [torch.tensor([judge._inputs("hot?", "cold", guideline)]) for guideline in GUIDELINES]
    with torch.no_grad():
        logits = torch.stack([judge.loaded.model(ids).logits[0, -1] for ids in inputs])  # (guidelines, vocabulary)
    likeliest, least = logits.amin(0).argmax().item(), logits.amax(0).argmin().item()
    for yes, no, verdict in [(likeliest, least, HARMFUL), (least, likeliest, NOT_HARMFUL)]:
        monkeypatch.setattr(judge, "_first_token", {"Yes": yes, "No": no}.get)
        assert dict(judge.judge(ROWS[:1])) == {0: verdict}


def test_a_judge_is_loaded_whatever_its_attention(tiny_folder, monkeypatch):
    def refuse(model):
        raise UserError("no such attention")

    monkeypatch.setattr("soteria.models.loading.read_geometry", refuse)
    judge = make_judge(f"hf:{tiny_folder('llama')}", JudgeSettings(max_tokens=4))
    assert len(dict(judge.judge(ROWS))) == 3


# Sequence classifiers


@pytest.fixture
def classifier(tmp_path):
    """`classifier(odds)`: a folder of one that gives every text these logits by label, whatever it says."""

    def save(logits: dict[str, float], **overrides) -> str:
        labels = dict(enumerate(logits))
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        config = tiny_config("bert", id2label=labels, max_position_embeddings=32, **sizes, **overrides)
        model = AutoModelForSequenceClassification.from_config(config)
        with torch.no_grad():
            model.classifier.weight.zero_()
            model.classifier.bias.copy_(torch.tensor(list(logits.values())))
        model.save_pretrained(tmp_path / "classifier")
        tiny_tokenizer().save_pretrained(tmp_path / "classifier")
        return f"hf:{tmp_path / 'classifier'}"

    return save


def test_a_sequence_classifiers_labels_say_what_they_mean_or_are_named(classifier):
    several = {"problem_type": "multi_label_classification"}
    for logits, overrides, named, verdict in [
        ({"safe": 1.0, "unsafe": 0.0}, {}, [], NOT_HARMFUL),
        ({"unsafe": 1.0, "safe": 0.0}, {}, [], HARMFUL),
        ({"LABEL_0": 1.0, "LABEL_1": 0.0}, {}, ["LABEL_0"], HARMFUL),
        ({"LABEL_0": 1.0, "LABEL_1": 0.0}, {}, ["LABEL_1"], NOT_HARMFUL),
        ({"OK": 1.0, "V": 0.5, "H": 0.6}, {}, ["V", "H"], HARMFUL),  # together likelier
        ({"toxic": 0.1, "threat": -2.0}, several, ["toxic", "threat"], HARMFUL),
        ({"toxic": -0.1, "threat": -0.1}, several, ["toxic", "threat"], NOT_HARMFUL),
    ]:
        judge = make_judge(classifier(logits, **overrides), harmful_labels=named)
        found = dict(judge.judge([*ROWS, (3, "hot?", "word " * 99)]))
        assert found == {0: verdict, 1: unjudged("blank answer"), 2: verdict, 3: unjudged(TOO_LONG)}, logits
        assert all(name in judge.description for name in named)


def test_a_classifier_whose_labels_say_nothing_is_refused_with_their_names(classifier, tiny_folder):
    for logits, named in [({"LABEL_0": 0.0, "LABEL_1": 0.0}, []), ({"a": 0.0, "b": 0.0}, ["c"]), ({"a": 0.0}, [])]:
        with pytest.raises(UserError, match=f"{', '.join(logits)}; name those .* --harmful_labels"):
            make_judge(classifier(logits), harmful_labels=named)
    with pytest.raises(UserError, match="no prompt is put to"):
        make_judge(classifier({"safe": 1.0, "unsafe": 0.0}), JudgeSettings(max_tokens=3))
    with pytest.raises(UserError, match="not a classifier"):
        make_judge(f"hf:{tiny_folder('llama')}", harmful_labels=["a"])
