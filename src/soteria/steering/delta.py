"""One base, many languages: the task vector of the output projections on disk once, and a model that switches.

A delta folder holds `delta.safetensors` (tuned minus base of every layer's output projection, float32 by default),
`heads/<Language>_Heads.json`, a model card and `soteria.json`.
"""

from functools import partial
from pathlib import Path

import xxhash
from torch import Tensor
from transformers import PreTrainedModel

from soteria.errors import UserError
from soteria.languages import find_language
from soteria.models.checkpoints import Checkpoint
from soteria.models.geometry import read_geometry
from soteria.models.loading import DTYPES, LoadedModel, load_geometry, load_weights
from soteria.models.task_vector import TaskVector
from soteria.models.tensors import Place, Planned, read_tensor, tensor_bytes, write_tensors
from soteria.scoring.heads import read_heads, write_heads
from soteria.steering import formula
from soteria.steering.checkpoint import (
    DELTA_WEIGHTS,
    DeltaFacts,
    describe,
    input_facts,
    made_before,
    progress,
    result_in,
    versions,
)
from soteria.steering.formula import Steering, head_list_hash, open_steering
from soteria.storage import files, paths
from soteria.storage.paths import FACTS, language_file
from soteria.storage.side_files import read_noted


def write_delta(
    steerings: dict[str, Steering], output: Path, *, dtype: str | None = None, overwrite: bool = False
) -> dict:
    """Write the task vector and the head lists, keyed by language name, as one folder; return its `soteria.json`.

    The steerings share a task vector and the scaling factor that `load_steered` uses by default. A folder made from the
    same inputs is reused. Raises UserError as `steer_checkpoint` does.
    """
    (vector, scaling_factor), *others = [(steering.vector, steering.scaling_factor) for steering in steerings.values()]
    if any(other != (vector, scaling_factor) for other in others):
        raise ValueError("the steerings of a delta must share one task vector and one scaling factor")
    inputs = {
        "format": "delta",
        **input_facts(vector),
        "languages": {language: head_list_hash(steering.heads) for language, steering in steerings.items()},
        "scaling_factor": scaling_factor,
        "dtype": dtype or "float32",
    }
    made = made_before(output, inputs, (vector.base, vector.tuned), overwrite)
    if made and all(_has_list(output, language, noted) for language, noted in inputs["languages"].items()):
        return made
    vector.check_finite(vector.geometry.layers)
    places = [vector.place(vector.base, layer) for layer in vector.geometry.layers]
    planned = {
        f"{name}.weight": Planned(DTYPES[inputs["dtype"]], place.shape, partial(vector.at, layer))
        for layer, place, name in zip(vector.geometry.layers, places, vector.geometry.projection_names, strict=True)
    }
    with files.whole_folder(output) as folder:
        total = sum(tensor.n_bytes for tensor in planned.values())
        files.check_room(folder, total)
        with progress("writing the delta", total) as bar:
            write_tensors(planned, folder / DELTA_WEIGHTS, bar.update)
        for language, steering in steerings.items():
            write_heads(folder / "heads" / language_file(language), steering.heads)
        facts = inputs | {"base_projections_xxh3": projections_hash(places), "versions": versions()}
        describe(folder, delta_card(vector.base.name, list(steerings)), list(steerings), facts)
    return facts


def _has_list(delta: Path, language: str, noted: str) -> bool:
    """Whether a delta's head list of a language is the one whose hash its facts note."""
    try:
        return head_list_hash(read_heads(delta / "heads" / language_file(language))) == noted
    except UserError:
        return False


def projections_hash(places: list[Place]) -> str:
    """A hash (XXH3) of the output projections, the same whatever files or lossless dtype hold them."""
    digest = xxhash.xxh3_128()
    for place in places:
        digest.update(tensor_bytes(read_tensor(place).float()))
    return digest.hexdigest()


def delta_card(base: str, languages: list[str]) -> str:
    base = paths.model_slug(base)
    return f"""# Steering of {base}, by language

Made with Soteria (Banerjee et al., 2025): the task vector (tuned - base) of the attention output projections, and the
functional heads of {", ".join(languages)}. It is used together with its base:

```python
import soteria

model = soteria.load_steered("path/to/{base}", "path/to/this/folder", language="{languages[0]}")
model.set_language(None)  # the base, exactly
```
"""


class DeltaVector(TaskVector):
    """The task vector in a delta folder, which takes the place of the tuned model; in the dtype of its file."""

    def at(self, layer: int) -> Tensor:
        return read_tensor(self.place(self.tuned, layer))


def load_steered(
    base: str | Path,
    delta: str | Path,
    language: str | None = None,
    scaling_factor: float | None = None,
    *,
    device: str | None = None,
    dtype: str = "stored",
) -> PreTrainedModel:
    """Load a base model with a delta folder of `steer.py --format delta`, steered for a language if one is given.

    The model is transformers' own with one more method: `set_language("hi")` switches it in place, `set_language(None)`
    restores the base exactly. `scaling_factor` defaults to the delta's own. With `dtype` "stored", the checkpoint's
    own, the weights equal those that `steer.py` writes. Raises UserError for a delta that is broken or was made from
    another base, and whenever `load_weights` does.
    """
    base, delta = str(base), Path(delta)
    facts = read_noted(delta / FACTS, DeltaFacts)
    if facts.get("format") != "delta":
        raise UserError(f"{delta} is not a delta folder; make one with steer.py --format delta")
    default = facts["scaling_factor"] if scaling_factor is None else scaling_factor
    formula.check_scaling_factor(default)
    geometry = load_geometry(base)
    checkpoint = Checkpoint.open(base, [f"{name}.weight" for name in geometry.projection_names], to_steer=True)
    vector = DeltaVector(checkpoint, result_in(delta, facts), geometry)
    places = [vector.place(checkpoint, layer) for layer in geometry.layers]
    if projections_hash(places) != facts["base_projections_xxh3"]:
        raise UserError(f"{base!r} has other weights than {facts['base_model']!r} had when {delta} was made from it")
    vector.check_projections()
    if facts.get("weights") not in (None, vector.tuned.fingerprint):
        raise UserError(f"{delta} has other weights than it was written with; make it again with steer.py")
    model = load_weights(base, device, dtype)
    loaded = LoadedModel(base, model, None, read_geometry(model))
    formula.check_fits(loaded, vector)

    def set_language(language: str | None, scaling_factor: float | None = None) -> None:
        """Steer the model for a language by name or code, or not at all with None.

        Raises UserError for a language that the delta lacks or a factor below 0, and leaves the model as it was.
        """
        factor, steering = default if scaling_factor is None else scaling_factor, None
        formula.check_scaling_factor(factor)
        if language is not None:
            name = find_language(language).name
            if name not in facts["languages"]:
                raise UserError(f"{delta} has no heads of {name}, only of {', '.join(facts['languages'])}")
            path = delta / "heads" / language_file(name)
            steering = open_steering(vector, read_heads(path), factor, source=str(path))
            if head_list_hash(steering.heads) != facts["languages"][name]:
                raise UserError(f"{path} is not the head list that {delta} was made with; make it again with steer.py")
        formula.restore(loaded)
        if steering:
            try:
                formula.apply(loaded, steering)
            except UserError:
                formula.restore(loaded)
                raise

    set_language(language)
    model.set_language = set_language
    return model
