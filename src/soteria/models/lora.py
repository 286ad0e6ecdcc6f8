"""The change that a LoRA adapter makes to a weight, `scale * B @ A` (Hu et al., 2022), from PEFT's files."""

import math
import re

from torch import Tensor

from soteria.errors import UserError
from soteria.models.checkpoints import Checkpoint, is_parameter
from soteria.models.tensors import Place, read_tensor

# Initializations that leave the base's weights alone, so that B @ A is all that training changed.
PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
NOT_PLAIN = ("use_dora", "use_qalora", "use_bdlora")


class LoraAdapter:
    """The adapter in a checkpoint. Raises UserError unless it is a plain LoRA."""

    def __init__(self, checkpoint: Checkpoint):
        self.checkpoint, config = checkpoint, checkpoint.config
        self._what = f"the adapter {checkpoint.name!r}"
        if config.get("peft_type") != "LORA":
            raise UserError(f"{self._what} is of type {config.get('peft_type')!r}; give a LoRA adapter")
        if config.get("init_lora_weights") not in PLAIN_STARTS or any(config.get(key) for key in NOT_PLAIN):
            raise UserError(f"{self._what} is not a plain LoRA; merge it into its base and give the result")
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
        keys = [key.removesuffix(ending) for key in self.checkpoint.places if key.endswith(ending)]
        return [key.removeprefix("base_model.model.") for key in keys]

    def factors(self, module: str) -> tuple[Place, Place] | None:
        """A (rank, in) and B (out, rank) of a module, or None if the adapter does not change it."""
        a, b = (
            [place for key, place in self.checkpoint.places.items() if is_parameter(key, f"{module}.lora_{x}.weight")]
            for x in "AB"
        )
        if not a and not b:
            return None
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
