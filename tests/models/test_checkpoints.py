"""Checkpoints on disk and on the hub: pickles, shards, copies, downloads, and every way in which they can be broken."""

import json
import os
import shutil
import struct
import threading
from collections.abc import Callable
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import safetensors.torch
import torch
from test_steering import SHARDS, SINGLE, same_bits, steered_the_slow_way, stored, write_adapter, write_head_list
from test_steering import write_model as write
from transformers import AutoModelForCausalLM

import steer
from soteria.errors import UserError
from soteria.models import checkpoints
from soteria.models.checkpoints import Checkpoint, copy_file
from soteria.models.loading import DTYPES
from soteria.models.task_vector import TaskVector
from soteria.models.tensors import Planned, write_tensors

HEADS = [(2, 1), (0, 3), (0, 0)]
O_PROJ = "model.layers.{}.self_attn.o_proj.weight"


@pytest.fixture(scope="module")
def heads(tmp_path_factory) -> Path:
    return write_head_list(tmp_path_factory.mktemp("heads"), HEADS)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def tuned(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("tuned"), tuned=True)


@pytest.fixture
def run(run_script, base, tuned, heads, tmp_path):
    """`run(*options, **paths)`: `steer.py` on the test's models; gives its status and where its output goes."""

    def steered(*options, **paths):
        given = {"base_model": base, "finetune_model": tuned, "head_folder": heads, "output": tmp_path / "out" / "m"}
        given = {**given, "language": "en", "scaling_factor": 2, **paths}
        words = [word for key, value in given.items() for word in (f"--{key}", value)]
        return run_script(steer, *words, *options), given["output"]

    return steered


# --- pickles ---------------------------------------------------------------------------------------------------------


def pickle_weights(folder: Path) -> Path:
    """Turn a folder's safetensors into the `.bin` files that models had before."""
    renamed = {path.name: path.name.replace("model", "pytorch_model", 1) for path in folder.glob("*.safetensors")}
    renamed = {old: new.replace(".safetensors", ".bin") for old, new in renamed.items()}
    for old, new in renamed.items():
        torch.save(safetensors.torch.load_file(folder / old), folder / new)
        (folder / old).unlink()
    index = folder / "model.safetensors.index.json"
    if index.exists():
        found = json.loads(index.read_text())
        found["weight_map"] = {key: renamed[shard] for key, shard in found["weight_map"].items()}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(found))
        index.unlink()
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shard_size", [SINGLE, SHARDS])
@pytest.mark.parametrize("tied", [False, True])
def test_a_base_in_pickles_becomes_safetensors_and_is_steered_bit_for_bit(
    tmp_path, run, tuned, dtype, shard_size, tied
):
    base = write(tmp_path / "base", dtype=dtype, shard_size=shard_size, tie_word_embeddings=tied)
    before, want = stored(base), steered_the_slow_way(base, tuned, HEADS, 2.0)
    pickle_weights(base)
    status, output = run(base_model=base)
    assert status == 0
    got = stored(output)
    assert got.keys() == before.keys()
    assert all(same_bits(tensor, want[key].to(DTYPES[dtype])) for key, tensor in got.items())
    assert not list(output.glob("*.bin*"))
    assert (output / "model.safetensors.index.json").exists() == (shard_size == SHARDS)
    AutoModelForCausalLM.from_pretrained(output)


def test_tensors_that_share_memory_in_a_pickle_are_both_written(tmp_path, run):
    base = write(tmp_path / "base", tie_word_embeddings=True)
    weights = stored(base)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    torch.save(weights, base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    status, output = run(base_model=base)
    assert status == 0
    assert same_bits(stored(output)["lm_head.weight"], weights["model.embed_tokens.weight"])


def test_a_tuned_model_in_pickles_is_read_as_its_safetensors_are(tmp_path, run, tuned):
    want = stored(run()[1])
    pickled = pickle_weights(shutil.copytree(tuned, tmp_path / "tuned"))
    status, output = run(finetune_model=pickled, output=tmp_path / "again")
    assert status == 0
    assert all(same_bits(tensor, want[key]) for key, tensor in stored(output).items())


def test_an_adapter_in_a_pickle_is_read_as_its_safetensors_are(tmp_path, base):
    adapter = write_adapter(tmp_path / "adapter", base)
    want = TaskVector.open(str(base), str(adapter)).at(0)
    torch.save(stored(adapter), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    assert torch.equal(TaskVector.open(str(base), str(adapter)).at(0), want)


# --- adapters of some layers -----------------------------------------------------------------------------------------


def test_an_adapter_of_some_layers_changes_those(tmp_path, base, run):
    adapter = write_adapter(tmp_path / "adapter", base, layers_to_transform=[2])
    status, output = run(finetune_model=adapter)
    assert status == 0
    got, before = stored(output), stored(base)
    assert not torch.equal(got[O_PROJ.format(2)], before[O_PROJ.format(2)])
    assert all(same_bits(got[key], before[key]) for key in got if key != O_PROJ.format(2))


def test_an_adapter_of_layers_without_selected_heads_is_refused(tmp_path, base, run, capsys):
    adapter = write_adapter(tmp_path / "adapter", base, layers_to_transform=[1])
    assert run(finetune_model=adapter)[0] == 2
    assert "on all selected heads" in capsys.readouterr().err


# --- copies ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("refusal", [None, OSError(18, "Invalid cross-device link"), "half"])
def test_a_file_is_copied_whole_whatever_the_file_system_offers(tmp_path, monkeypatch, refusal):
    source, target, told = tmp_path / "a", tmp_path / "b", []
    source.write_bytes(os.urandom(300_000))
    true_copy, calls = getattr(os, "copy_file_range"), []  # noqa: B009 (it is patched by name below)

    def copy_some(reader, writer, count):
        calls.append(count)
        if isinstance(refusal, OSError) or (refusal and len(calls) > 1):
            raise OSError(18, "Invalid cross-device link")
        return true_copy(reader, writer, min(count, 100_000))

    monkeypatch.setattr(os, "copy_file_range", copy_some)
    copy_file(source, target, told.append)
    assert target.read_bytes() == source.read_bytes()
    assert sum(told) == 300_000


def test_too_small_a_disk_is_said_before_anything_is_written(run, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    monkeypatch.setattr(checkpoints, "copy_file", lambda *_: pytest.fail("it wrote"))
    status, output = run()
    assert status == 2
    assert "GB free" in capsys.readouterr().err
    assert not list(output.parent.iterdir())


def test_tensors_written_piece_by_piece_are_what_safetensors_writes(tmp_path, monkeypatch):
    monkeypatch.setattr("soteria.models.tensors.PIECE", 7)
    tensors = {
        "wide": torch.randn(5, 9, dtype=torch.float64),
        "half": torch.randn(3, 2, 4).half(),
        "turned": torch.randn(6, 4).T,
        "none": torch.empty(0, 3),
        "one": torch.tensor(1.5),
        "flags": torch.tensor([True, False]),
        "counts": torch.arange(4),
    }
    planned = {key: Planned(tensor.dtype, tuple(tensor.shape), lambda t=tensor: t) for key, tensor in tensors.items()}
    write_tensors(planned, tmp_path / "own")
    contiguous = {key: tensor.contiguous() for key, tensor in tensors.items()}
    safetensors.torch.save_file(contiguous, tmp_path / "theirs", metadata={"format": "pt"})
    own, theirs = (safetensors.torch.load_file(tmp_path / name) for name in ("own", "theirs"))
    assert own.keys() == theirs.keys()
    assert all(same_bits(own[key].reshape(-1), theirs[key].reshape(-1)) for key in own if key != "flags")
    assert torch.equal(own["flags"], theirs["flags"])
    assert all(own[key].shape == theirs[key].shape for key in own)


# --- the hub ---------------------------------------------------------------------------------------------------------


class Hub:
    """A hub with one revision of some models, in this process; it notes the files that it is asked for."""

    REVISION = "a" * 40

    def __init__(self, folders: dict[str, Path]):
        self.folders, self.sent = folders, []
        hub = self

        class Handler(SimpleHTTPRequestHandler):
            def do_GET(self):
                hub.answer(self, body=True)

            def do_HEAD(self):
                hub.answer(self, body=False)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def answer(self, request, body: bool) -> None:
        path = request.path.split("?")[0]
        for name, folder in self.folders.items():
            names = sorted(file.name for file in folder.iterdir())
            if path.startswith(f"/api/models/{name}/tree"):
                entries = [
                    {"type": "file", "path": n, "size": (folder / n).stat().st_size, "oid": f"{n}-1"} for n in names
                ]
                return self.reply(request, json.dumps(entries).encode(), body)
            if path.startswith(f"/api/models/{name}"):
                found = {"id": name, "sha": self.REVISION, "siblings": [{"rfilename": n} for n in names], "tags": []}
                return self.reply(request, json.dumps(found | {"private": False, "downloads": 0}).encode(), body)
            if path.startswith(f"/{name}/resolve/") and path.rsplit("/", 1)[1] in names:
                wanted = path.rsplit("/", 1)[1]
                if body:
                    self.sent.append(f"{name}/{wanted}")
                return self.reply(request, (folder / wanted).read_bytes(), body, wanted)
        request.send_response(404)
        request.send_header("X-Error-Code", "EntryNotFound")
        request.send_header("Content-Length", "0")
        request.end_headers()
        return None

    def reply(self, request, content: bytes, body: bool, name: str = "") -> None:
        request.send_response(200)
        request.send_header("Content-Length", str(len(content)))
        request.send_header("X-Repo-Commit", self.REVISION)
        request.send_header("ETag", f'"{name}-1"')
        request.end_headers()
        if body:
            request.wfile.write(content)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """`hub(folders by id)`: a hub that huggingface_hub asks instead of the true one, with an empty cache."""
    hubs = []

    def start(folders: dict[str, Path]) -> Hub:
        hubs.append(Hub(folders))
        monkeypatch.setattr(
            checkpoints,
            "snapshot_download",
            partial(huggingface_hub.snapshot_download, endpoint=hubs[0].url, cache_dir=tmp_path / "cache"),
        )
        return hubs[0]

    yield start
    for one in hubs:
        one.server.shutdown()


def test_of_a_base_on_the_hub_only_what_counts_is_downloaded_and_its_revision_is_kept(tmp_path, tuned, hub, run):
    base = write(tmp_path / "base", shard_size=SHARDS)
    for name in ("consolidated.safetensors", "pytorch_model.bin", "model.gguf", "model.onnx"):
        (base / name).write_bytes(b"of no use")
    server = hub({"lab/base": base})
    status, output = run(base_model="lab/base")
    assert status == 0
    sent = {name.removeprefix("lab/base/") for name in server.sent}
    assert sent == {file.name for file in base.iterdir()} - {
        *("consolidated.safetensors", "pytorch_model.bin", "model.gguf", "model.onnx"),
    }
    want = steered_the_slow_way(base, tuned, HEADS, 2.0)
    assert all(same_bits(tensor, want[key]) for key, tensor in stored(output).items())
    facts = json.loads((output / "soteria.json").read_text())
    assert (facts["base_model"], facts["base_revision"]) == ("lab/base", Hub.REVISION)
    assert facts["finetune_revision"] is None
    assert (output / "README.md").read_text().startswith("---\nbase_model: lab/base\n")


@pytest.mark.parametrize("pickled", [False, True])
def test_of_a_tuned_model_on_the_hub_only_shards_with_output_projections_are_downloaded(
    tmp_path, base, hub, run, pickled
):
    tuned = write(tmp_path / "tuned", tuned=True, shard_size="20KB")
    want = steered_the_slow_way(base, tuned, HEADS, 2.0)
    if pickled:
        pickle_weights(tuned)
    index = json.loads(next(tuned.glob("*.index.json")).read_text())["weight_map"]
    needed = {shard for key, shard in index.items() if "o_proj" in key}
    assert len(needed) < len(set(index.values()))
    server = hub({"lab/tuned": tuned})
    status, output = run(finetune_model="lab/tuned")
    assert status == 0
    weights = {name.removeprefix("lab/tuned/") for name in server.sent if name.endswith((".safetensors", ".bin"))}
    assert weights == needed
    assert all(same_bits(tensor, want[key]) for key, tensor in stored(output).items())


def test_an_adapter_on_the_hub_is_downloaded_alone(tmp_path, base, hub, run):
    adapter = write_adapter(tmp_path / "adapter", base)
    server = hub({"lab/adapter": adapter})
    assert run(finetune_model="lab/adapter")[0] == 0
    assert "lab/adapter/adapter_model.safetensors" in server.sent


def test_a_model_that_the_hub_does_not_have_is_refused_in_a_sentence(hub, run, capsys):
    hub({})
    assert run(finetune_model="lab/nothing")[0] == 2
    sentence = capsys.readouterr().err
    assert "'lab/nothing' is no local folder and cannot be had from the hub" in sentence
    assert sentence.count("\n") == 1


# --- broken input ----------------------------------------------------------------------------------------------------


def header_of(file: Path) -> tuple[dict, bytes]:
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def with_header(file: Path, change: Callable[[dict], object]) -> None:
    header, data = header_of(file)
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


def entry(header: dict) -> dict:
    return header[O_PROJ.format(0)]


# On a single-file model: what is done to its weight file.
WEIGHT_FAULTS: dict[str, Callable[[Path], object]] = {
    "empty": lambda f: f.write_bytes(b""),
    "seven bytes": lambda f: f.write_bytes(b"1234567"),
    "truncated in the header": lambda f: f.write_bytes(f.read_bytes()[:50]),
    "truncated in the data": lambda f: f.write_bytes(f.read_bytes()[:-4]),
    "longer than it says": lambda f: f.write_bytes(f.read_bytes() + b"more"),
    "header length of petabytes": lambda f: f.write_bytes(struct.pack("<Q", 2**50) + f.read_bytes()[8:]),
    "header length of zero": lambda f: f.write_bytes(struct.pack("<Q", 0) + f.read_bytes()[8:]),
    "header that is no JSON": lambda f: f.write_bytes(struct.pack("<Q", 8) + b"{nojson}"),
    "header that is a list": lambda f: f.write_bytes(struct.pack("<Q", 2) + b"[]"),
    "offsets beyond the file": lambda f: with_header(f, lambda h: entry(h).update(data_offsets=[0, 2**40])),
    "offsets that run backwards": lambda f: with_header(f, lambda h: entry(h).update(data_offsets=[4096, 0])),
    "negative offsets": lambda f: with_header(f, lambda h: entry(h).update(data_offsets=[-4096, 0])),
    "offsets that overlap": lambda f: with_header(f, lambda h: entry(h).update(data_offsets=[0, 4096])),
    "a shape that lies": lambda f: with_header(f, lambda h: entry(h).update(shape=[32, 64])),
    "a dtype that lies": lambda f: with_header(f, lambda h: entry(h).update(dtype="F16")),
    "an unknown dtype": lambda f: with_header(f, lambda h: entry(h).update(dtype="F3")),
    "no dtype": lambda f: with_header(f, lambda h: entry(h).pop("dtype")),
    "a missing projection": lambda f: safetensors.torch.save_file(
        {key: t for key, t in stored(f.parent).items() if key != O_PROJ.format(0)}, f
    ),
    "a git-lfs pointer": lambda f: f.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n"),
    "a folder": lambda f: (f.unlink(), f.mkdir()),
    "a link to nowhere": lambda f: (f.unlink(), f.symlink_to("nowhere")),
}


def edit_index(folder: Path, change: Callable[[dict], object]) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


def edit_config(folder: Path, **values) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


# On a sharded model: what is done to its folder.
FOLDER_FAULTS: dict[str, Callable[[Path], object]] = {
    "a missing shard": lambda d: sorted(d.glob("*.safetensors"))[0].unlink(),
    "an index naming a shard that never was": lambda d: edit_index(
        d, lambda i: i["weight_map"].update({"x": "model-00099-of-00099.safetensors"})
    ),
    "an index leading out": lambda d: edit_index(d, lambda i: i["weight_map"].update({"x": "../out.safetensors"})),
    "an index leading to the root": lambda d: edit_index(d, lambda i: i["weight_map"].update({"x": "/etc/passwd"})),
    "an index naming its config": lambda d: edit_index(d, lambda i: i["weight_map"].update({"x": "config.json"})),
    "an index with numbers": lambda d: edit_index(d, lambda i: i["weight_map"].update({"x": 3})),
    "an index without a map": lambda d: edit_index(d, lambda i: i.pop("weight_map")),
    "an index that is no JSON": lambda d: (d / "model.safetensors.index.json").write_text("{"),
    "an index in another encoding": lambda d: (d / "model.safetensors.index.json").write_bytes(b"\xff\xfe{\0}\0"),
    "a projection in two shards under two names": lambda d: safetensors.torch.save_file(
        safetensors.torch.load_file(sorted(d.glob("*.safetensors"))[0])
        | {"copy." + O_PROJ.format(layer): torch.zeros(32, 32) for layer in range(3)},
        sorted(d.glob("*.safetensors"))[0],
    ),
    "no config": lambda d: (d / "config.json").unlink(),
    "a config that is no JSON": lambda d: (d / "config.json").write_text("{"),
    "a config that is a list": lambda d: (d / "config.json").write_text("[]"),
    "a config with a text for a number": lambda d: edit_config(d, hidden_size="wide"),
    "a config with no heads": lambda d: edit_config(d, num_attention_heads=0),
    "a config with a dtype that is none": lambda d: edit_config(d, dtype="float7", num_hidden_layers=4),
    "a config of no architecture": lambda d: (d / "config.json").write_text('{"model_type": "nonesuch"}'),
}
HEAD_LISTS = {
    "no JSON": "[[0, 1], ",
    "an object": '{"0": 1}',
    "empty": "",
    "an empty list": "[]",
    "numbers alone": "[0, 1]",
    "three numbers": "[[0, 1, 2]]",
    "texts": '[["0", "1"]]',
    "fractions": "[[0.5, 1]]",
    "below zero": "[[-1, 0]]",
    "truth values": "[[true, false]]",
    "one head twice": "[[0, 1], [0, 1]]",
    "a head too many": "[[0, 4]]",
    "a layer too many": "[[3, 0]]",
    "NaN": "[[NaN, 0]]",
}


def adapter_fault(change: Callable[[dict], object]) -> Callable[[Path], object]:
    def apply(folder: Path) -> None:
        path = folder / "adapter_config.json"
        config = json.loads(path.read_text())
        change(config)
        path.write_text(json.dumps(config))

    return apply


def adapter_weights(change: Callable[[dict], dict]) -> Callable[[Path], object]:
    return lambda folder: safetensors.torch.save_file(change(stored(folder)), folder / "adapter_model.safetensors")


ADAPTER_FAULTS = {
    "IA3": adapter_fault(lambda c: c.update(peft_type="IA3")),
    "no alpha": adapter_fault(lambda c: c.pop("lora_alpha")),
    "an alpha in words": adapter_fault(lambda c: c.update(lora_alpha="six")),
    "an alpha pattern in words": adapter_fault(lambda c: c.update(alpha_pattern={"o_proj": "six"})),
    "DoRA": adapter_fault(lambda c: c.update(use_dora=True)),
    "settings that are a list": lambda d: (d / "adapter_config.json").write_text("[]"),
    "no weights": lambda d: (d / "adapter_model.safetensors").unlink(),
    "truncated weights": lambda d: (d / "adapter_model.safetensors").write_bytes(b"12345678"),
    "no factor B": adapter_weights(lambda w: {key: t for key, t in w.items() if "lora_B" not in key}),
    "factors of unlike ranks": adapter_weights(
        lambda w: {key: t[:2].contiguous() if "lora_A" in key else t for key, t in w.items()}
    ),
    "another architecture's names": adapter_weights(lambda w: {k.replace("o_proj", "wo"): t for k, t in w.items()}),
    "another width": adapter_weights(lambda w: {key: t.repeat(1, 2) if "lora_A" in key else t for key, t in w.items()}),
    "factors that are not finite": adapter_weights(lambda w: {key: t * float("nan") for key, t in w.items()}),
}


@pytest.fixture
def refused(run, capsys):
    def check(**paths) -> str:
        capsys.readouterr()
        status, output = run(**paths)
        sentence = capsys.readouterr().err
        assert status == 2, sentence
        assert sentence.startswith("error: ")
        assert sentence.count("\n") == 1
        assert not output.parent.exists() or not list(output.parent.iterdir())
        return sentence

    return check


@pytest.mark.parametrize("which", ["base_model", "finetune_model"])
@pytest.mark.parametrize("fault", WEIGHT_FAULTS)
def test_a_weight_file_with_a_fault_is_refused(tmp_path, tuned, refused, which, fault):
    broken = shutil.copytree(tuned, tmp_path / "broken")
    WEIGHT_FAULTS[fault](broken / "model.safetensors")
    assert "broken" in refused(**{which: broken})


@pytest.mark.parametrize("which", ["base_model", "finetune_model"])
@pytest.mark.parametrize("fault", FOLDER_FAULTS)
def test_a_sharded_folder_with_a_fault_is_refused(tmp_path, refused, which, fault):
    broken = write(tmp_path / "broken", tuned=True, shard_size=SHARDS)
    FOLDER_FAULTS[fault](broken)
    assert "broken" in refused(**{which: broken})


@pytest.mark.parametrize("text", HEAD_LISTS.values(), ids=HEAD_LISTS)
def test_a_head_list_with_a_fault_is_refused(tmp_path, refused, text):
    (tmp_path / "English_Heads.json").write_text(text)
    assert "English_Heads.json" in refused(head_folder=tmp_path)


@pytest.mark.parametrize("fault", ADAPTER_FAULTS)
def test_an_adapter_with_a_fault_is_refused(tmp_path, base, refused, fault):
    adapter = write_adapter(tmp_path / "adapter", base)
    ADAPTER_FAULTS[fault](adapter)
    refused(finetune_model=adapter)


class Dangerous:
    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("which", ["base_model", "finetune_model"])
@pytest.mark.parametrize("content", ["code", [torch.zeros(2)], {"x": 3}], ids=["code", "list", "number"])
def test_a_pickle_of_something_else_than_tensors_is_refused_and_not_run(tmp_path, tuned, refused, which, content):
    pickled, trace = shutil.copytree(tuned, tmp_path / "pickled"), tmp_path / "it-ran"
    (pickled / "model.safetensors").unlink()
    torch.save({"x": Dangerous(trace)} if content == "code" else content, pickled / "pytorch_model.bin")
    assert "pytorch_model.bin" in refused(**{which: pickled})
    assert not trace.exists()


def test_a_notebook_gets_these_refusals_as_user_errors(tmp_path):
    with pytest.raises(UserError, match="no other weights"):
        Checkpoint.open(str(tmp_path))
