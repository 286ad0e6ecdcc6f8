"""One base, many languages: the task vector of the output projections on disk once, and a model that switches.

A delta folder holds `delta.safetensors` (tuned minus base of every layer's output projection, float32 unless told
otherwise), `heads/<Language>_Heads.json`, a model card and `soteria.json`.
"""

import hashlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from soteria.errors import UserError
from soteria.languages import find_language
from soteria.models.checkpoints import Checkpoint
from soteria.models.loading import DTYPES, LoadedModel, load_geometry, load_weights, read_geometry
from soteria.models.task_vector import TaskVector
from soteria.models.tensors import Place, Planned, read_tensor, write_tensors
from soteria.scoring.heads import read_heads, write_heads
from soteria.steering.checkpoint import front_matter, input_facts, made_before, versions
from soteria.steering.formula import (
    Steering,
    apply,
    check_fits,
    check_scaling_factor,
    head_list_hash,
    open_steering,
    restore,
)
from soteria.storage import files, paths
from soteria.storage.paths import FACTS, language_file

WEIGHTS = "delta.safetensors"
SAMPLES = 4096  # values of each projection that tell one base from another


def write_delta(
    steerings: dict[str, Steering], output: Path, *, dtype: str | None = None, overwrite: bool = False
) -> dict:
    """Write the task vector and head lists, by the languages' names, as one folder; return its `soteria.json`.

    The steerings share a task vector and a scaling factor, which `load_steered` uses when told nothing else. A folder
    made from the same inputs is reused. Raises UserError as `steer_checkpoint` does.
    """
    (vector, scaling_factor), *others = [(each.vector, each.scaling_factor) for each in steerings.values()]
    if any(other != (vector, scaling_factor) for other in others):
        raise ValueError("the steerings of a delta must share one task vector and one scaling factor")
    layers = range(vector.geometry.n_layers)
    vector.check_finite(layers)
    inputs = {
        "format": "delta",
        **input_facts(vector),
        "languages": {language: head_list_hash(steering.heads) for language, steering in steerings.items()},
        "scaling_factor": scaling_factor,
        "dtype": dtype or "float32",
    }
    made = made_before(output, inputs, vector, overwrite)
    if made:
        return made
    places = [vector.base_place(layer) for layer in layers]
    planned = {
        f"{name}.weight": Planned(DTYPES[dtype or "float32"], place.shape, partial(vector.at, layer))
        for layer, (name, place) in enumerate(zip(vector.geometry.projection_names, places, strict=True))
    }
    with files.whole_folder(output) as folder:
        total = sum(tensor.n_bytes for tensor in planned.values())
        files.check_room(folder, total)
        with tqdm(total=total, desc="writing the delta", unit="B", unit_scale=True, disable=None) as bar:
            write_tensors(planned, folder / WEIGHTS, bar.update)
        for language, steering in steerings.items():
            write_heads(folder / "heads" / language_file(language), steering.heads)
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


class DeltaVector(TaskVector):
    """The task vector in a delta folder, which stands for the tuned model; in the dtype that the delta stores."""

    def at(self, layer: int) -> Tensor:
        return read_tensor(self.tuned_place(layer))


@dataclass
class LanguageSwitch:
    """Steers a loaded model for one language at a time, in place, and back to the base exactly."""

    loaded: LoadedModel
    vector: DeltaVector
    languages: list[str]
    scaling_factor: float

    def open(self, language: str, scaling_factor: float) -> Steering:
        """The steering of a language by name or code. Raises UserError for one that the delta does not have."""
        name = find_language(language).name
        if name not in self.languages:
            raise UserError(f"{self.vector.tuned.name} has no heads of {name}, only of {', '.join(self.languages)}")
        path = self.vector.tuned.folder / "heads" / language_file(name)
        return open_steering(self.vector, read_heads(path), scaling_factor, source=str(path))

    def set_language(self, language: str | None, scaling_factor: float | None = None) -> None:
        """Steer for a language by name or code, or not at all with None; `scaling_factor` as given at loading.

        Raises UserError for an unknown language or a factor below 0, and leaves the model as it was.
        """
        factor = self.scaling_factor if scaling_factor is None else scaling_factor
        check_scaling_factor(factor)
        steering = None if language is None else self.open(language, factor)
        restore(self.loaded)
        if steering:
            apply(self.loaded, steering)


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

    The model is transformers' own with one more method: `set_language("hi")` switches it in place, `set_language(None)`
    gives back exactly the base. `scaling_factor` is the delta's own unless given. With `dtype` "stored", the
    checkpoint's own, the weights are the very ones that `steer.py` writes. Raises UserError for a delta that is broken
    or was made for another base, and for everything that `load_weights` refuses.
    """
    base, delta = str(base), Path(delta)
    facts = files.read_facts(delta / FACTS)
    if facts.get("format") != "delta" or not {"languages", "scaling_factor", "base_projections"} <= facts.keys():
        raise UserError(f"{delta} is not a delta folder; make one with steer.py --format delta")
    factor = facts["scaling_factor"] if scaling_factor is None else scaling_factor
    check_scaling_factor(factor)
    geometry = load_geometry(base)
    checkpoint = Checkpoint.open(base, [f"{name}.weight" for name in geometry.projection_names])
    vector = DeltaVector(checkpoint, Checkpoint(str(delta), delta, None, (delta / WEIGHTS,)), geometry)
    if projections_hash([vector.base_place(layer) for layer in range(geometry.n_layers)]) != facts["base_projections"]:
        raise UserError(f"{delta} was made for {facts['base_model']!r} as it was then; {base!r} has other weights")
    vector.check_shapes()
    model = load_weights(base, device, dtype)
    loaded = LoadedModel(base, model, None, read_geometry(model))
    check_fits(loaded, vector)
    switch = LanguageSwitch(loaded, vector, list(facts["languages"]), factor)
    switch.set_language(language)
    model.set_language = switch.set_language
    return model
