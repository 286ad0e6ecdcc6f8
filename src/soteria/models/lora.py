"""A LoRA adapter's change of a weight, `scale * B @ A`, from its two factors (Hu et al., 2022).

Knows PEFT's files and settings; knows nothing of attention heads.
"""

import math
import re

from torch import Tensor

from soteria.errors import UserError
from soteria.models.checkpoints import Checkpoint, is_parameter
from soteria.models.tensors import Place, read_tensor

# Initialisations that leave the base's weights as they are, so that B @ A is all that training changed.
PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
NOT_PLAIN = ("use_dora", "use_qalora", "use_bdlora")


class LoraAdapter:
    """The adapter of a checkpoint. Raises UserError for an adapter that is no plain LoRA."""

    def __init__(self, checkpoint: Checkpoint):
        self.checkpoint, self.name, config = checkpoint, checkpoint.name, checkpoint.config
        if config.get("peft_type") != "LORA":
            raise UserError(f"the adapter {self.name!r} is of type {config.get('peft_type')!r}, not LORA")
        if config.get("init_lora_weights") not in PLAIN_STARTS or any(config.get(key) for key in NOT_PLAIN):
            raise UserError(f"the adapter {self.name!r} is no plain LoRA; merge it into its base and give the result")
        alphas = config.get("alpha_pattern") or {}
        if not isinstance(alphas, dict) or not all(
            isinstance(alpha, int | float) for alpha in (config.get("lora_alpha"), *alphas.values())
        ):
            raise UserError(f"the adapter {self.name!r} has no usable lora_alpha in its adapter_config.json")
        self._alpha, self._alphas, self._rank_stabilised = config["lora_alpha"], alphas, bool(config.get("use_rslora"))

    def factors(self, module: str) -> tuple[Place, Place] | None:
        """A (rank, in) and B (out, rank) of a module, None where the adapter leaves it alone."""
        a, b = (
            [
                place
                for key, place in self.checkpoint.places.items()
                if is_parameter(key, f"{module}.lora_{which}.weight")
            ]
            for which in "AB"
        )
        if not a and not b:
            return None
        if len(a) != 1 or len(b) != 1 or len(a[0].shape) != 2 or a[0].shape[:1] != b[0].shape[1:]:
            raise UserError(f"the adapter {self.name!r} has no sound pair of factors for {module}")
        return a[0], b[0]

    def shape(self, module: str) -> tuple[int, int] | None:
        """(out, in) of the module that the adapter was made for, None where it leaves it alone."""
        factors = self.factors(module)
        return factors and (factors[1].shape[0], factors[0].shape[1])

    def delta(self, module: str) -> Tensor | None:
        """What the adapter adds to a module's weight, (out, in), float32. None where it leaves it alone."""
        factors = self.factors(module)
        if factors is None:
            return None
        a, b = (read_tensor(place).float() for place in factors)
        # PEFT's own rule: the first pattern that fits the whole name, or its end after a dot.
        own = (alpha for pattern, alpha in self._alphas.items() if re.match(rf"(.*\.)?({pattern})$", module))
        alpha, rank = next(own, self._alpha), a.shape[0]
        return alpha / (math.sqrt(rank) if self._rank_stabilised else rank) * (b @ a)
