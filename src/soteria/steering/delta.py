"""One base, many languages: the task vector of the output projections on disk once, and a model that switches.

A delta folder holds `delta.safetensors` (tuned minus base of every layer's output projection, float32 unless told
otherwise), `heads/<Language>_Heads.json`, a model card and `soteria.json`.
"""

import hashlib
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from soteria.errors import UserError
from soteria.languages import find_language
from soteria.models.checkpoints import Checkpoint
from soteria.models.loading import DTYPES, AttentionGeometry, LoadedModel, load_geometry, load_weights, read_geometry
from soteria.models.task_vector import TaskVector
from soteria.models.tensors import Place, Planned, all_finite, read_places, read_tensor, write_tensors
from soteria.scoring.heads import Head, check_heads, read_heads, write_heads
from soteria.steering.checkpoint import front_matter, input_facts, made_before, versions
from soteria.steering.formula import check_in_memory, check_scaling_factor, head_list_hash, slices_of, steer_slices
from soteria.storage import files, paths
from soteria.storage.paths import FACTS, language_file

WEIGHTS = "delta.safetensors"
SAMPLES = 4096  # values of each projection that tell one base from another


def write_delta(
    vector: TaskVector,
    heads: dict[str, list[Head]],
    scaling_factor: float,
    output: Path,
    *,
    dtype: str | None = None,
    overwrite: bool = False,
) -> dict:
    """Write the task vector and head lists, by the languages' names, as one folder; return its `soteria.json`.

    `scaling_factor` is what `load_steered` uses when told nothing else. A folder made from the same inputs is reused.
    Raises UserError as `steer_checkpoint` does.
    """
    base, geometry = vector.base, vector.geometry
    check_scaling_factor(scaling_factor)
    for language, listed in heads.items():
        check_heads(listed, geometry.n_layers, geometry.n_heads, f"the head list of {language}", base.name)
    inputs = {
        "format": "delta",
        **input_facts(vector),
        "languages": {language: head_list_hash(listed) for language, listed in heads.items()},
        "scaling_factor": scaling_factor,
        "dtype": dtype or "float32",
    }
    made = made_before(output, inputs, vector, overwrite)
    if made:
        return made
    differs, stored_as = [], DTYPES[dtype or "float32"]
    steered_in_any = sorted({head for listed in heads.values() for head in listed})

    def compute(layer: int) -> Tensor:
        delta = vector.at(layer)
        if not all_finite(delta):
            raise UserError(f"{geometry.projection_names[layer]} is not finite in base or tuned; one of them is broken")
        differs.append(any(delta[at].any() for at in slices_of(geometry, steered_in_any, layer)))
        return delta

    planned = {
        f"{name}.weight": Planned(stored_as, vector.base_place(layer).shape, lambda layer=layer: compute(layer))
        for layer, name in enumerate(geometry.projection_names)
    }
    with files.whole_folder(output) as folder:
        total = sum(tensor.n_bytes for tensor in planned.values())
        files.check_room(folder, total)
        with tqdm(total=total, desc="writing the delta", unit="B", unit_scale=True, disable=None) as bar:
            write_tensors(planned, folder / WEIGHTS, bar.update)
        if not any(differs):
            raise vector.equality()
        for language, listed in heads.items():
            write_heads(folder / "heads" / language_file(language), listed)
        places = [vector.base_place(layer) for layer in range(geometry.n_layers)]
        facts = inputs | {"base_projections": projections_hash(places), "versions": versions()}
        files.write_text(folder / "README.md", delta_card(facts))
        files.write_json(folder / FACTS, facts)
    return facts


def projections_hash(places: list[Place]) -> str:
    """A hash of samples of the output projections, the same whatever dtype can hold them and whatever files do."""
    digest = hashlib.sha256()
    for place in places:
        values = read_tensor(place).reshape(-1)
        digest.update(values[:: max(1, len(values) // SAMPLES)].float().numpy().tobytes())
    return digest.hexdigest()


def delta_card(facts: dict) -> str:
    """The README of a delta."""
    languages = list(facts["languages"])
    base = paths.model_slug(facts["base_model"])
    return f"""{front_matter(facts["base_model"], languages)}# Steering of {base}, by language

Made with Soteria (Banerjee et al., 2025): the task vector (tuned - base) of the attention output projections, and the
functional heads of {", ".join(languages)}. It is nothing without its base:

```python
import soteria

model = soteria.load_steered("path/to/{base}", "path/to/this/folder", language="{languages[0]}")
model.set_language(None)  # the base, exactly
```
"""


class LanguageSwitch:
    """Steers a loaded model for one language at a time, in place, and back to the base exactly."""

    def __init__(self, loaded: LoadedModel, delta: Path, facts: dict, scaling_factor: float):
        self.loaded, self.delta, self.languages = loaded, delta, list(facts["languages"])
        self.scaling_factor, self.language = scaling_factor, None
        check_in_memory(loaded)
        places = read_places(delta / WEIGHTS)
        self._places = [places.get(f"{name}.weight") for name in loaded.geometry.projection_names]
        for place, projection in zip(self._places, loaded.projections, strict=True):
            if place is None or place.shape != tuple(projection.weight.shape):
                raise UserError(f"{delta / WEIGHTS} does not fit {loaded.name!r}; it was made for another model")
        # What steering has overwritten: (weight, where, the base's values).
        self._kept: list[tuple[Tensor, tuple[slice, slice], Tensor]] = []

    def heads(self, language: str) -> list[Head]:
        """The heads of a language by name or code. Raises UserError for one that the delta does not have."""
        name = find_language(language).name
        if name not in self.languages:
            raise UserError(f"{self.delta} has no heads of {name}, only of {', '.join(self.languages)}")
        path = self.delta / "heads" / language_file(name)
        listed, geometry = read_heads(path), self.loaded.geometry
        check_heads(listed, geometry.n_layers, geometry.n_heads, path, self.loaded.name)
        return listed

    @torch.no_grad()
    def set_language(self, language: str | None, scaling_factor: float | None = None) -> None:
        """Steer for a language by name or code, or not at all with None; `scaling_factor` as given at loading.

        Raises UserError for an unknown language or a factor below 0, and leaves the model as it was.
        """
        factor = self.scaling_factor if scaling_factor is None else scaling_factor
        check_scaling_factor(factor)
        heads = [] if language is None else self.heads(language)
        while self._kept:  # the last first, each forgotten only when it is back: Ctrl-C may come anywhere
            weight, at, values = self._kept[-1]
            weight[at] = values
            self._kept.pop()
        self.language = None
        for layer, projection in enumerate(self.loaded.projections):
            slices = slices_of(self.loaded.geometry, heads, layer)
            if not slices:
                continue
            weight, task_vector = projection.weight.data, read_tensor(self._places[layer])
            for at in slices:
                self._kept.append((weight, at, weight[at].clone()))
                steer_slices(weight, task_vector, [at], factor, weight)
        self.language = find_language(language).name if language else None


def load_steered(
    base: str | Path,
    delta: str | Path,
    language: str | None = None,
    scaling_factor: float | None = None,
    *,
    device: str | None = None,
    dtype: str = "stored",
) -> PreTrainedModel:
    """Load a base model with a delta folder of `steer.py --format delta`, steered for a language or not yet.

    The model is transformers' own with one method more: `set_language("hi")` switches it in place, `set_language(None)`
    gives exactly the base back. `scaling_factor` is the delta's own unless given. `dtype`: `stored` is the checkpoint's
    own; the weights are then the very ones that `steer.py` writes. Raises UserError for a delta that is broken or was
    made for another base, and for whatever `load_weights` refuses.
    """
    delta, base = Path(delta), str(base)
    facts = files.read_json(delta / FACTS)
    if not isinstance(facts, dict) or facts.get("format") != "delta" or not isinstance(facts.get("languages"), dict):
        raise UserError(f"{delta} is no delta folder; make one with steer.py --format delta")
    factor = facts["scaling_factor"] if scaling_factor is None else scaling_factor
    check_scaling_factor(factor)
    _check_base(base, delta, facts, load_geometry(base))
    model = load_weights(base, device, dtype)
    switch = LanguageSwitch(LoadedModel(base, model, None, read_geometry(model)), delta, facts, factor)
    switch.set_language(language)
    model.set_language = switch.set_language
    return model


def _check_base(base: str, delta: Path, facts: dict, geometry: AttentionGeometry) -> None:
    names = [f"{name}.weight" for name in geometry.projection_names]
    checkpoint = Checkpoint.open(base, names)
    if projections_hash([checkpoint.find(name) for name in names]) != facts.get("base_projections"):
        raise UserError(f"{delta} was made for {facts['base_model']!r} as it was then; {base!r} has other weights")
