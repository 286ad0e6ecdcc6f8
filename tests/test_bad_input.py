"""Every script's bad inputs: one sentence on stderr that names the thing, status 2, nothing written."""

import argparse
import hashlib
import importlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import save_tiny_model
from transformers.models.llama.modeling_llama import LlamaMLP

from soteria import languages
from soteria.errors import UserError
from soteria.models.tensors import save_tensor
from soteria.scoring.prompts import TASKS
from soteria.storage import files, paths
from soteria.storage.paths import effect_path

ROOT = Path(__file__).resolve().parents[1]
N_EXAMPLES = int(os.environ.get("SOTERIA_EXAMPLES", 100))  # of hostile values of each script's options

# Sound commands in the folder that `place` makes. An option given again overrides the first.
SCORE = (
    "compute_indirect_effect --model_name base --dataset_name hot_Hindi --root_data_dir icl --save_path_root out "
    "--n_shots 2 --n_trials 1 --device cpu "
)
SELECT = "select_heads --results effects --language Hindi --tasks hot --head_folder new --heads_root out "
STEER = (
    "steer --base_model base --finetune_model tuned --language Hindi --scaling_factor 1 --head_folder heads "
    "--output out "
)
GENERATE = (
    "generate --model base --dataset questions.csv --language Hindi --output out.csv --column 'BASE ANSWER' "
    "--max_new_tokens 2 --device cpu "
)
FINETUNE = (
    "finetune --base_model base --dataset pairs.csv --language Hindi --output out --rank 2 --max_steps 1 "
    "--batch_size 2 --device cpu "
)
JUDGE = "judge --input answers.csv --output out.csv --judge refusal "
TUNE = "tune --base_model base --finetune_model tuned --language Hindi --results scored --trials 2 "


def plan(tuned="tuned", base="base", language="Hindi", data="questions.csv", factor="1", do_base="yes", batch="2"):
    """The eight arguments of run.sh, as its first command gets them."""
    return f"soteria.judging.pipeline {tuned} {base} {language} {data} {factor} {do_base} {batch} heads "


# What is wrong -> (command, what the sentence names)
CASES = {
    # step 0
    "finetune: unknown language": (FINETUNE + "--language Klingon", "Klingon"),
    "finetune: no such dataset": (FINETUNE + "--dataset nowhere", "nowhere"),
    "finetune: no answer column": (FINETUNE + "--dataset questions.csv", "'answer'"),
    "finetune: one column for both": (FINETUNE + "--answer_column question", "answers beside"),
    "finetune: no such prompt column": (FINETUNE + "--prompt_column words", "'words'"),
    "finetune: a blank answer": (FINETUNE + "--dataset unpaired.csv", "row 1"),
    "finetune: a blank prompt": (FINETUNE + "--dataset unpaired.csv --prompt_column other", "row 0"),
    "finetune: a subset of a file": (FINETUNE + "--subset hi", "'hi'"),
    "finetune: no such base": (FINETUNE + "--base_model ./nowhere", "./nowhere"),
    "finetune: layers beyond the model": (FINETUNE + "--layers 0-3", "layers 0 to 2"),
    "finetune: layers the wrong way round": (FINETUNE + "--layers 2-1", "2-1"),
    "finetune: no such modules": (FINETUNE + "--target_modules nope", "nope"),
    "finetune: no such modules beside others": (FINETUNE + "--target_modules o_proj nope", "'nope'"),
    "finetune: all modules and some": (FINETUNE + "--target_modules all-linear o_proj", "'all-linear'"),
    "finetune: a rank beyond any layer": (FINETUNE + "--rank 100000", "at most 4,096"),
    "finetune: no such modules in layers": (FINETUNE + "--target_modules nope --layers 0-1", "nope"),
    "finetune: modules that are not linear": (FINETUNE + "--target_modules embed_tokens", "embed_tokens"),
    "finetune: rank 0": (FINETUNE + "--rank 0", "--rank"),
    "finetune: learning rate 0": (FINETUNE + "--learning_rate 0", "--learning_rate"),
    "finetune: learning rate nan": (FINETUNE + "--learning_rate nan", "--learning_rate"),
    "finetune: epochs and steps": (FINETUNE + "--epochs 2", "--epochs"),
    "finetune: a seed below zero": (FINETUNE + "--seed -1", "--seed"),
    "finetune: a seed too large": (FINETUNE + "--seed 4294967296", "--seed"),
    "finetune: no room for answers": (FINETUNE + "--max_tokens 3", "--max_tokens"),
    "finetune: no chat template": (FINETUNE + "--chat_template", "chat template"),
    "finetune: float16 on a CPU": (FINETUNE + "--dtype float16", "float16"),
    "finetune: output over the base": (FINETUNE + "--output base", "base"),
    "finetune: an output that holds something else": (FINETUNE + "--output icl", "icl"),
    "finetune: an output that is a link": (FINETUNE + "--output linked", "linked is a link"),
    "finetune: something else where it saves": (FINETUNE + "--output kept", "kept.partial"),
    # step 1
    "score: unknown dataset": (SCORE + "--dataset_name cold_Hindi", "cold_Hindi"),
    "score: no data folder": (SCORE + "--root_data_dir nowhere", "nowhere"),
    "score: no such model": (SCORE + "--model_name ./nowhere", "./nowhere"),
    "score: a revision of a local folder": (SCORE + "--revision v2", "--revision"),
    "score: an adapter given as a model": (SCORE + "--model_name adapter", "'adapter' is a LoRA adapter"),
    "score: a folder that is no model": (SCORE + "--model_name icl", "icl"),
    "score: broken JSON": (SCORE + "--dataset_name broken_Hindi", "broken_Hindi.json"),
    "score: JSON that is no list": (SCORE + "--dataset_name object_Hindi", "object_Hindi.json"),
    "score: a row without output": (SCORE + "--dataset_name half_Hindi", "row 1"),
    "score: more shots than rows": (SCORE + "--n_shots 500", "--n_shots 500"),
    "score: n_shots 0": (SCORE + "--n_shots 0", "--n_shots"),
    "score: n_trials 0": (SCORE + "--n_trials 0", "--n_trials"),
    "score: n_trials no number": (SCORE + "--n_trials many", "many"),
    "score: a seed below zero": (SCORE + "--seed -1", "--seed"),
    "score: test_split 2": (SCORE + "--test_split 2", "--test_split"),
    "score: test_split nan": (SCORE + "--test_split nan", "--test_split"),
    "score: device cuda:99": (SCORE + "--device cuda:99", "cuda:99"),
    "score: device nonsense": (SCORE + "--device toaster", "toaster"),
    "score: dtype nonsense": (SCORE + "--dtype float7", "float7"),
    "score: last_token_only maybe": (SCORE + "--last_token_only maybe", "maybe"),
    "score: prefixes not JSON": (SCORE + "--prefixes {input", "--prefixes"),
    "score: prefixes of numbers": (SCORE + """--prefixes '{"input": 1}'""", "--prefixes"),
    "score: no means there": (SCORE + "--mean_activations_path nowhere.pt", "nowhere.pt"),
    "score: means that are no tensor": (SCORE + "--mean_activations_path icl/hot_Hindi.json", "hot_Hindi.json"),
    # step 2
    "select: unknown language": (SELECT + "--language Klingon", "Klingon"),
    "select: results without effects": (SELECT + "--results heads", "hot_Hindi_indirect_effect.pt"),
    "select: results nowhere": (SELECT + "--results nowhere", "nowhere"),
    "select: unknown task": (SELECT + "--tasks lukewarm", "lukewarm"),
    "select: a task not scored": (SELECT + "--tasks cold hot mild", "Hindi on cold, mild"),
    "select: how to go on": (SELECT + "--tasks cold hot mild", "--tasks hot)"),
    "select: top 0": (SELECT + "--top 0", "--top 0"),
    "select: top 1.5": (SELECT + "--top 1.5", "--top 1.5"),
    "select: top above all heads": (SELECT + "--top 99999", "--top 99999"),
    "select: top nan": (SELECT + "--top nan", "--top nan"),
    "select: unknown group": (SELECT.replace("--language Hindi", "--group North"), "North"),
    "select: over a list made by hand": (SELECT + "--heads_root . --head_folder heads", "Hindi_Heads.json"),
    "select: nothing asked": ("select_heads --head_folder new --heads_root out", "--language"),
    # step 3
    "steer: unknown language": (STEER + "--language Klingon", "Klingon"),
    "steer: no such base": (STEER + "--base_model ./nowhere", "./nowhere"),
    "steer: no such tuned": (STEER + "--finetune_model ./nowhere", "./nowhere"),
    "steer: a folder that is no model": (STEER + "--base_model icl", "icl"),
    "steer: no such head folder": (STEER + "--head_folder nowhere", "nowhere"),
    "steer: no list of the language": (STEER + "--language Bengali", "Bengali_Heads.json"),
    "steer: heads beyond the model": (STEER + "--head_folder heads-beyond", "[99, 0]"),
    "steer: a malformed head list": (STEER + "--head_folder heads-malformed", "entry 0"),
    "steer: a head list that is no JSON": (STEER + "--head_folder heads-broken", "Hindi_Heads.json"),
    "steer: models of other widths": (STEER + "--finetune_model wide", "hidden_size"),
    "steer: models of other depths": (STEER + "--finetune_model deep", "num_hidden_layers"),
    "steer: base given as tuned": (STEER + "--finetune_model base", "equals"),
    "steer: factor negative": (STEER + "--scaling_factor -1", "-1"),
    "steer: factor nan": (STEER + "--scaling_factor nan", "nan"),
    "steer: factor inf": (STEER + "--scaling_factor inf", "inf"),
    "steer: factor no number": (STEER + "--scaling_factor much", "much"),
    "steer: dtype nonsense": (STEER + "--dtype float7", "float7"),
    "steer: an output that holds something else": (STEER + "--output icl", "icl"),
    "steer: an output that is a link": (STEER + "--output linked", "linked is a link"),
    "steer: an output that is a file, before models are opened": (
        STEER + "--output text.csv --base_model x",
        "text.csv",
    ),
    "generate: unknown language": (GENERATE + "--language Klingon", "Klingon"),
    "generate: unknown dataset": (GENERATE + "--dataset nothing_Hindi", "nothing_Hindi"),
    "generate: no such model": (GENERATE + "--model ./nowhere", "./nowhere"),
    "generate: an adapter given as a model": (GENERATE + "--model adapter", "'adapter' is a LoRA adapter"),
    "generate: a name in color": (GENERATE + "--model '\x1b[31mred'", "'"),
    "generate: a name of two lines": (GENERATE + "--dataset 'hot\ncold'", "cold"),
    "generate: a number that clears the screen": (GENERATE + "--batch_size '\x1b[2J\x9b\u202e'", "--batch_size"),
    "generate: a folder that is no model": (GENERATE + "--model icl", "icl"),
    "generate: an empty CSV": (GENERATE + "--dataset empty.csv", "empty.csv"),
    "generate: a header alone": (GENERATE + "--dataset header.csv", "header.csv"),
    "generate: no question column": (GENERATE + "--dataset text.csv", "question"),
    "generate: an empty question": (GENERATE + "--dataset gap.csv --strict", "row 1"),
    "generate: a comma outside quotes": (GENERATE + "--dataset comma.csv", "comma.csv"),
    "generate: rows of unequal length": (GENERATE + "--dataset ragged.csv", "ragged.csv"),
    "generate: no UTF-8": (GENERATE + "--dataset latin1.csv", "latin1.csv"),
    "generate: batch_size no number": (GENERATE + "--batch_size many", "many"),
    "generate: batch_size 0": (GENERATE + "--batch_size 0", "--batch_size"),
    "generate: max_new_tokens 0": (GENERATE + "--max_new_tokens 0", "--max_new_tokens"),
    "generate: another column": (GENERATE + "--column ANSWER", "ANSWER"),
    "generate: device cuda:99": (GENERATE + "--device cuda:99", "cuda:99"),
    "generate: no chat template": (GENERATE + "--chat_template", "chat template"),
    "generate: answers to other questions there": (GENERATE + "--output answers.csv", "answers.csv"),
    "generate: output over the questions": (GENERATE + "--output questions.csv", "questions.csv"),
    "generate: output over the questions, spelled otherwise": (GENERATE + "--output icl/../questions.csv", "questions"),
    "generate: output over another file": (GENERATE + "--output text.csv", "text.csv exists"),
    "generate: output through a link": (GENERATE + "--output link.csv", "link.csv is a link"),
    "generate: output through a link to nothing": (GENERATE + "--output dangling.csv", "dangling.csv is a link"),
    "generate: output by a hard link": (GENERATE + "--dataset labels.csv --output hard.csv", "hard.csv is a file that"),
    "generate: output that is a folder": (GENERATE + "--output icl", "icl is a folder"),
    "generate: harmless answers over another file": (
        GENERATE + "--output other.csv --benign everyday",
        "benign/other.csv",
    ),
    "generate: facts over the questions": (GENERATE + "--dataset asked.json --output asked.csv", "asked.json"),
    "generate: no such split": (GENERATE + "--split test", "'test'"),
    "generate: no such question column": (GENERATE + "--question_column words", "'words'"),
    "generate: a condition without a value": (GENERATE + "--where words", "'words'"),
    "generate: a condition that no row meets": (GENERATE + "--where question=cold", "question=cold"),
    "generate: a subset of a file": (GENERATE + "--subset behaviors", "'behaviors'"),
    "generate: a part of no harmless questions": (GENERATE + "--benign_where a=b", "--benign"),
    "generate: no such harmless questions": (GENERATE + "--benign nowhere", "nowhere"),
    "generate: a question longer than the context": (GENERATE + "--dataset long.csv", "row 1"),
    "generate: a question that is no text": (GENERATE + "--dataset number.json", "row 1"),
    "generate: half a surrogate pair": (GENERATE + "--dataset surrogate.jsonl", "row 1"),
    "generate: output named .json": (GENERATE + "--output out.json", "out.json"),
    "judge: no such file": (JUDGE + "--input nowhere.csv", "nowhere.csv"),
    "judge: an empty CSV": (JUDGE + "--input empty.csv", "empty.csv"),
    "judge: no answer column": (JUDGE + "--input questions.csv", "questions.csv"),
    "judge: no rows": (JUDGE + "--input unanswered.csv", "unanswered.csv"),
    "judge: unknown judge": (JUDGE + "--judge oracle", "oracle"),
    "judge: a judge without its model": (JUDGE + "--judge openai:", "openai:"),
    "judge: openai without a key": (JUDGE + "--judge openai:some-model", "OPENAI_API_KEY"),
    "judge: output over the answers": (JUDGE + "--output answers.csv", "answers.csv"),
    "judge: output over another file": (JUDGE + "--output text.csv", "text.csv exists"),
    "judge: output over answers that generate.py wrote": (JUDGE + "--output hard.csv", "hard.json exists"),
    "judge: output over its labels": (JUDGE + "--compare labels.csv --output labels.csv", "labels.csv is a file that"),
    "judge: output over its harmless answers": (JUDGE + "--benign labels.csv --output ./labels.csv", "a file that"),
    "judge: facts over its prompt": (JUDGE + "--judge_prompt labels.json --output labels.csv", "labels.json is a file"),
    "judge: one of several over another file": (JUDGE + "--judge refusal openai:m", "out.by_openai_m.csv"),
    "judge: a column of the user's": (JUDGE + "--output labels.csv", "'mine'"),
    "judge: no such harmless answers": (JUDGE + "--benign nowhere.csv", "nowhere.csv"),
    "judge: rows of unequal length": (JUDGE + "--input torn.csv", "row 1"),
    "judge: time limit 0": (JUDGE + "--time_limit 0", "--time_limit"),
    "judge: a folder of harmless answers": (JUDGE + "--benign .", "a folder, not a file"),
    "judge: no such judge model": (JUDGE + "--judge hf:./nowhere", "./nowhere"),
    "judge: a judge prompt without places": (JUDGE + "--judge_prompt text.csv", "{question}"),
    "judge: no such judge prompt": (JUDGE + "--judge_prompt nowhere.txt", "nowhere.txt"),
    "judge: a judge prompt that is no UTF-8": (JUDGE + "--judge_prompt latin1.csv", "latin1.csv"),
    "judge: a preset of the refusal judge": (JUDGE + "--judge_preset release", "refusal judge"),
    "judge: an empty system prompt": (JUDGE + "--judge openai:m --judge_system empty.csv", "empty.csv"),
    "judge: concurrency 0": (JUDGE + "--concurrency 0", "--concurrency"),
    "run.sh: a language that the judge does not read": (plan(language="Italian"), "no phrases in Italian"),
    "run.sh: no question at all": (plan(data="header.csv"), "header.csv"),
    "run.sh: unknown language": (plan(language="Klingon"), "Klingon"),
    "run.sh: unknown dataset": (plan(data="nothing_Hindi"), "nothing_Hindi"),
    "run.sh: factor negative": (plan(factor="-1"), "-1"),
    "run.sh: factor nan": (plan(factor="nan"), "nan"),
    "run.sh: do_base maybe": (plan(do_base="maybe"), "maybe"),
    "run.sh: batch_size no number": (plan(batch="many"), "many"),
    "run.sh: no such head folder": (plan().replace(" heads ", " nowhere "), "nowhere"),
    "fetch: another file where sums go": (
        "fetch_original --only icl --git_url nowhere --output kept.partial",
        "SHA256",
    ),
    # step 4
    "tune: unknown language": (TUNE + "--language Klingon", "Klingon"),
    "tune: another file in its place": (TUNE + "--base_model wide", "wide_Hindi.json"),
    "tune: no effects": (TUNE + "--results nowhere", "nowhere"),
    "tune: effects of another model": (TUNE + "--base_model deep --finetune_model deep", "other heads in Hindi"),
    "tune: no such base": (TUNE + "--base_model ./nowhere", "./nowhere"),
    "tune: no such tuned": (TUNE + "--finetune_model ./nowhere", "./nowhere"),
    "tune: base given as tuned": (TUNE + "--finetune_model base", "equals"),
    "tune: no such policy questions": (TUNE + "--policy nowhere", "nowhere_Hindi.csv"),
    "tune: no such benign questions": (TUNE + "--benign nowhere", "nowhere_Hindi.csv"),
    "tune: trials 0": (TUNE + "--trials 0", "--trials"),
    "tune: a seed below zero": (TUNE + "--seed -1", "--seed: '-1'"),
    "tune: seed no number": (TUNE + "--seed many", "--seed"),
    "tune: factor negative": (TUNE + "--min_scaling -1", "--min_scaling"),
    "tune: factor inf": (TUNE + "--max_scaling inf", "--max_scaling"),
    "tune: factors the wrong way round": (TUNE + "--min_scaling 5 --max_scaling 4", "--min_scaling 5"),
    "tune: a share of 0": (TUNE + "--shares 0 1", "--shares 0 1"),
    "tune: a share above 1": (TUNE + "--shares 0.5 12", "--shares 0.5 12"),
    "tune: shares the wrong way round": (TUNE + "--shares 0.9 0.1", "--shares 0.9 0.1"),
    "tune: one share": (TUNE + "--shares 0.9", "--shares"),
    "tune: refusals in percent": (TUNE + "--max_refusals 2", "--max_refusals"),
    "tune: changes in percent": (TUNE + "--max_changes 5", "--max_changes"),
    "tune: accuracy loss nan": (TUNE + "--max_accuracy_loss nan", "--max_accuracy_loss"),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with everything the commands name, good and bad."""
    root = tmp_path_factory.mktemp("place")
    save_tiny_model(root / "base", "llama")
    save_tiny_model(root / "tuned", "llama", seed=1)
    chat = shutil.copytree(root / "base", root / "chat")
    (chat / "chat_template.jinja").write_text("{{ messages[0].content }}")
    save_tiny_model(root / "wide", "llama", hidden_size=48)
    save_tiny_model(root / "deep", "llama", num_hidden_layers=4)
    pairs = [{"input": f"hot {i}", "output": f"cold {i}"} for i in range(20)]
    rows = {"hot": pairs, "object": {}, "half": [pairs[0], {"input": "hot"}]}
    (root / "icl").mkdir()
    for name, value in rows.items():
        files.write_json(root / "icl" / f"{name}_Hindi.json", value)
    (root / "icl" / "broken_Hindi.json").write_text("[{")
    files.write_json(root / "adapter" / "adapter_config.json", {"peft_type": "LORA"})
    save_tensor(torch.rand(2, 3, 4), effect_path(root / "effects", "hot_Hindi"))
    for task in TASKS:
        save_tensor(torch.rand(2, 3, 4), effect_path(root / "scored", f"{task}_Hindi"))
    lists = {"heads": "[[0, 1], [2, 3]]", "heads-beyond": "[[99, 0]]", "heads-malformed": '[[0, "1"]]'}
    for folder, text in {**lists, "heads-broken": "[[0,"}.items():
        files.write_text(root / folder / "Hindi_Heads.json", text)
    texts = {
        "questions": "question\nनमस्ते?\nhot?\n",
        "answers": "Question,SAFE ANSWER\nWhy?,I cannot.\n",
        "unanswered": "Question,SAFE ANSWER\n",
        "empty": "",
        "header": "question\n",
        "text": "title\nhot?\n",
        "gap": "id,question\n0,hot?\n1, \n",
        "comma": "question\nhot, or cold?\n",
        "long": "question\nhot?\n" + "word " * 5000 + "\n",
        "pairs": "question,answer\nनमस्ते?,hot\nhot?,cold\n",
        "unpaired": "question,other,answer\nhot?,,cold\ncold?,hot, \n",
        "torn": "Question,SAFE ANSWER\nWhy?,No\nWhy?\n",
        "ragged": "id,question\n0,hot?\n1,hot, or cold, or not?\n",
    }
    for name, text in texts.items():
        (root / f"{name}.csv").write_text(text, encoding="utf-8")
    # As judge.py writes it, with one column more.
    (root / "labels.csv").write_text("Question,SAFE ANSWER,Verdict_Safe,mine\nWhy?,I cannot.,Harmful,no\n")
    (root / "labels.json").write_text('{"inputs_sha256": ""}')
    (root / "hard.csv").hardlink_to(root / "labels.csv")
    (root / "hard.json").write_text('{"columns": {}}')
    (root / "link.csv").symlink_to("questions.csv")
    (root / "dangling.csv").symlink_to("nothing.csv")
    (root / "linked").symlink_to("icl")
    for other in (
        "benign/other.csv",
        "kept.partial/SHA256SUMS",
        "out.by_openai_m.csv",
        "results/tuning/wide_Hindi.json",
    ):
        files.write_text(root / other, "mine")
    (root / "asked.json").write_text('[{"question": "hot?"}]')
    (root / "number.json").write_text('[{"question": "hot?"}, {"question": 7}]')
    (root / "surrogate.jsonl").write_text('{"question": "hot?"}\n{"question": "a\\ud800"}\n')
    (root / "latin1.csv").write_bytes("question\nWas für eine?\n".encode("latin-1"))
    return root


def listing(folder: Path) -> dict[str, str | None]:
    """Every path under a folder with its content's hash."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
        for path in folder.rglob("*")
    }


@pytest.fixture
def command(monkeypatch, run_script):
    """`command(text, folder)` runs a script's main in a folder and returns its status."""
    for name in [name for name in os.environ if name.startswith(("OPENAI_", "AZURE_", "SOTERIA_"))]:
        monkeypatch.delenv(name)

    def run(text: str, folder: Path) -> int:
        monkeypatch.chdir(folder)
        # Variables that are read as modules load.
        monkeypatch.setattr(paths, "RESULTS", Path(os.environ.get("SOTERIA_RESULTS") or folder / "results"))
        added, problem = (), None
        try:
            added = languages._read_added(given) if (given := os.environ.get(languages.ADDED)) else ()
        except UserError as error:
            problem = error
        monkeypatch.setattr(languages, "LANGUAGES", (*languages._BUILT_IN, *added))
        monkeypatch.setattr(languages, "_problem", problem)
        script, *arguments = shlex.split(text)
        return run_script(importlib.import_module(script), *arguments)

    return run


@pytest.mark.parametrize("script", sorted({case.partition(":")[0] for case in CASES}))
def test_bad_input_ends_in_one_sentence_and_status_2_and_writes_nothing(script, place, command, capsys):
    before = listing(place)
    for case, (text, named) in CASES.items():
        if case.startswith(f"{script}:"):
            status, error = command(text, place), capsys.readouterr().err
            assert status == 2, case
            assert named in error.splitlines()[-1], case
            assert not set("\x1b\x9b\u202e\r") & set(error), case
            # argparse puts its usage before its sentence
            assert error.startswith("usage: ") or (len(error.splitlines()) == 1 and error.startswith("error: ")), case
            assert listing(place) == before, case


@pytest.fixture
def odd(place):
    """The folder of `place` with things that are no files, and models and JSON that are broken, for one test."""
    made = [place / name for name in ("pipe", "icl/pipe_Hindi.json", "loop", "blocked")]
    os.mkfifo(made[0])
    os.mkfifo(made[1])
    made[2].symlink_to("loop")
    made[3].write_text("a file")
    deep = "[" * 1000 + "]" * 1000
    breaks = {
        "pipe": lambda folder: os.mkfifo(folder / "chat_template.jinja"),
        "nothing": lambda folder: (folder / "notes.txt").symlink_to("gone"),
        "round": lambda folder: (folder / "round").symlink_to("."),
        "config": lambda folder: (folder / "config.json").write_text(f'{{"model_type": "llama", "a": {deep}}}'),
        "tokenizer": lambda folder: (folder / "tokenizer_config.json").write_text(deep),
        "generation": lambda folder: (folder / "generation_config.json").write_text(deep),
    }
    for name, harm in breaks.items():
        made.append(shutil.copytree(place / "base", place / f"base-{name}"))
        harm(made[-1])
    made += [place / "icl" / "deep_Hindi.json", place / "deep.json", place / "deep.yaml"]
    for path in made[-3:]:
        path.write_text(deep)
    yield place
    for path in made:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


LONG = "n" * 210
# (command, what the sentence names)
ODD = [
    *((SCORE + f"--dataset_name {name}_Hindi", name) for name in ("pipe", "deep")),
    *((SCORE + f"--save_path_root {name}", name) for name in ("pipe", "blocked", "loop", "blocked/below")),
    *((SCORE + f"--mean_activations_path {name}", name) for name in ("pipe", "icl")),
    *((SCORE + f"--{name} ''", f"{name}: it is empty") for name in ("root_data_dir", "save_path_root")),
    *((SELECT + f"--{name} ''", f"{name}: it is empty") for name in ("results", "heads_root", "head_folder")),
    (SCORE + f"--prefixes '{'[' * 1000}'", "--prefixes"),
    *((SELECT + f"--heads_root {name}", name) for name in ("pipe", "blocked", "loop")),
    (SELECT + "--group Lowest", "Lowest"),
    *((STEER + f"--output '{name}'", name) for name in ("pipe", "loop", "blocked", ".", "", "/")),
    *((GENERATE + f"--output '{name}'", name) for name in ("pipe", "loop", "icl", ".", "", "blocked/out.csv")),
    *((FINETUNE + f"--output '{name}'", name) for name in ("pipe", "loop", "blocked", ".", "")),
    *((JUDGE + f"--output '{name}'", name) for name in ("pipe", "loop", "icl", ".", "", "/dev/null")),
    *((command + f"--output {LONG}", "too long") for command in (STEER, GENERATE, FINETUNE, JUDGE)),
    *(
        (JUDGE + f"{option} {name}", name)
        for option in ("--input", "--judge_prompt")
        for name in ("pipe", "icl", "loop")
    ),
    (JUDGE + "--judge refusal oracle", "oracle"),
    *((GENERATE + f"--dataset {name}", name) for name in ("pipe", "deep.json", "loop")),
    *((FINETUNE + f"--dataset {name}", name) for name in ("pipe", "deep.json")),
    *((STEER + f"--base_model base-{name}", f"base-{name}") for name in ("pipe", "nothing", "round", "config")),
    *((GENERATE + f"--model base-{name}", f"base-{name}") for name in ("pipe", "config", "tokenizer", "generation")),
    ("reproduce deep.yaml", "deep.yaml"),
    ("reproduce pipe", "pipe"),
]


@pytest.mark.parametrize("script", sorted({text.split()[0] for text, _ in ODD}))
def test_what_is_no_file_or_is_nested_deep_is_refused_in_one_sentence_and_leaves_nothing(script, odd, command, capsys):
    before = sorted(odd.rglob("*"))
    for text, named in ODD:
        if text.split()[0] == script:
            status, error = command(text, odd), capsys.readouterr().err
            assert status == 2 and named in error.splitlines()[-1], text
            assert error.startswith("usage: ") or (len(error.splitlines()) == 1 and error.startswith("error: ")), text
            assert sorted(odd.rglob("*")) == before, text


@pytest.mark.parametrize(
    "text", [FINETUNE, SCORE, SELECT, STEER, GENERATE, JUDGE, plan()], ids=lambda text: text.split()[0]
)
def test_the_same_commands_without_the_fault_succeed(text, place, command, tmp_path):
    folder = shutil.copytree(place, tmp_path / "place", symlinks=True)
    assert command(text, folder) == 0


@pytest.mark.parametrize("text", [SCORE, GENERATE, FINETUNE], ids=lambda text: text.split()[0])
def test_a_failure_inside_transformers_is_one_sentence_and_its_traceback_is_for_debug(
    text, place, command, tmp_path, monkeypatch, capsys
):
    def forward(*_, **__):
        raise KeyError("no\nsuch \x1b[31mkey")

    monkeypatch.setattr(LlamaMLP, "forward", forward)
    folder = shutil.copytree(place, tmp_path / "place", symlinks=True)
    assert command(text, folder) == 2
    said = capsys.readouterr().err
    assert "error: LlamaForCausalLM failed inside transformers (KeyError: " in said.splitlines()[-1]
    assert "Traceback" not in said and "--debug shows where" in said and "\x1b" not in said
    assert command(f"{text} --debug", folder) == 2
    assert "Traceback" in capsys.readouterr().err


def plan_options(command, capsys, folder, **arguments) -> list[str]:
    """The words that run.sh hands to generate.py."""
    assert command(plan(**arguments), folder) == 0
    _, _, _, n_judge, *options, _ = capsys.readouterr().out.split("\0")
    return [word for option in options[int(n_judge) :] for word in option.split("=", 1)]


def test_the_environment_says_how_questions_are_read_and_asked(place, command, capsys, monkeypatch):
    options = plan_options(command, capsys, place)
    assert options[::2] == ["--benign", "--borderline"]
    assert [Path(path).name for path in options[1::2]] == ["everyday_Hindi.csv", "borderline_Hindi.csv"]
    monkeypatch.setenv("SOTERIA_BENIGN", "none")
    monkeypatch.setenv("SOTERIA_BORDERLINE", "none")
    monkeypatch.setenv("SOTERIA_PRESET", "release")
    assert plan_options(command, capsys, place) == ["--preset", "release"]
    monkeypatch.delenv("SOTERIA_PRESET")
    for name, value in {"CHAT_TEMPLATE": "yes", "QUESTION_COLUMN": "question"}.items():
        monkeypatch.setenv(f"SOTERIA_{name}", value)
    with monkeypatch.context() as shorter:
        shorter.setenv("SOTERIA_MAX_NEW_TOKENS", "16")
        assert plan_options(command, capsys, place, base="chat")[:2] == ["--max_new_tokens", "16"]
    assert plan_options(command, capsys, place, base="chat") == ["--question_column", "question", "--chat_template"]
    for name, value in {"BENIGN": "questions.csv", "BENIGN_WHERE": "question!=hot?", "STRICT": "yes"}.items():
        monkeypatch.setenv(f"SOTERIA_{name}", value)
    monkeypatch.setenv("SOTERIA_WHERE", "question=hot?;question=नमस्ते?")
    options = ["--benign", "questions.csv", "--question_column", "question", "--where", "question=hot?", "--where"]
    options += ["question=नमस्ते?", "--benign_where", "question!=hot?", "--strict", "--chat_template"]
    assert plan_options(command, capsys, place, base="chat") == options


def test_a_plan_keeps_names_whole_that_hold_line_ends_or_look_like_options(place, command, capsys):
    (place / "--heads").symlink_to("heads")
    words = plan(base="'a\nb'", tuned="--help").replace(" heads ", " --heads ")
    assert command(words, place) == 0
    steered, answers, *_ = capsys.readouterr().out.split("\0")
    (place / "--heads").unlink()
    assert steered.endswith("models/Hindi_a\nb_scaling_1") and answers.endswith("a\nb_Hindi_questions_scaling_1.csv")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("BENIGN", "nowhere"),
        ("BORDERLINE", "nowhere"),
        ("PRESET", "mine"),
        ("CHAT_TEMPLATE", "maybe"),
        ("MAX_NEW_TOKENS", "0"),
        ("CHAT_TEMPLATE", "yes"),
        ("SPLIT", "test"),
        ("SUBSET", "behaviors"),
        ("WHERE", "question!=hot?;level=3"),
        ("STRICT", "maybe"),
        ("JUDGE_PRESET", "mine"),
        ("JUDGE_FORMAT", "a"),
    ],
)
def test_a_fault_in_the_environment_is_refused_before_anything_is_steered(
    name, value, place, command, capsys, monkeypatch
):
    monkeypatch.setenv(f"SOTERIA_{name}", value)
    assert command(plan(), place) == 2
    assert value.split(";")[-1] in capsys.readouterr().err


def test_a_row_without_a_question_is_refused_where_the_environment_says_so(place, command, capsys, monkeypatch):
    assert command(plan(data="gap.csv"), place) == 0
    monkeypatch.setenv("SOTERIA_STRICT", "yes")
    assert command(plan(data="gap.csv"), place) == 2
    assert "row 1" in capsys.readouterr().err


def test_answers_of_the_base_that_stay_but_were_asked_otherwise_are_refused(
    place, command, tmp_path, capsys, monkeypatch
):
    folder = shutil.copytree(place, tmp_path / "place", symlinks=True)
    answers, _ = paths.answer_files(folder / "results", "Hindi", "chat", "questions", 1)
    made = {"chat_template": False, "max_new_tokens": 512, "language": "Hindi", "dtype": "float32"}
    files.write_json(paths.facts_file(answers), {"columns": {"BASE ANSWER": made}})
    assert command(plan(do_base="no", base="chat"), folder) == 0
    for name, value, named in (
        ("CHAT_TEMPLATE", "yes", "chat_template (True, False)"),
        ("MAX_NEW_TOKENS", "7", "max_new_tokens (7, 512)"),
        ("PRESET", "release", "preset ('release', None)"),
    ):
        with monkeypatch.context() as otherwise:
            otherwise.setenv(f"SOTERIA_{name}", value)
            capsys.readouterr()
            assert command(plan(do_base="no", base="chat"), folder) == 2
            assert named in capsys.readouterr().err
            assert command(plan(do_base="yes", base="chat"), folder) == 0  # the base is asked again too


def test_what_a_later_step_would_not_write_over_is_refused_before_anything_is_steered(place, command, tmp_path, capsys):
    folder = shutil.copytree(place, tmp_path / "place", symlinks=True)
    answers, verdicts = paths.answer_files(folder / "results", "Hindi", "base", "questions", 1)
    steered = paths.steered_folder(folder / "results", "Hindi", "base", 1) / "thesis.txt"
    for mine in (answers, verdicts, steered, paths.harmless_file(answers, "benign")):
        files.write_text(mine, "mine")
        capsys.readouterr()
        assert command(plan(), folder) == 2
        assert mine.stem in (error := capsys.readouterr().err) or mine.parent.name in error
        mine.unlink()
    assert command(plan(), folder) == 0


def test_an_unknown_judge_is_refused_before_anything_is_steered(place, command, monkeypatch, capsys):
    monkeypatch.setenv("SOTERIA_JUDGE", "oracle")
    assert command(plan(), place) == 2
    assert "oracle" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "usage: bash scripts/run.sh"),
        (("t", "b", "Klingon", "d", "1", "yes", "2", "h"), "Klingon"),
        (("t", "b", "en", "--help", "1", "yes", "2", "h"), "--help"),
        (("t", "", "en", "d", "1", "yes", "2", "h"), "base_model is empty"),
    ],
)
def test_run_sh_ends_with_status_2_and_says_why(arguments, said, tmp_path):
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"SOTERIA_RESULTS": str(tmp_path / "results"), "PATH": path}
    done = subprocess.run(
        ["bash", str(ROOT / "scripts" / "run.sh"), *arguments],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert said in done.stderr and "Traceback" not in done.stderr and not done.stdout
    assert not list(tmp_path.iterdir())


# What any option may be given: files that are not files, numbers without end, text that no terminal should see.
HOSTILE = [
    *("fifo", "folder", "dangling", "loop", "deep.json", "deep.yaml", "zeros.bin", "/dev/full", "/dev/zero", "."),
    *("", " ", "x" * 300, "x" * 300 + ".csv", "no/such/place.csv", "a\nb", "\x1b[31mred\x1b[0m.csv", "half\udc80.csv"),
    *("-1", "0", "1", "2", "0.5", "-0.0", "1e400", "nan", "inf", "1e300", "9" * 40, "1e9", "1:30", "0x10", "٣"),
    *("true", "null", "{}", "[]", '{"input": "\\ud800"}', '{"nothing": 1}', "[" * 2000, "--", "-", "=", "a=b", "meta"),
    *("cpu", "cpu:7", "cuda:99", "English", "all", "*", "[", "questions.csv", "answers.csv", "icl", "base", "tuned"),
]
PLAN = "reproduce grid.yaml --plan --results results "
FETCH = "fetch_original --only icl --output fetched --git_url http://127.0.0.1:9/x "
UTILITY = (
    "evaluate_utility --base_model base --finetune_model tuned --language Hindi --scaling_factor 1 --head_folder heads "
    "--tasks soteria_text --limit 1 --output out --device cpu "
)
TUNED = TUNE + "--min_scaling 1 --max_scaling 2 "
SOUND = [FINETUNE, SCORE, SELECT, STEER, GENERATE, JUDGE, TUNED, PLAN, FETCH, UTILITY]


# Every variable that run.sh names, those that it names by `and so on` included.
RUN_SH = (ROOT / "scripts" / "run.sh").read_text()
VARIABLES = sorted(
    {*re.findall(r"SOTERIA_[A-Z_]+", RUN_SH)}
    | {f"SOTERIA_BENIGN_{part}" for part in ("SUBSET", "SPLIT", "QUESTION_COLUMN", "WHERE")}
)


class _Parser(Exception):
    """The parser of a script, caught before it reads anything."""


def options_of(script: str) -> list[str | int]:
    """Every option of a script, and the place of every argument that has no name, by its own parser."""

    def catch(parser, *_):
        raise _Parser(parser)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(argparse.ArgumentParser, "parse_args", catch)
        try:
            importlib.import_module(script).main()
        except _Parser as caught:
            found = [action for action in caught.args[0]._actions if action.dest != "help"]
            named = [action.option_strings[-1] for action in found if action.option_strings]
            return [*named, *range(len(found) - len(named))]


@pytest.fixture
def hostile_place(place, tmp_path) -> Path:
    folder = shutil.copytree(place, tmp_path / "in" / "place", symlinks=True)
    os.mkfifo(folder / "fifo")
    (folder / "folder").mkdir()
    (folder / "dangling").symlink_to("nowhere")
    (folder / "loop").symlink_to("loop")
    for name in ("deep.json", "deep.yaml"):
        (folder / name).write_text("[" * 5000 + "]" * 5000)
    (folder / "zeros.bin").write_bytes(bytes(1000))
    grid = {"name": "g", "models": [{"base": "base", "tuned": "tuned"}], "languages": ["Hindi"], "scaling_factor": 1}
    files.write_json(folder / "grid.yaml", grid | {"prompt_sets": ["policy"]})
    return folder


def ends_in_time(run: Callable[[], int]) -> int:
    """What `run` gives. Fails where it takes 20 seconds."""

    def fail(*_):
        raise TimeoutError("took over 20 s")

    signal.signal(signal.SIGALRM, fail)
    signal.alarm(20)
    try:
        return run()
    finally:
        signal.alarm(0)


def test_every_script_is_given_hostile_values():
    assert {text.split()[0] for text in SOUND} == {path.stem for path in (ROOT / "src").glob("*.py")}


@pytest.mark.parametrize("text", [*SOUND, plan()], ids=lambda text: text.split()[0])
def test_a_hostile_value_of_any_option_is_read_or_refused_in_one_sentence(
    text, hostile_place, command, capsysbinary, monkeypatch
):
    """Options are given again, which overrides the first; arguments without a name are replaced, variables are set."""
    before, (script, *sound) = listing(hostile_place), shlex.split(text)
    options = [*range(len(sound)), *VARIABLES] if text == plan() else options_of(script)

    @settings(max_examples=N_EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(st.lists(st.tuples(st.sampled_from(options), st.sampled_from(HOSTILE)), min_size=1, max_size=2))
    def holds(given_values):
        words, added = [*sound], []
        try:
            for option, value in given_values:
                if option in VARIABLES:
                    monkeypatch.setenv(option, value)
                elif isinstance(option, int):
                    words[option] = value
                else:
                    added += [option, value]
            status = ends_in_time(lambda: command(shlex.join([script, *words, *added]), hostile_place))
            error, after = capsysbinary.readouterr().err.decode(), listing(hostile_place)
            assert status in (0, 2), given_values
            assert not [name for name in before if after.get(name) != before[name]], given_values
            if status == 2:
                assert "error: " in error.splitlines()[-1] and "\x1b" not in error, given_values
                assert after == before, given_values
        finally:
            for name in VARIABLES:
                monkeypatch.delenv(name, raising=False)
            for name in sorted({*listing(hostile_place)} - {*before}, reverse=True):
                left = hostile_place / name
                left.rmdir() if left.is_dir() and not left.is_symlink() else left.unlink()

    holds()
