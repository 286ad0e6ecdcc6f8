"""How many tokens a forward pass may take at once: found from free memory, halved where that was too many.

Knows devices and a model's sizes; knows nothing of what is computed.
"""

import gc
from collections.abc import Callable
from typing import TypeVar

import psutil
import torch
from accelerate.utils.memory import should_reduce_batch_size

from soteria.errors import UserError
from soteria.models.loading import LoadedModel

Result = TypeVar("Result")

MOST_ROWS = 4096  # more than this fills no processor any better
PROMPT_TOKENS = 1024  # assumed length of a prompt, for what its attention takes


def free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def default_rows(loaded: LoadedModel) -> int:
    """The power of two of tokens whose activations take at most half of the memory that is free now."""
    config = loaded.model.config.get_text_config()
    width, heads = config.hidden_size, loaded.geometry.n_heads
    feed_forward = getattr(config, "intermediate_size", None) or 4 * width
    values = 10 * width + 3 * feed_forward + 3 * heads * PROMPT_TOKENS + 3 * config.vocab_size
    rows = free_bytes(loaded.model.device) // 2 // (values * 4)
    return 2 ** max(0, min(rows, MOST_ROWS).bit_length() - 1)


class Rows:
    """The most tokens at once, `most`. It only ever falls. `advice` is what a user may try where it falls too far."""

    def __init__(self, most: int, advice: str = "try a smaller --dtype or --n_shots"):
        self.most, self.advice = most, advice

    def fit(self, attempt: Callable[[int], Result]) -> Result:
        """`attempt(most)`, again with half as many while memory runs out. Raises UserError where not even one fits."""
        while True:
            try:
                return attempt(self.most)
            except RuntimeError as error:
                if not should_reduce_batch_size(error):
                    raise
            gc.collect()  # outside the except block, whose traceback holds the tensors that filled the memory
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            if self.most == 1:
                raise UserError(f"the memory does not hold one prompt beside the model; {self.advice}")
            self.most //= 2
