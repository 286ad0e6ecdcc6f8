"""Fine-tuning: what is learned, that interruptions change nothing, and that the result goes through the other steps."""

import json
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from conftest import ROOT, run_in_child
from tiny_models import EOS, ending_with, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM
from transformers.trainer_pt_utils import safe_globals

import finetune
import steer
from soteria.answering import fine_tuning
from soteria.answering.generation import all_inputs
from soteria.answering.questions import read_pairs
from soteria.answering.training_rows import FineTuning, training_rows
from soteria.languages import find_language
from soteria.models.loading import load_model
from soteria.scoring.heads import write_heads

ENGLISH, HINDI = find_language("en"), find_language("hi")
PAIRS = [(f"hot {row}?", " ".join(["cold"] * (1 + row % 5))) for row in range(16)]
ADAPTER = "adapter_model.safetensors"
IM_END = (
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}<|endoftext|>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


@pytest.fixture
def words(tmp_path, tiny_folder) -> Callable[..., list[str]]:
    """The arguments of `finetune.py` on PAIRS, with the given ones changed."""
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps({"prompt": q, "output": a}) + "\n" for q, a in PAIRS))

    def words(*options: str, output: Path = tmp_path / "out", **given: object) -> list[str]:
        base = {"base_model": tiny_folder("llama"), "dataset": tmp_path / "pairs.jsonl", "output": output}
        settings = {"rank": 4, "learning_rate": 0.01, "batch_size": 4, "save_steps": 1, "device": "cpu"}
        return [*(f"--{key}={value}" for key, value in {**base, **settings, **given}.items()), *options]

    return words


def facts_of(folder: Path) -> dict:
    return json.loads((folder / "soteria.json").read_text())


# What is learned


def test_only_the_answers_tokens_and_the_end_token_have_a_loss(tiny_loaded, words, run_script, tmp_path):
    loaded = tiny_loaded("llama")
    rows, counts = training_rows(loaded, {ENGLISH: PAIRS}, FineTuning())
    prompts = all_inputs(loaded, [question for question, _ in PAIRS], ENGLISH, False)
    total, n_tokens = 0.0, 0
    for row, prompt, (_, answer) in zip(rows, prompts, PAIRS, strict=True):
        answered = row["input_ids"][len(prompt) :]
        assert row["input_ids"][: len(prompt)] == prompt and set(row["labels"][: len(prompt)]) == {-100}
        assert (
            loaded.tokenizer.decode(answered) == f" {answer}<|endoftext|>" and row["labels"][len(prompt) :] == answered
        )
        with torch.no_grad():
            logits = loaded.model(torch.tensor([row["input_ids"]])).logits[0, len(prompt) - 1 : -1]
        total += F.cross_entropy(logits, torch.tensor(answered), reduction="sum").item()
        n_tokens += len(answered)
    assert counts == {"rows": 16, "rows_left_out": 0, "answers_cut": 0}
    ended = replace(loaded, tokenizer=ending_with(EOS))
    assert training_rows(ended, {ENGLISH: PAIRS}, FineTuning())[0] == rows
    assert run_script(finetune, *words(batch_size=4, gradient_accumulation=4, max_steps=1)) == 0
    assert facts_of(tmp_path / "out")["first_loss"] == pytest.approx(total / n_tokens, rel=1e-5)


def test_long_answers_are_cut_and_long_prompts_left_out_and_both_are_counted(tiny_loaded):
    loaded, pairs = tiny_loaded("llama"), [("hot?", "cold"), ("hot?", "cold " * 50), ("hot " * 50, "cold")]
    short = len(training_rows(loaded, {ENGLISH: pairs[:1]}, FineTuning())[0][0]["input_ids"])
    rows, counts = training_rows(loaded, {ENGLISH: pairs}, FineTuning(max_tokens=short))
    assert [len(row["input_ids"]) for row in rows] == [short, short] and 0 not in rows[1]["input_ids"]
    assert counts == {"rows": 2, "rows_left_out": 1, "answers_cut": 1}


@pytest.mark.parametrize(("answer", "said"), [("cold<|endoftext|>", "'<|endoftext|>'"), ("cold < s >", None)])
def test_special_tokens_in_the_data_are_warned_of(answer, said, tiny_loaded, caplog):
    training_rows(tiny_loaded("llama"), {ENGLISH: [("hot?", answer)]}, FineTuning())
    assert [said in record.message for record in caplog.records] == ([True] if said else [])


def test_a_chat_templates_own_end_of_turn_ends_its_answers(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template, tokenizer.eos_token = IM_END, "<s>"
    tokenizer.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), "cpu", "float32")
    loaded.model.generation_config.eos_token_id = [0, 1]
    rows, _ = training_rows(loaded, {ENGLISH: [("hot?", " cold ")]}, FineTuning(chat_template=True))
    learned = [token for token in rows[0]["labels"] if token != -100]
    assert loaded.tokenizer.decode(learned) == "cold<|endoftext|>"
    assert loaded.tokenizer.decode(rows[0]["input_ids"]).endswith("<s>assistant\ncold<|endoftext|>")


def test_each_row_is_asked_in_its_own_language_and_rows_of_no_language_are_refused(
    words, tiny_loaded, run_script, tmp_path, capsys, caplog
):
    rows = [("en", "hot?", "cold"), ("hi", "गरम?", "cold"), ("sw", "moto?", "cold"), ("hi", "बड़ा?", "cold")]
    text = "".join(json.dumps({"language": code, "prompt": q, "answer": a}) + "\n" for code, q, a in rows)
    (tmp_path / "mixed.jsonl").write_text(text)
    assert run_script(finetune, *words(dataset=tmp_path / "mixed.jsonl"), "--language", "hi", "English", "hi") == 0
    assert "1 × 'sw'" in caplog.text and "× 'en'" not in caplog.text
    facts = facts_of(tmp_path / "out")
    assert facts["languages"] == ["Hindi", "English"] and facts["rows"] == 3
    loaded = tiny_loaded("llama")
    pairs = read_pairs(str(tmp_path / "mixed.jsonl"), [ENGLISH, HINDI])
    asked = [loaded.tokenizer.decode(row["input_ids"]) for row in training_rows(loaded, pairs, FineTuning())[0]]
    assert [HINDI.instruction in text for text in asked] == [False, True, True]
    assert run_script(finetune, *words(output=tmp_path / "other"), "--language", "hi", "English") == 2
    assert "same rows for Hindi and English" in capsys.readouterr().err


# Interruptions


def test_killed_at_any_moment_and_resumed_the_adapter_has_the_same_bytes(words, tmp_path, tiny_folder):
    def run(name: str, kill_after: float | None = None) -> float:
        base = tiny_folder("gpt2")  # has dropout: the random numbers have to resume too
        options = {"base_model": base, "batch_size": 2, "gradient_accumulation": 2, "epochs": 4, "save_steps": 3}
        return run_in_child(finetune, words(output=tmp_path / name / "out", **options), kill_after)

    run("warm")
    seconds, expected = run("whole"), (tmp_path / "whole" / "out" / ADAPTER).read_bytes()
    draw, stages = random.Random(0), set()
    for index in range(8):
        run(str(index), draw.uniform(0.2 * seconds, seconds))
        stages.add(tuple(sorted(path.name for path in (tmp_path / str(index)).glob("*.partial/*"))))
        run(str(index))
        assert (tmp_path / str(index) / "out" / ADAPTER).read_bytes() == expected
        assert [path.name for path in (tmp_path / str(index)).iterdir()] == ["out"]
        assert facts_of(tmp_path / str(index) / "out")["steps"] == 16
    assert len(stages) >= 3


def test_a_run_stopped_before_its_result_is_written_does_not_train_again(words, run_script, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(fine_tuning, "_write", stop)
        assert run_script(finetune, *words(max_steps=3)) == 130
    assert sorted(path.name for path in tmp_path.glob("*.partial/*")) == [
        "checkpoint-2",
        "checkpoint-3",
        "settings.json",
    ]
    assert run_script(finetune, *words(max_steps=3, rank=2)) == 2  # not over a run with other settings
    with safe_globals():  # none needs a pickle that can run code
        pickles = [path for ending in ("pt", "pth", "bin") for path in tmp_path.glob(f"*.partial/*/*.{ending}")]
        assert len([torch.load(path, weights_only=True) for path in pickles]) == 6
    monkeypatch.setattr(fine_tuning, "_train", stop)
    assert run_script(finetune, *words(max_steps=3)) == 0
    assert not list(tmp_path.glob("*.partial"))


def test_a_finished_output_is_kept_and_other_settings_are_refused(words, run_script, tmp_path, capsys):
    assert run_script(finetune, *words()) == 0
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert run_script(finetune, *words(save_steps=7)) == 0
    capsys.readouterr()
    for changed in ({"rank": 2}, {"seed": 1}, {"language": "Hindi"}):
        assert run_script(finetune, *words(**changed)) == 2
        assert "was not made from these inputs" in capsys.readouterr().err
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before


def test_a_loss_that_is_not_finite_is_refused(words, run_script, tmp_path, capsys):
    assert run_script(finetune, *words(learning_rate=1e30)) == 2
    assert "--learning_rate" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_two_processes_learn_what_one_does_from_batches_twice_as_large(words, tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    run_in_child(finetune, words(output=tmp_path / "one"))
    script = [str(ROOT / "src" / "finetune.py"), *words(output=tmp_path / "two", batch_size=2)]
    subprocess.run([*launcher, *script], check=True, capture_output=True, timeout=600)
    ours, theirs = (safetensors.torch.load_file(tmp_path / name / ADAPTER) for name in ("one", "two"))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)


# The result


@pytest.mark.parametrize(("model", "dtype"), [("llama", "bfloat16"), ("gpt2", "float32")])
def test_merging_adds_the_adapter_rounded_once_and_nothing_else(model, dtype, words, run_script, tmp_path):
    base = tmp_path / "base"
    tiny_model(model).to(getattr(torch, dtype)).save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    for name, options in (("adapter", ()), ("merged", ("--merge",))):
        assert run_script(finetune, *words(*options, output=tmp_path / name, base_model=base, layers="1-1")) == 0
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    want = peft.PeftModel.from_pretrained(model, tmp_path / "adapter").merge_and_unload().state_dict()
    got, before = (safetensors.torch.load_file(tmp_path / name / "model.safetensors") for name in ("merged", "base"))
    assert got.keys() == before.keys()
    for name, tensor in got.items():
        assert torch.equal(tensor, want[name].to(before[name].dtype)) and tensor.dtype == before[name].dtype
    changed = {name for name in got if not torch.equal(got[name], before[name])}
    assert changed and all(".1." in name for name in changed)
    AutoModelForCausalLM.from_pretrained(tmp_path / "merged")


def test_the_adapter_and_the_merged_model_steer_alike(words, run_script, tmp_path, tiny_folder):
    write_heads(tmp_path / "heads" / "English_Heads.json", [(0, 1), (2, 3)])
    for name, options in (("adapter", ()), ("merged", ("--merge",))):
        assert run_script(finetune, *words(*options, output=tmp_path / name)) == 0
        given = {"base_model": tiny_folder("llama"), "finetune_model": tmp_path / name, "scaling_factor": 2}
        given |= {"head_folder": tmp_path / "heads", "output": tmp_path / f"{name}-steered", "language": "en"}
        assert run_script(steer, *(f"--{key}={value}" for key, value in given.items())) == 0
    weights = [safetensors.torch.load_file(path) for path in sorted(tmp_path.glob("*-steered/model.safetensors"))]
    torch.testing.assert_close(*weights)
    before = safetensors.torch.load_file(tiny_folder("llama") / "model.safetensors")
    assert any(not torch.equal(weights[0][name], before[name]) for name in before)
