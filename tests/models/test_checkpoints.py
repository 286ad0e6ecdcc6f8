"""Checkpoints on disk and on the hub: pickles, shards, adapters, copies, downloads, and broken files of every kind."""

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import safetensors.torch
import torch
from huggingface_hub.utils import filter_repo_objects
from peft.tuners.tuners_utils import check_target_module_exists
from tiny_models import tiny_config, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

from soteria.errors import UserError
from soteria.models import checkpoints, lora, sources
from soteria.models.checkpoints import Checkpoint, copy_file
from soteria.models.loading import DTYPES
from soteria.models.task_vector import TaskVector
from soteria.models.tensors import Planned, read_places, read_tensor, write_tensors
from soteria.terminal import say_once

SINGLE, SHARDS = "1GB", "20KB"
INDEX = "model.safetensors.index.json"
O_PROJ = "model.layers.{}.self_attn.o_proj.weight"
REVISION = "a" * 40


def write(folder: Path, architecture="llama", *, seed=0, dtype="float32", shard_size=SINGLE, **config) -> Path:
    model = tiny_model(architecture, seed=seed, **config).to(DTYPES[dtype])
    model.save_pretrained(folder, max_shard_size=shard_size)
    return folder


def write_adapter(folder: Path, base: Path, dtype="float32", **settings) -> Path:
    """A random adapter of the base, none of its factors zero."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    lora = {"r": 4, "lora_alpha": 6, "init_lora_weights": False, "target_modules": ["q_proj", "o_proj"]}
    torch.manual_seed(3)
    peft.get_peft_model(model, peft.LoraConfig(**lora | settings)).to(DTYPES[dtype]).save_pretrained(folder)
    return folder


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder, as its safetensors files hold it."""
    return {k: t for path in folder.glob("*.safetensors") for k, t in safetensors.torch.load_file(path).items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether two models have the same keys, dtypes and values."""
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def pickle_weights(folder: Path) -> Path:
    """Turn a folder's safetensors into the `.bin` files that models had before."""

    def as_bin(name: str) -> str:
        return name.replace("model", "pytorch_model", 1).replace(".safetensors", ".bin")

    for path in folder.glob("*.safetensors"):
        torch.save(safetensors.torch.load_file(path), folder / as_bin(path.name))
        path.unlink()
    if (folder / INDEX).exists():
        edit(
            folder / INDEX, lambda i: i.update(weight_map={key: as_bin(name) for key, name in i["weight_map"].items()})
        )
        (folder / INDEX).rename(folder / as_bin(INDEX))
    return folder


def edit(path: Path, change: Callable[[dict], object]) -> None:
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))


def copied(folder: Path, *options) -> Path:
    target = folder.with_name(f"copy of {folder.name}")
    target.mkdir()
    Checkpoint.open(str(folder)).copy_to(target, *options)
    return target


def written(**options):
    return pytest.fixture(scope="module")(lambda tmp_path_factory: write(tmp_path_factory.mktemp("model"), **options))


base, tuned, sharded = written(), written(seed=1), written(seed=1, shard_size=SHARDS)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, base) -> Path:
    return write_adapter(tmp_path_factory.mktemp("adapter"), base)


def refused(base: Path, tuned: Path) -> str:
    with pytest.raises(UserError) as error:
        TaskVector.open(str(base), str(tuned))
    assert "\n" not in str(error.value)
    return str(error.value)


# --- copies


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("shard_size", [SINGLE, SHARDS])
@pytest.mark.parametrize(("dtype", "tied"), [("float32", True), ("bfloat16", False)])
def test_a_copy_has_the_same_weights_as_safetensors(tmp_path, pickled, shard_size, dtype, tied):
    folder = write(tmp_path / "m", dtype=dtype, shard_size=shard_size, tie_word_embeddings=tied)
    want = stored(folder)
    target = copied(pickle_weights(folder) if pickled else folder)
    assert same(stored(target), want)
    assert not list(target.glob("*.bin*")) and (target / INDEX).exists() == (shard_size == SHARDS)
    AutoModelForCausalLM.from_pretrained(target)


def test_a_copy_in_another_dtype_is_rounded_once_and_says_so(tmp_path):
    folder = write(tmp_path / "m", shard_size=SHARDS)
    target = copied(folder, torch.bfloat16)
    assert same(stored(target), {key: tensor.bfloat16() for key, tensor in stored(folder).items()})
    assert json.loads((target / "config.json").read_text())["dtype"] == "bfloat16"
    index, size = json.loads((target / INDEX).read_text()), sum(tensor.nbytes for tensor in stored(target).values())
    assert index["weight_map"].keys() == stored(target).keys()
    assert index["metadata"]["total_size"] == Checkpoint.open(str(folder)).copied_bytes(torch.bfloat16) == size


def test_a_copy_has_only_the_weights_that_transformers_would_load_and_can_be_written_to(tmp_path, base, sharded):
    crowded = shutil.copytree(sharded, tmp_path / "m")
    shutil.copy(base / "model.safetensors", crowded)  # counts before the shards
    (crowded / "pytorch_model.bin").write_bytes(b"other weights")
    (crowded / "original").mkdir()
    (crowded / "chat_template.jinja").write_text("{{ messages }}")
    for path in crowded.iterdir():
        path.chmod(0o555 if path.is_dir() else 0o444)
    target = copied(crowded)
    names = {"config.json", "generation_config.json", "chat_template.jinja", "model.safetensors"}
    assert {path.name for path in target.iterdir()} == names
    assert same(stored(target), stored(base))
    assert all(path.stat().st_mode & 0o200 for path in [target, *target.iterdir()])


def test_a_folder_that_is_no_model_is_refused_without_reading_through_it(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "link").symlink_to("nowhere")
    with pytest.raises(UserError, match=r"has no model.safetensors and no other weights"):
        Checkpoint.open(str(tmp_path))


def test_folders_nested_without_end_are_refused(tmp_path, base):
    folder = shutil.copytree(base, tmp_path / "model")
    (folder / "/".join("d" * 500)).mkdir(parents=True)
    with pytest.raises(UserError, match=r"model has folders nested more than 100 deep"):
        Checkpoint.open(str(folder))


def test_links_that_lead_out_of_a_model_are_not_copied_but_the_hub_caches_and_those_of_weights_are(tmp_path, base):
    (tmp_path / "secret.txt").write_text("key")
    (tmp_path / "keys").mkdir()
    cache = tmp_path / "models--lab--base"
    shutil.copytree(base, cache / "blobs")
    snapshot = cache / "snapshots" / REVISION
    snapshot.mkdir(parents=True)
    for path in base.iterdir():
        (snapshot / path.name).symlink_to(Path("../../blobs", path.name))
    assert same(stored(copied(snapshot)), stored(base))
    for name, target in [
        ("notes.txt", "../../../secret.txt"),
        ("other.json", tmp_path / "secret.txt"),
        ("more", tmp_path / "keys"),
        ("nothing.txt", "nowhere"),
        ("circle.txt", "circle.txt"),
        ("self", "."),
    ]:
        (snapshot / name).symlink_to(target)
        with pytest.raises(UserError, match=name):
            Checkpoint.open(str(snapshot)).copy_to(tmp_path)
        (snapshot / name).unlink()
    own = shutil.copytree(base, tmp_path / "own")
    shutil.move(own / "model.safetensors", tmp_path / "elsewhere.safetensors")
    (own / "model.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
    (own / "README.md").symlink_to("config.json")
    assert same(stored(copied(own)), stored(base))
    assert not (tmp_path / "secret.txt").is_symlink() and "key" not in {path.name for path in tmp_path.iterdir()}


def test_tensors_that_share_memory_in_a_pickle_are_both_written(tmp_path):
    folder = write(tmp_path / "m", tie_word_embeddings=True)
    weights = stored(folder)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    assert same(stored(copied(folder)), weights)


@pytest.mark.parametrize("kernel", ["copies", "refuses", "stops half-way"])
def test_a_file_is_copied_whole_whether_or_not_the_kernel_can(tmp_path, monkeypatch, kernel):
    source, target, told, calls = tmp_path / "a", tmp_path / "b", [], []
    source.write_bytes(os.urandom(300_000))
    copy_file_range = os.copy_file_range

    def copy_some(reader, writer, count):
        calls.append(count)
        if kernel == "refuses" or (kernel == "stops half-way" and len(calls) > 1):
            raise OSError(18, "Invalid cross-device link")
        return copy_file_range(reader, writer, min(count, 100_000))

    monkeypatch.setattr(os, "copy_file_range", copy_some)
    copy_file(source, target, told.append)
    assert target.read_bytes() == source.read_bytes()
    assert sum(told) == 300_000


def test_one_changed_byte_anywhere_makes_another_model(tmp_path):
    folder = write(tmp_path / "model", vocab_size=20_000)  # some megabytes
    path = folder / "model.safetensors"
    found, place = {Checkpoint.open(str(folder)).fingerprint}, read_places(path)["model.norm.weight"]
    for at in (place.start, place.end - 1, path.stat().st_size // 2):
        with path.open("r+b") as file:
            file.seek(at)
            byte = file.read(1)
            file.seek(at)
            file.write(bytes([byte[0] ^ 1]))
        found.add(Checkpoint.open(str(folder)).fingerprint)
    assert len(found) == 4 and path.stat().st_size > 4 * 2**20


def test_too_small_a_disk_is_refused_before_anything_is_written(base, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match="MB free"):
        Checkpoint.open(str(base)).copy_to(tmp_path)
    assert not list(tmp_path.iterdir())


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
        "infinite": torch.tensor([float("inf")]),
    }
    planned = {key: Planned(tensor.dtype, tuple(tensor.shape), lambda t=tensor: t) for key, tensor in tensors.items()}
    told = []
    write_tensors(planned, tmp_path / "own", told.append)
    contiguous = {key: tensor.contiguous() for key, tensor in tensors.items()}
    safetensors.torch.save_file(contiguous, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "own").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert sum(told) == sum(tensor.nbytes for tensor in tensors.values())
    places = read_places(tmp_path / "own")
    raw = (tmp_path / "own").read_bytes()
    assert raw[places["half"].start : places["half"].end] == tensors["half"].numpy().tobytes()
    assert same({key: read_tensor(place) for key, place in places.items()}, contiguous)
    with pytest.raises(UserError, match="big is too large for float16"):
        write_tensors({"big": Planned(torch.float16, (9,), lambda: torch.full((9,), 1e6))}, tmp_path / "own")


# --- the task vector


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_task_vector_is_tuned_minus_base_in_float32_whatever_the_files(tmp_path, architecture):
    name = O_PROJ if architecture == "llama" else "transformer.h.{}.attn.c_proj.weight"
    base = write(tmp_path / "base", architecture, dtype="bfloat16")
    tuned = write(tmp_path / "tuned", architecture, seed=1, shard_size=SHARDS)
    want = [stored(tuned)[name.format(layer)] - stored(base)[name.format(layer)].float() for layer in range(2)]
    for _ in ("safetensors", "pickles"):
        vector = TaskVector.open(str(base), str(tuned))
        assert all(torch.equal(vector.at(layer), want[layer]) for layer in range(2))
        pickle_weights(tuned)
    bare = {key.removeprefix("transformer.").removeprefix("model."): t for key, t in stored(base).items()}
    safetensors.torch.save_file(bare, base / "model.safetensors")  # as the hub's GPT-2 names its tensors
    assert torch.equal(TaskVector.open(str(base), str(tuned)).at(1), want[1])


ADAPTERS = [
    ("llama", {}),
    ("llama", {"use_rslora": True, "rank_pattern": {"o_proj": 5}, "alpha_pattern": {"q_proj": 100, "o_proj": 7}}),
    # A key matches whole names and ends of them after a dot, so `1.` is not layer 11's. It may be a regular expression.
    ("llama", {"rank_pattern": {"1.self_attn.o_proj": 2}, "alpha_pattern": {r"layers\.[02]\.self_attn\.o_proj": 5}}),
    ("llama", {"alpha_pattern": {"1.self_attn.o_proj": 32}, "layers_to_transform": [1, 11]}),
    ("gpt2", {"target_modules": ["attn.c_proj"], "fan_in_fan_out": True}),
]


@pytest.mark.parametrize(("architecture", "settings"), ADAPTERS)
def test_an_adapters_task_vector_is_what_merging_with_peft_adds(tmp_path, architecture, settings):
    base = write(tmp_path / "base", architecture, **({"num_hidden_layers": 12} if architecture == "llama" else {}))
    adapter = write_adapter(tmp_path / "adapter", base, **settings)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    after = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict()
    vector = TaskVector.open(str(base), str(adapter))
    for layer, name in enumerate(vector.geometry.projection_names):
        torch.testing.assert_close(vector.at(layer), after[f"{name}.weight"] - before[f"{name}.weight"])
        changes = layer in settings.get("layers_to_transform", [layer])
        assert vector.at(layer).any() == changes


def test_a_tuned_model_as_far_as_an_unrelated_one_is_said_to_be(tmp_path, base, tuned, capsys):
    say_once.cache_clear()
    near = shutil.copytree(base, tmp_path / "near")
    resave(lambda weights: {key: tensor * 1.3 for key, tensor in weights.items()})(near / "model.safetensors")
    TaskVector.open(str(base), str(near)).say_if_far()
    assert "warning" not in capsys.readouterr().err
    TaskVector.open(str(base), str(tuned)).say_if_far()
    assert f"'{tuned.name}' is 1.4 times the norm of the weights of '{base.name}' away" in capsys.readouterr().err


def write_seeing(folder: Path, **text) -> Path:
    """A model that sees images, with a text part."""
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    text = tiny_config("gemma3").to_dict() | text
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision, mm_tokens_per_image=4)
    model = AutoModelForCausalLM.from_config(config)
    assert hasattr(model.model, "vision_tower")
    model.save_pretrained(folder)
    return folder


def test_an_adapter_of_a_model_that_sees_images_fits_it_and_its_text_part(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(write_seeing(tmp_path / "base"))
    adapter = write_adapter(
        tmp_path / "adapter", tmp_path / "base", alpha_pattern={"language_model.layers.1.self_attn.o_proj": 9}
    )
    merged = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict()
    vector = TaskVector.open(str(tmp_path / "base"), str(adapter))
    for layer, name in enumerate(vector.geometry.projection_names):
        before = read_tensor(vector.place(vector.base, layer))
        torch.testing.assert_close(vector.at(layer), merged[f"{name}.weight"] - before)
    other = shutil.copytree(tmp_path / "base", tmp_path / "other")  # other heads in projections of the same shape
    edit(other / "config.json", lambda found: found["text_config"].update(num_attention_heads=2, head_dim=24))
    assert "num_attention_heads is 4 in" in refused(tmp_path / "base", other)
    alone = write(tmp_path / "text", "gemma3")
    assert torch.equal(TaskVector.open(str(alone), str(adapter)).at(1), vector.at(1))


def test_an_adapter_is_multiplied_out_in_float32_from_half_precision_and_from_pickles(tmp_path, base):
    adapter = write_adapter(tmp_path / "adapter", base, "bfloat16")
    a, b = (stored(adapter)[f"base_model.model.{O_PROJ[:-7].format(0)}.lora_{x}.weight"].float() for x in "AB")
    want = TaskVector.open(str(base), str(adapter)).at(0)
    torch.testing.assert_close(want, b @ a * 6 / 4, rtol=1e-6, atol=1e-6)
    torch.save(stored(adapter), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    assert torch.equal(TaskVector.open(str(base), str(adapter)).at(0), want)


# Options that choose modules, of an adapter that has factors for every output projection.
CHOICES = [
    {"target_modules": ["q_proj"]},
    {"target_modules": "all-linear"},
    {"target_modules": [O_PROJ[:-7].format(layer) for layer in (0, 1)]},
    {"target_modules": r".*\.o_proj"},
    {"target_modules": r"layers\.0.*"},
    {"exclude_modules": ["0.self_attn.o_proj"]},
    {"exclude_modules": r"model\.layers\.1\..*"},
    {"exclude_modules": ["k_proj"]},
    {"layers_to_transform": [1]},
    {"layers_to_transform": [0, 1], "layers_pattern": "layers"},
    {"layers_to_transform": 0, "layers_pattern": ["h", "layers"]},
    {"layers_to_transform": [0, 1], "layers_pattern": "h"},
    {"modules_to_save": ["self_attn"]},
    {"modules_to_save": ["lm_head"]},
]


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_factors_that_peft_would_leave_out_by_the_adapters_config_are_refused(tmp_path, choice):
    base = write(tmp_path / "base", num_hidden_layers=2)
    adapter = write_adapter(tmp_path / "adapter", base)
    want = TaskVector.open(str(base), str(adapter)).layers
    edit(adapter / "adapter_config.json", lambda config: config.update(choice))
    config = peft.LoraConfig.from_pretrained(adapter)
    names = [O_PROJ[:-7].format(layer) for layer in want]
    if "all-linear" in choice.values() or all(check_target_module_exists(config, name) for name in names):
        assert all(torch.equal(TaskVector.open(str(base), str(adapter)).at(layer), want[layer]) for layer in want)
    else:
        assert "but its adapter_config.json says none" in refused(base, adapter)


def test_heads_of_another_number_are_told_where_the_base_sees_images(tmp_path):
    base, tuned = write_seeing(tmp_path / "base"), write_seeing(tmp_path / "tuned")
    other = write_seeing(tmp_path / "other", num_attention_heads=2, head_dim=16)
    assert TaskVector.open(str(base), str(tuned)).head_changes.all()
    assert "num_attention_heads is 4 in" in refused(base, other)


# --- the hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """`hub(id, folder)`: a hub with one model; gives the list of the files that are downloaded from it."""

    def start(model: str, folder: Path) -> list[str]:
        cache, sent = tmp_path / "cache" / REVISION, []
        cache.mkdir(parents=True)

        def download(name, revision=None, allow_patterns=None, ignore_patterns=None):
            assert revision in (None, REVISION)
            if name != model:
                raise OSError("404 Client Error\nfor this address")
            names = sorted(path.name for path in folder.iterdir() if not (cache / path.name).exists())
            for wanted in filter_repo_objects(names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
                shutil.copy(folder / wanted, cache)
                sent.append(wanted)
            return str(cache)

        monkeypatch.setattr(checkpoints, "snapshot_download", download)
        monkeypatch.setattr(sources, "hub_answers", lambda: True)
        return sent

    return start


def test_only_the_weights_that_count_are_downloaded_of_a_base(tmp_path, sharded, hub):
    folder = shutil.copytree(sharded, tmp_path / "base")
    for name in ("consolidated.safetensors", "pytorch_model.bin", "model.gguf", "model.onnx"):
        (folder / name).write_bytes(b"of no use")
    sent = hub("lab/base", folder)
    checkpoint = Checkpoint.open("lab/base")
    assert (set(sent), checkpoint.revision) == ({path.name for path in sharded.iterdir()}, REVISION)
    assert same({key: read_tensor(place) for key, place in checkpoint.places.items()}, stored(sharded))


@pytest.mark.parametrize("pickled", [False, True])
def test_only_shards_with_output_projections_are_downloaded_of_a_tuned_model(tmp_path, base, sharded, hub, pickled):
    want = TaskVector.open(str(base), str(sharded)).at(2)
    folder = shutil.copytree(sharded, tmp_path / "tuned")
    if pickled:
        pickle_weights(folder)
    index = json.loads(next(folder.glob("*.index.json")).read_text())["weight_map"]
    needed = {shard for key, shard in index.items() if "o_proj" in key}
    assert len(needed) < len(set(index.values()))
    sent = hub("lab/tuned", folder)
    assert torch.equal(TaskVector.open(str(base), "lab/tuned").at(2), want)
    assert {name for name in sent if name.endswith((".safetensors", ".bin"))} == needed


def test_an_adapter_is_downloaded_and_a_model_that_is_not_there_is_refused(base, adapter, hub):
    sent = hub("lab/adapter", adapter)
    assert TaskVector.open(str(base), "lab/adapter").at(0).any()
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(sent)
    with pytest.raises(UserError, match=r"^'lab/nothing' is not .*\(404 Client Error for this address\)[^\n]*$"):
        Checkpoint.open("lab/nothing")


# --- broken input


def put(content: bytes) -> Callable[[Path], object]:
    return lambda f: f.write_bytes(content)


def sets(**values) -> Callable[[Path], object]:
    return lambda f: edit(f, lambda found: found.update(values))


def names(shard: object) -> Callable[[Path], object]:
    return lambda f: edit(f, lambda index: index["weight_map"].update(x=shard))


def resave(change: Callable[[dict], dict]) -> Callable[[Path], object]:
    return lambda f: safetensors.torch.save_file(change(safetensors.torch.load_file(f)), f)


def header(change: Callable[[dict], object]) -> Callable[[Path], object]:
    def apply(file: Path) -> None:
        raw = file.read_bytes()
        end = 8 + struct.unpack("<Q", raw[:8])[0]
        found = json.loads(raw[8:end])
        change(found[O_PROJ.format(0)])
        text = json.dumps(found).encode()
        file.write_bytes(struct.pack("<Q", len(text)) + text + raw[end:])

    return apply


FAULTS: dict[tuple[str, str], dict[str, Callable[[Path], object]]] = {
    ("tuned", "model.safetensors"): {
        "empty": put(b""),
        "truncated in the header": lambda f: f.write_bytes(f.read_bytes()[:50]),
        "truncated in the data": lambda f: f.write_bytes(f.read_bytes()[:-4]),
        "longer than it says": lambda f: f.write_bytes(f.read_bytes() + b"more"),
        "header length of petabytes": lambda f: f.write_bytes(struct.pack("<Q", 2**50) + f.read_bytes()[8:]),
        "header not JSON": put(struct.pack("<Q", 8) + b"{nojson}"),
        "offsets beyond the file": header(lambda h: h.update(data_offsets=[0, 2**40])),
        "overlapping offsets": header(lambda h: h.update(data_offsets=[0, 4096])),
        "wrong shape": header(lambda h: h.update(shape=[32, 64])),
        "wrong dtype": header(lambda h: h.update(dtype="F16")),
        "no dtype": header(lambda h: h.pop("dtype")),
        "quantized": resave(lambda w: w | {O_PROJ.format(0): torch.zeros(32, 32, dtype=torch.int8)}),
        "no projection": resave(lambda w: {key: t for key, t in w.items() if key != O_PROJ.format(0)}),
        "projection twice": resave(lambda w: w | {"copy." + O_PROJ.format(0): torch.zeros(32, 32)}),
        "git-lfs pointer": put(b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n"),
        "a folder": lambda f: (f.unlink(), f.mkdir()),
        "a link to nowhere": lambda f: (f.unlink(), f.symlink_to("nowhere")),
    },
    ("sharded", INDEX): {
        "missing shard": lambda f: min(f.parent.glob("*.safetensors")).unlink(),
        "names a shard that is not there": names("model-00099-of-00099.safetensors"),
        "leads out": names("../out.safetensors"),
        "leads to the root": names("/etc/passwd"),
        "names the config": names("config.json"),
        "names a number": names(3),
        "no map": sets(weight_map=None),
        "not JSON": put(b"{"),
        "another encoding": put(b"\xff\xfe{\0}\0"),
    },
    ("sharded", "config.json"): {
        "missing": Path.unlink,
        "not JSON": put(b"{"),
        "a list": put(b"[]"),
        "text for a number": sets(hidden_size="wide"),
        "no heads": sets(num_attention_heads=0),
        "no such dtype": sets(dtype="float7", num_hidden_layers=4),
        "no architecture": put(b'{"model_type": "nonesuch"}'),
    },
    ("adapter", "adapter_config.json"): {
        "IA3": sets(peft_type="IA3"),
        "no alpha": sets(lora_alpha=None),
        "an alpha in words": sets(lora_alpha="six"),
        "an alpha pattern in words": sets(alpha_pattern={"o_proj": "six"}),
        "DoRA": sets(use_dora=True),
        "PiSSA": sets(init_lora_weights="pissa"),
        "KaSA with its defaults": sets(kasa_config={}),
        "an alpha beyond floats": sets(lora_alpha=10**400),
        "another rank": sets(r=8),
        "no modules of the file": sets(target_modules=["q_proj"]),
        "excluded modules": sets(exclude_modules=r".*layers\.1.*o_proj"),
        "fewer layers": sets(layers_to_transform=[0]),
        "a broken pattern": sets(alpha_pattern={"(": 3}),
        "a list": put(b"[]"),
    },
    ("adapter", "adapter_model.safetensors"): {
        "missing": Path.unlink,
        "truncated": put(b"12345678"),
        "no factor B": resave(lambda w: {key: t for key, t in w.items() if "lora_B" not in key}),
        "unlike ranks": resave(lambda w: {key: t[:2].clone() if "lora_A" in key else t for key, t in w.items()}),
        "other names": resave(lambda w: {key.replace("o_proj", "wo"): t for key, t in w.items()}),
        "no rank": resave(lambda w: {key: t[:0] if "lora_A" in key else t[:, :0] for key, t in w.items()}),
        "one layer only": resave(lambda w: {key: t for key, t in w.items() if "layers.0" in key}),
        "a layer too many": resave(lambda w: w | {key.replace("s.0.", "s.7."): t.clone() for key, t in w.items()}),
        "another width": resave(lambda w: {key: t.repeat(1, 2) if "lora_A" in key else t for key, t in w.items()}),
    },
}


@pytest.mark.parametrize(("kind", "file"), FAULTS)
def test_a_folder_with_a_fault_is_refused_by_name_as_base_and_as_tuned(tmp_path, request, base, kind, file):
    for fault, spoil in FAULTS[kind, file].items():
        spoil(shutil.copytree(request.getfixturevalue(kind), tmp_path / fault) / file)
        assert fault in refused(base, tmp_path / fault)
        assert fault in refused(tmp_path / fault, base)


def test_a_pattern_that_matches_without_end_is_ended(base, adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(lora, "MATCHING_SECONDS", 0.2)
    endless = shutil.copytree(adapter, tmp_path / "endless")
    sets(alpha_pattern={"(([a-z]+)*[.0-9]*)*!": 3})(endless / "adapter_config.json")
    assert "take too long to match" in refused(base, endless)


class Dangerous:
    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


def test_a_pickle_of_anything_but_tensors_is_refused_and_its_code_is_not_run(tmp_path, base, tuned):
    pickled, trace = shutil.copytree(tuned, tmp_path / "pickled"), tmp_path / "it-ran"
    (pickled / "model.safetensors").unlink()
    for content in ({"x": Dangerous(trace)}, [torch.zeros(2)], {"x": 3}):
        torch.save(content, pickled / "pytorch_model.bin")
        assert "pytorch_model.bin" in refused(base, pickled)
        assert "pytorch_model.bin" in refused(pickled, base)
    assert not trace.exists()


ODD = {
    "complex": torch.zeros(3, dtype=torch.complex64),
    "unsigned": torch.zeros(3, dtype=torch.uint16),
    "sparse": torch.eye(3).to_sparse(),
    "quantized": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
    "without data": torch.zeros(3, device="meta"),
    "negated": torch._neg_view(torch.ones(3)),
}


@pytest.mark.parametrize("kind", ODD)
def test_pickled_tensors_that_are_not_plain_are_not_copied_and_do_no_harm_in_a_tuned_model(tmp_path, base, tuned, kind):
    folders = []
    for model in (base, tuned):
        folders.append(pickle_weights(shutil.copytree(model, tmp_path / model.name)))
        torch.save(
            torch.load(folders[-1] / "pytorch_model.bin") | {"odd": ODD[kind]}, folders[-1] / "pytorch_model.bin"
        )
    assert TaskVector.open(str(base), str(folders[1])).at(0).any()
    with pytest.raises(UserError, match="stores odd in a form that cannot be copied"):
        copied(folders[0])


@pytest.mark.parametrize("noted", [[1], "much", 3, None])
def test_notes_in_an_index_that_are_no_mapping_are_written_anew(tmp_path, sharded, noted):
    folder = shutil.copytree(sharded, tmp_path / "m")
    edit(folder / INDEX, lambda index: index.update(metadata=noted))
    found = json.loads((copied(folder, torch.float16) / INDEX).read_text())
    assert found["metadata"] == {"total_size": Checkpoint.open(str(folder)).copied_bytes(torch.float16)}


def test_tensors_in_a_dtype_that_torch_lacks_are_copied_but_not_converted(tmp_path):
    folder = write(tmp_path / "m")
    resave(lambda w: w | {O_PROJ.format(0): torch.zeros(32, 32, dtype=torch.uint8)})(folder / "model.safetensors")
    header(lambda h: h.update(dtype="F8_E8M0"))(folder / "model.safetensors")
    assert (copied(folder) / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match=O_PROJ.format(0)):
        Checkpoint.open(str(folder)).copy_to(tmp_path, torch.float16)
