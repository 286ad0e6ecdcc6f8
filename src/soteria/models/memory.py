"""How many tokens one forward pass may process: estimated from the free memory, halved whenever it runs out."""

import gc
from collections.abc import Callable
from typing import TypeVar

import psutil
import torch
from accelerate.utils.memory import should_reduce_batch_size

from soteria.errors import UserError
from soteria.models.loading import LoadedModel

Result = TypeVar("Result")

MOST_TOKENS = 4096  # more in one pass are no faster
PROMPT_TOKENS = 1024  # length of a prompt, for an estimate of its attention scores


def free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def tokens_that_fit(loaded: LoadedModel) -> int:
    """The largest power of two of tokens, up to MOST_TOKENS, whose activations fill at most half the free memory."""
    config = loaded.model.config.get_text_config().per_layer_config[0]
    width, heads = config.hidden_size, loaded.geometry.n_heads
    feed_forward = getattr(config, "intermediate_size", None) or 4 * width
    values = 10 * width + 3 * feed_forward + 3 * heads * PROMPT_TOKENS + 3 * config.vocab_size
    tokens = free_bytes(loaded.model.device) // 2 // (values * 4)
    return 2 ** max(0, min(tokens, MOST_TOKENS).bit_length() - 1)


class TokenBudget:
    """The most tokens in one forward pass, `most`, which only ever falls. `advice` ends the error when even 1 fails."""

    def __init__(self, most: int, advice: str = "try a smaller --dtype or --n_shots"):
        self.most, self.advice = most, advice

    def fit(self, attempt: Callable[[int], Result]) -> Result:
        """`attempt(most)`, repeated with half as many while memory runs out. Raises UserError if 1 token fails."""
        while True:
            try:
                return attempt(self.most)
            except RuntimeError as error:
                if not should_reduce_batch_size(error):
                    raise
            gc.collect()  # outside the except block, whose traceback keeps the tensors that filled the memory alive
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            if self.most == 1:
                raise UserError(f"the memory does not hold one prompt beside the model; {self.advice}")
            self.most //= 2
