"""Chat templates: what they must show, the date they say, and templates that refuse, fail or never end."""

import json
import threading
from types import SimpleNamespace

import pytest
from test_generation import ENGLISH
from tiny_models import save_tiny_model, tiny_tokenizer

from soteria.answering import chat
from soteria.answering.chat import chat_text
from soteria.answering.columns import model_settings
from soteria.answering.generation import prompt_text
from soteria.errors import UserError

TURNS = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% endfor %}"
PARTS = "{% for m in messages %}{% for part in m['content'] %}{{ part['text'] }}{% endfor %}{% endfor %}"
LONG_LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
GROWS = "{% set n = namespace(t='aaaaaaaa') %}{% for a in range(99) %}{% set n.t = n.t ~ n.t %}{% endfor %}"
ASKED = [{"role": "system", "content": "Be fair."}, {"role": "user", "content": "hot?"}]


def rendered(template: object, messages: list[dict] = ASKED[1:], **values) -> str:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return chat_text(tokenizer, messages, **values)


def test_a_template_that_wants_lists_of_parts_is_given_them():
    assert rendered(PARTS) == "hot?"
    asked = SimpleNamespace(tokenizer=tiny_tokenizer(), name="model")
    asked.tokenizer.chat_template = PARTS
    assert prompt_text(asked, "hot?", ENGLISH, chat_template=True).endswith("\n\nhot?")


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("Hello!", "it leaves out what is asked"),
        ("{{ messages[1]['content'] }}", "it leaves out what is asked"),  # the system's words
        ("{% for m in messages %}{{ m['content'].replace(' ', '') }}{% endfor %}", "it leaves out what is asked"),
        ("{{ raise_exception('System role not supported') }}", "System role not supported"),
        ("{% if %}", "TemplateSyntaxError"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "it calls itself without end"),
        ("{% for a in range(10**9) %}{% endfor %}", "Range too big"),
        (GROWS, "memory"),
        ("{{ 'a' * 10**12 }}", "memory"),
        ("{{ messages }}{{ 'a' * (2 * 10**7) }}", "it makes 200000"),
        ({"rag": TURNS, "tool_use": TURNS}, "several chat templates (rag, tool_use)"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused_in_one_sentence(template, reason):
    with pytest.raises(UserError) as refusal:
        rendered(template, ASKED)
    assert reason in str(refusal.value) and len(str(refusal.value).splitlines()) == 1
    assert rendered(TURNS) == "[user] hot?"  # the next one is not harmed


@pytest.mark.parametrize("template", [GROWS, "{{ 'a' * 10**12 }}", LONG_LOOP])
def test_a_template_that_takes_too_much_is_not_tried_twice(template, monkeypatch):
    asked, ask = [], chat._worker.ask
    monkeypatch.setattr(chat._worker, "ask", lambda request: asked.append(request) or ask(request))
    with pytest.raises(UserError, match="too much time or memory"):
        rendered(template)
    assert len(asked) == 1


def test_a_template_that_never_ends_is_ended_in_a_thread_too():
    found = []

    def ask():
        try:
            rendered(LONG_LOOP)
        except UserError as error:
            found.append(str(error))

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert "takes too much time" in found[0]


def test_the_date_that_a_template_says_is_fixed_and_among_what_answers_depend_on(tmp_path):
    assert rendered("{{ strftime_now('%d %b %Y') }} " + TURNS) == "26 Jul 2024 [user] hot?"
    folder = save_tiny_model(tmp_path / "model", "llama")
    without = model_settings(str(folder), ENGLISH, 8, chat_template=True)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = "{{ strftime_now('%Y') }}" + TURNS
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    made = model_settings(str(folder), ENGLISH, 8, chat_template=True)
    assert made.keys() - without.keys() == {"template_date"} and made["template_date"] == "2024-07-26"
    assert "template_date" not in model_settings(str(folder), ENGLISH, 8, chat_template=False)


def test_what_a_template_draws_it_draws_again():
    template = "{{ range(1000) | random }}" + TURNS
    assert rendered(template) == rendered(template)
