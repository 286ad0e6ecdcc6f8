"""Engines for tests: `transformers serve`, a real server of another project on loopback, and a stand-in for vLLM."""

import importlib.util
import os
import socket
import subprocess
import sys
import time
import types
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import ClassVar

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

PACKAGES = ("fastapi", "uvicorn")


@contextmanager
def serve(folder: Path) -> Iterator[str]:
    """The base URL of a server for the length of a block. Models are served by their paths, from `folder` on."""
    for package in PACKAGES:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"no package {package}, which transformers serve needs (requirements-test.txt)")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["serve", "--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"]
    command = [sys.executable, "-m", "transformers.cli.transformers", *words]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    server = subprocess.Popen(command, cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"}, **quiet)
    try:
        for _ in range(1200):
            with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health"):
                break
            assert server.poll() is None, "transformers serve ended"
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.kill()
        server.wait()


class StandIn:
    """What is used of vLLM's documented interface; it decodes with transformers. `made`: what was loaded."""

    made: ClassVar[list[dict]] = []

    def __init__(self, model: str, dtype: str, **adapters: object):
        self.made.append({"model": model, "dtype": dtype, **adapters})
        self.model, self.adapters = AutoModelForCausalLM.from_pretrained(model), adapters

    def generate(self, prompts: list[dict], sampling: list, *, use_tqdm: bool, lora_request: object) -> list:
        model = self.model
        if lora_request:
            assert self.adapters["enable_lora"] and lora_request.number > 0
            fresh = AutoModelForCausalLM.from_pretrained(self.made[-1]["model"])
            model = peft.PeftModel.from_pretrained(fresh, lora_request.path).merge_and_unload()
        return [self._answer(model, *pair) for pair in zip(prompts, sampling, strict=True)]

    def _answer(self, model, prompt: dict, sampling) -> types.SimpleNamespace:
        ids = torch.tensor([prompt["prompt_token_ids"]])
        assert sampling.temperature == 0
        told = {"max_new_tokens": sampling.max_tokens, "eos_token_id": sampling.stop_token_ids, "do_sample": False}
        made = model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **told)
        answer = types.SimpleNamespace(token_ids=made[0, ids.shape[1] :].tolist(), finish_reason="stop")
        return types.SimpleNamespace(prompt_token_ids=ids[0].tolist(), outputs=[answer])


def stand_in_for_vllm(monkeypatch) -> list[dict]:
    """Put the stand-in in vLLM's place; gives what it loads."""
    vllm, inputs, request = map(types.ModuleType, ("vllm", "vllm.inputs", "vllm.lora.request"))
    vllm.__version__, vllm.__spec__, vllm.LLM = "9.9", types.SimpleNamespace(), StandIn
    vllm.SamplingParams = lambda **given: types.SimpleNamespace(**given)
    inputs.TokensPrompt = dict
    request.LoRARequest = lambda name, number, path: types.SimpleNamespace(name=name, number=number, path=path)
    for module in (vllm, inputs, request):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    StandIn.made.clear()
    return StandIn.made
