"""The change that a LoRA adapter makes to a weight, `scale * B @ A` (Hu et al., 2022), from PEFT's files."""

import math
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property

from torch import Tensor

from soteria.errors import UserError, said
from soteria.models.checkpoints import Checkpoint
from soteria.models.tensors import UNQUANTIZED, Place, read_tensor

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
# Options that say which modules PEFT puts factors on, and how these are scaled.
PLACING = (
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "exclude_modules", "layers_to_transform"),
    *("layers_pattern", "target_parameters", "modules_to_save"),
)
MOST_ALPHA = 1e9
MATCHING_SECONDS = 5  # for the patterns in a config, of which some match without end


def _not_understood(config: dict) -> list[str]:
    """The options of an adapter, other than PEFT's defaults, that could mean more than B @ A."""
    from peft import LoraConfig  # takes seconds

    plain = vars(LoraConfig())
    return sorted(
        name
        for name, value in config.items()
        if name not in UNDERSTOOD
        and value not in (None, False, [])
        and value != plain.get(name, {})  # an empty group of options may switch a variant on
    )


@contextmanager
def _bounded(what: str) -> Iterator[None]:
    """Turn whatever PEFT raises while it reads a config into a UserError, and end it if it takes too long."""

    def stop(*_) -> None:
        raise TimeoutError("its patterns take too long to match")

    may_stop = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGALRM, stop) if may_stop else None
    try:
        if may_stop:
            signal.setitimer(signal.ITIMER_REAL, MATCHING_SECONDS)
        yield
    except Exception as error:  # a broken pattern, or types that PEFT does not expect
        raise UserError(f"{what} has an adapter_config.json that PEFT cannot use ({said(error)}); fix it") from None
    finally:
        if may_stop:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


def as_text_part(name: str) -> str:
    """The name, in a model by itself, of what has another in a model that sees images and has it as its text part."""
    return name.replace("language_model.", "", 1)


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
        alpha, alphas = config.get("lora_alpha"), config.get("alpha_pattern") or {}
        if not isinstance(alphas, dict) or not all(
            isinstance(each, int | float) and abs(each) <= MOST_ALPHA for each in (alpha, *alphas.values())
        ):
            raise UserError(f"{self._what} has no usable lora_alpha in its adapter_config.json; fix that file")
        self._rank_stabilized = bool(config.get("use_rslora"))

    @property
    def modules(self) -> list[str]:
        """The names of the modules that the adapter changes, as the model had them that it was trained on."""
        ending = ".lora_A.weight"
        return [key.removesuffix(ending) for key in self._places if key.endswith(ending)]

    @cached_property
    def _places(self) -> dict[str, Place]:
        """The tensors by their names in the model that was trained, without those that PEFT puts around them."""
        return {
            key.removeprefix("base_model.model.").replace(".default.weight", ".weight"): place
            for key, place in self.checkpoint.places.items()
        }

    def factors(self, module: str) -> tuple[Place, Place] | None:
        """A (rank, in) and B (out, rank) of a module, or None if the adapter does not change it.

        Raises UserError unless they are there exactly where PEFT would put them by the adapter's config.
        """
        own = self._own(module)
        if not own:
            if self._placed(module):
                raise UserError(f"{self._what} lacks the factors of {module}, which its config names; save it again")
            return None
        a, b = ([place for key, place in own.items() if key.endswith(f".lora_{letter}.weight")] for letter in "AB")
        if len(own) > len(a) + len(b):  # such as a module of `modules_to_save`, whole
            raise UserError(
                f"{self._what} has more than LoRA factors for {module}; merge it into its base and give the result"
            )
        if len(a) != 1 or len(b) != 1 or len(a[0].shape) != 2 or a[0].shape[:1] != b[0].shape[1:]:
            raise UserError(f"{self._what} does not have two factors of one rank for {module}; save it again")
        if not {a[0].dtype, b[0].dtype} <= {*UNQUANTIZED}:
            raise UserError(f"{self._what} has quantized factors for {module}; save it in a floating-point dtype")
        placed, found = self._placed(_trained_as(own)), a[0].shape[0]
        if not found or not placed or placed[0] != found:
            noted = f"a rank of {placed[0]}" if placed else "none"
            raise UserError(
                f"{self._what} has factors of rank {found} for {module}, but its adapter_config.json says {noted}; "
                "put back the config that it was saved with"
            )
        return a[0], b[0]

    def _own(self, module: str) -> dict[str, Place]:
        """The tensors of a module, which may be that of a text part."""
        return {
            key: place
            for key, place in self._places.items()
            if key.startswith(f"{module}.") or as_text_part(key).startswith(f"{module}.")
        }

    @cached_property
    def _peft_config(self):
        from peft import LoraConfig

        given = {name: value for name in PLACING if (value := self.checkpoint.config.get(name)) is not None}
        return LoraConfig(**given)

    def _placed(self, module: str) -> tuple[int, float] | None:
        """The rank and alpha that PEFT gives a module by the adapter's config, None for one that it leaves alone."""
        from peft.tuners.tuners_utils import check_target_module_exists
        from peft.utils.other import get_pattern_key

        with _bounded(self._what):
            config = self._peft_config
            parameters = config.target_parameters or []
            named = config.target_modules == "all-linear"
            named = named or any(f".{module}.weight".endswith(f".{parameter}") for parameter in parameters)
            if not named and not check_target_module_exists(config, module):
                return None
            ranks, alphas = config.rank_pattern, config.alpha_pattern
            rank, alpha = (get_pattern_key(patterns, module) for patterns in (ranks, alphas))
            return ranks.get(rank, config.r), alphas.get(alpha, config.lora_alpha)

    def scale(self, module: str, rank: int) -> float:
        """What the product of a module's factors is multiplied by."""
        _, alpha = self._placed(_trained_as(self._own(module)))
        return alpha / (math.sqrt(rank) if self._rank_stabilized else rank)

    def delta(self, module: str) -> Tensor | None:
        """What the adapter adds to a module's weight, (out, in), float32, or None if it does not change it."""
        factors = self.factors(module)
        if factors is None:
            return None
        a, b = (read_tensor(place).float() for place in factors)
        return self.scale(module, len(a)) * (b @ a)


def _trained_as(own: dict[str, Place]) -> str:
    """A module, of whose factors there are some, as the model had it that was trained, and as the config names it."""
    return next(iter(own)).partition(".lora_")[0]
