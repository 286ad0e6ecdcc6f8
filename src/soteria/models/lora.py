"""The change that a LoRA adapter makes to a weight, `scale * B @ A` (Hu et al., 2022), from PEFT's files."""

import math
import re
from dataclasses import fields
from functools import cached_property

from torch import Tensor

from soteria.errors import UserError
from soteria.models.checkpoints import Checkpoint
from soteria.models.tensors import Place, read_tensor

# Initializations that leave the base's weights alone, so that B @ A is all that training changed.
PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
# Options of PEFT's LoRA that do not change what an output projection's factors mean, or that are read here. All others
# are refused unless they have PEFT's default.
UNDERSTOOD = {
    *(
        "peft_type",
        "task_type",
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
    ),
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "fan_in_fan_out", "lora_dropout"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "target_parameters"),
    *("modules_to_save", "trainable_token_indices", "init_lora_weights", "eva_config", "ensure_weight_tying"),
}


def _not_understood(config: dict) -> list[str]:
    """The options of an adapter, other than PEFT's defaults, that could mean more than B @ A."""
    from peft import LoraConfig  # takes seconds

    plain = {field.name: field.default for field in fields(LoraConfig)}
    return sorted(
        name
        for name, value in config.items()
        if name not in UNDERSTOOD and value not in (None, False, [], {}) and value != plain.get(name)
    )


class LoraAdapter:
    """The adapter in a checkpoint. Raises UserError unless it is a plain LoRA."""

    def __init__(self, checkpoint: Checkpoint):
        self.checkpoint, config = checkpoint, checkpoint.config
        self._what = f"the adapter {checkpoint.name!r}"
        if config.get("peft_type") != "LORA":
            raise UserError(f"{self._what} is of type {config.get('peft_type')!r}; give a LoRA adapter")
        odd = _not_understood(config)
        if config.get("init_lora_weights") not in PLAIN_STARTS:
            odd.append(f"init_lora_weights {config['init_lora_weights']!r}")
        if odd:
            raise UserError(
                f"{self._what} is not a plain LoRA ({', '.join(odd)}); merge it into its base and give the result"
            )
        self._alpha, self._alphas = config.get("lora_alpha"), config.get("alpha_pattern") or {}
        if not isinstance(self._alphas, dict) or not all(
            isinstance(alpha, int | float) for alpha in (self._alpha, *self._alphas.values())
        ):
            raise UserError(f"{self._what} has no usable lora_alpha in its adapter_config.json; fix that file")
        self._rank_stabilized = bool(config.get("use_rslora"))

    @property
    def modules(self) -> list[str]:
        """The names of the modules that the adapter changes, as the base model has them."""
        ending = ".lora_A.weight"
        return [key.removesuffix(ending) for key in self._places if key.endswith(ending)]

    @cached_property
    def _places(self) -> dict[str, Place]:
        """The tensors by their names in the base model, without those that PEFT puts around them.

        An adapter may have been trained on a model that has the base as its text part.
        """
        return {
            key.removeprefix("base_model.model.")
            .replace(".default.weight", ".weight")
            .replace("language_model.", "", 1): place
            for key, place in self.checkpoint.places.items()
        }

    def factors(self, module: str) -> tuple[Place, Place] | None:
        """A (rank, in) and B (out, rank) of a module, or None if the adapter does not change it."""
        own = {key: place for key, place in self._places.items() if key.startswith(f"{module}.")}
        if not own:
            return None
        a, b = ([place for key, place in own.items() if key.endswith(f".lora_{letter}.weight")] for letter in "AB")
        if len(own) > len(a) + len(b):  # such as a module of `modules_to_save`, whole
            raise UserError(
                f"{self._what} has more than LoRA factors for {module}; merge it into its base and give the result"
            )
        if len(a) != 1 or len(b) != 1 or len(a[0].shape) != 2 or a[0].shape[:1] != b[0].shape[1:]:
            raise UserError(f"{self._what} does not have two factors of one rank for {module}; save it again")
        return a[0], b[0]

    def scale(self, module: str, rank: int) -> float:
        """What the product of a module's factors is multiplied by."""
        # PEFT's own rule: the first pattern that matches the whole name, or its end after a dot.
        own = (alpha for pattern, alpha in self._alphas.items() if re.match(rf"(.*\.)?({pattern})$", module))
        return next(own, self._alpha) / (math.sqrt(rank) if self._rank_stabilized else rank)

    def delta(self, module: str) -> Tensor | None:
        """What the adapter adds to a module's weight, (out, in), float32, or None if it does not change it."""
        factors = self.factors(module)
        if factors is None:
            return None
        a, b = (read_tensor(place).float() for place in factors)
        return self.scale(module, len(a)) * (b @ a)
