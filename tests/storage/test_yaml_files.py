"""YAML whose numbers and keys are not what people mean by them."""

import pytest

from soteria.errors import UserError
from soteria.grid.grid_file import read_grid
from soteria.storage.yaml_files import read_yaml


def test_yaml_is_read_as_it_looks_or_refused(tmp_path):
    path = tmp_path / "grid.yaml"
    path.write_text("a: 1\nb: [0.5, '1:30', x:1, 0, 0.10, '010']\nc: {d: yes}\ne: 2026-13-01\n", encoding="utf-8")
    found = {"a": 1, "b": [0.5, "1:30", "x:1", 0, 0.1, "010"], "c": {"d": True}, "e": "2026-13-01"}
    assert read_yaml(path, "") == found
    for text, said in (
        ("a: 1\nb: 2\na: 3\n", "the key 'a' is given twice"),
        ("a: {b: 1, b: 2}", "the key 'b' is given twice"),
        ("a: 1:30", "1:30 would be read as a number of sixties"),
        ("a: [1:30.5]", "1:30.5 would be read"),
        ("[" * 3000, "not valid YAML"),
        ("[" * 120 + "]" * 120, "nested too deep"),
        ("a0: &a0 [1]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9)), "anchors"),
        ("a: &a [*a]", "nested too deep"),
        ("a: [", "not valid YAML"),
        ("a: 010", "010 would be read as an octal number"),
        ("a: [+0_17]", "octal"),
        ('a: !!int "1:30"', "1:30 would be read"),
        ("a: {<<: {b: 1}}", "merge keys (<<) are not read"),
        ("a: !!set {b, c}", "not valid YAML"),
        ("a: !!binary aGk=", "not valid YAML"),
        *(
            (f"a: !!{tag} {value}", "not valid YAML")
            for tag in ("int", "float", "bool")
            for value in ('""', "[1]", "x")
        ),
        ("a: !!map [b]", "not valid YAML"),
        ("a: !!int -", "not valid YAML"),
    ):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match="not valid YAML") as error:
            read_yaml(path, "")
        assert said in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(UserError, match="nowhere"):
        read_yaml(tmp_path / "other.yaml", "nowhere")


@pytest.mark.parametrize(
    "line",
    [
        "scaling_factor: true",
        "scaling_factor: 1\nablations: {scaling_factors: [1, no]}",
        "scaling_factor: 1\nheads: yes",
        "scaling_factor: 1\nlimits: {max_refusals: yes}",
        "scaling_factor: 1\njudge_options: {'openai:m': {max_tokens: yes}}",
    ],
)
def test_a_truth_value_is_no_number(tmp_path, line):
    path = tmp_path / "grid.yaml"
    path.write_text(
        "models: [{base: a, tuned: b}]\nlanguages: [en]\ntasks: [antonym]\nprompt_sets: [policy]\njudges: [refusal]\n"
        f"{line}\n",
        encoding="utf-8",
    )
    with pytest.raises(UserError, match="truth values in YAML"):
        read_grid(path)
