"""The forking sweep: the logits of a prompt with each head replaced, for the price of a few forward passes.

Input: a loaded model, the token ids of a prompt and of the answer that follows it, and replacements of the heads'
outputs. Output: the logits that predict the answer's tokens.

A head replaced at some tokens changes nothing before the first of them and nothing in the layers below. So the prompt
is run once, keeping what enters each layer and the keys and values of its attention. Then the tokens from the first
patched one on go through the model's own, unmodified forward pass again as a batch that grows: at the entry of layer l,
one copy of these tokens joins for each patched head of that layer, that head's output is replaced before the output
projection, and all rows attend to the one kept prefix and to their own tokens. T tokens, of which the last k are run
again (k = 1: patched at the last one, for the answer's first token), cost 1 + k * n_heads * (n_layers + 1) / (2 T)
forward passes of arithmetic. Nothing is approximated. A model that this cannot follow is run once more for each head.
"""

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from soteria.errors import UserError
from soteria.models.batches import logits_off, most_rounding
from soteria.models.loading import LoadedModel

# The attention implementations whose arithmetic `_attend` repeats, and the names of their stand-ins during a sweep.
FOLLOWED = {"sdpa": "soteria_sdpa", "eager": "soteria_eager"}
_ATTEND: ContextVar[Callable] = ContextVar("the attention function of the current sweep")
for _name, _stand_in in FOLLOWED.items():
    AttentionInterface.register(_stand_in, lambda *given, **terms: _ATTEND.get()(*given, **terms))
    AttentionMaskInterface.register(_stand_in, ALL_MASK_ATTENTION_FUNCTIONS[_name])
# Arguments of an attention function that change its scores in a way that `_attend` does not repeat.
UNKNOWN_TERMS = ("position_bias", "head_mask")
TRIED_TOKENS = 24  # of the text on which the sweep is tried with a model
# Keys and values (n_kv_heads, length, head_dim) that all rows share, and the mask of a row's own tokens over them and
# over themselves, (own, length + own); None: all is allowed.
Prefix = tuple[Tensor, Tensor, Tensor | None]

_log = logging.getLogger(__name__)


@dataclass
class CleanRun:
    """What is kept of one unpatched forward pass. The lists have an entry for each layer."""

    ids: Tensor  # (T,)
    logits: Tensor | None = None  # (kept, vocabulary) at the last tokens
    hidden: list[Tensor] = field(default_factory=list)  # (T, width), at the layer's entry
    keys: list[Tensor] = field(default_factory=list)  # (n_kv_heads, T, head_dim), after the rotation, if any
    values: list[Tensor] = field(default_factory=list)
    allowed: list[Tensor | None] = field(default_factory=list)  # (T, T): may a row attend to a column; None: causal

    def prefix(self, layer: int, start: int) -> Prefix:
        """What the tokens from `start` on may see of a layer."""
        keys, values, allowed = self.keys[layer], self.values[layer], self.allowed[layer]
        own, left = len(self.ids) - start, 0
        if allowed is not None:
            seen = allowed[start:, :start].any(dim=0).nonzero()
            left = int(seen[0]) if len(seen) else start
            mask = None if own == 1 and allowed[start:, left:].all() else allowed[start:, left:]
        elif own == 1:
            mask = None
        else:
            mask = torch.ones(own, start + own, dtype=torch.bool, device=keys.device).tril(diagonal=start)
        return keys[:, left:start], values[:, left:start], mask


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix: Prefix,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of each row's own tokens to the shared prefix and, causally, to each other.

    query (rows, n_heads, n, head_dim), key and value (rows, n_kv_heads, n, head_dim) -> (rows, n, n_heads, head_dim).
    `sinks` (n_heads,) are scores of a token without a value (gpt-oss).
    """
    prefix_keys, prefix_values, mask = prefix
    rows, n_heads, n, width = query.shape
    n_kv, length = prefix_keys.shape[:2]
    if softcap is None and sinks is None and n > length:  # hardly anything is shared: the fused kernel is faster
        keys = torch.cat([prefix_keys.expand(rows, -1, -1, -1), key], dim=2)
        values = torch.cat([prefix_values.expand(rows, -1, -1, -1), value], dim=2)
        fused = F.scaled_dot_product_attention(
            query, keys, values, attn_mask=mask, scale=scaling, enable_gqa=n_kv < n_heads
        )
        return fused.transpose(1, 2)
    # All rows' queries of one KV head meet its prefix in one matrix product; no key or value is copied for a row.
    group = n_heads // n_kv * n
    grouped = (query * scaling).reshape(rows, n_kv, group, width).transpose(0, 1)
    key, value = key.transpose(0, 1), value.transpose(0, 1)  # all (n_kv, rows, …, head_dim)
    # The scores of the prefix and of own tokens are side by side in one buffer, written once and read in place.
    scores = query.new_empty(n_kv, rows, group, length + n)
    flat = scores.view(n_kv, rows * group, length + n)
    torch.bmm(grouped.reshape(n_kv, rows * group, width), prefix_keys.mT, out=flat[..., :length])
    scores[..., length:] = (grouped * key).sum(-1, keepdim=True) if n == 1 else grouped @ key.mT
    if softcap is not None:
        scores = scores.div_(softcap).tanh_().mul_(softcap)
    if mask is not None:
        scores.view(n_kv, rows, n_heads // n_kv, n, length + n).masked_fill_(~mask, -torch.inf)
    if sinks is not None:
        beside = sinks.view(n_kv, 1, -1, 1).expand(-1, rows, -1, n).reshape(n_kv, rows, group, 1)
        scores = torch.cat([scores, beside.to(scores)], dim=-1)
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)[..., : length + n]
    on_own = weights[..., length:]
    out = on_own * value if n == 1 else on_own @ value
    shared = out.view(n_kv, rows * group, value.shape[-1])
    shared.baddbmm_(weights.reshape(n_kv, rows * group, length + n)[..., :length], prefix_values)
    return out.view(n_kv, rows, n_heads // n_kv, n, -1).permute(1, 3, 0, 2, 4).flatten(2, 3)


class ForkingSweep:
    """The sweep over one loaded model. Raises UserError, naming the architecture, for one that it cannot follow."""

    def __init__(self, loaded: LoadedModel):
        self.loaded = loaded
        self.config = loaded.model.config.get_text_config()
        self.implementation = self.config._attn_implementation
        if self.implementation not in FOLLOWED:
            raise self._refusal(f"its attention is computed by {self.implementation!r}, not {' or '.join(FOLLOWED)}")
        if loaded.geometry.n_rows < loaded.geometry.n_layers:
            raise self._refusal("it has layers without attention heads")
        self.layers = [loaded.model.get_submodule(name) for name in loaded.geometry.layer_names]

    def clean_run(self, ids: Tensor, kept: int = 1) -> CleanRun:
        """Run ids (T,), keeping what a sweep needs and the logits at the last `kept` tokens."""
        run = CleanRun(ids)

        def enter(_layer: int, hidden: Tensor) -> Tensor:
            run.hidden.append(hidden[0])
            return hidden

        def attend(_layer, module, query, key, value, mask, **terms):
            unknown = [name for name in UNKNOWN_TERMS if terms.get(name) is not None]
            if unknown:
                raise self._refusal(f"its attention has terms that the sweep does not know ({', '.join(unknown)})")
            run.keys.append(key[0])
            run.values.append(value[0])
            allowed = None if mask is None else mask[0, 0, : len(ids), : len(ids)]
            if allowed is not None and allowed.dtype != torch.bool:
                allowed = allowed > torch.finfo(allowed.dtype).min / 2
            run.allowed.append(allowed)
            eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
            original = ALL_ATTENTION_FUNCTIONS.get_interface(self.implementation, eager)
            return original(module, query, key, value, mask, **terms)

        with self._followed(enter, attend):
            run.logits = self.loaded.model(input_ids=ids[None], use_cache=False, logits_to_keep=kept).logits[0, -kept:]
        n_seen, n_layers = len(run.keys), len(self.layers)
        if not len(run.hidden) == n_seen == n_layers:
            raise self._refusal(f"{n_seen} of its {n_layers} layers attend through transformers' interface")
        return run

    def logits(
        self, run: CleanRun, places: Sequence[int], replacements: Tensor, targets: Sequence[tuple[int, int]]
    ) -> Tensor:
        """Logits at the run's last tokens, (len(targets), kept, vocabulary), each with one head replaced at `places`.

        `targets` are (row, head), sorted. `replacements`: (n_rows, n_heads, len(places), head_dim).
        """
        start, kept, geometry = min(places), len(run.logits), self.loaded.geometry
        own = torch.tensor([place - start for place in places], device=run.ids.device)
        heads_of: dict[int, list[int]] = {}
        for layer, head in targets:
            heads_of.setdefault(layer, []).append(head)
        bottom = min(heads_of)

        def enter(layer: int, hidden: Tensor) -> Tensor:
            if layer < bottom:  # nothing is patched yet: one row, whose values nobody reads, keeps the pass going
                return hidden
            forks = run.hidden[layer][start:].expand(len(heads_of.get(layer, ())), -1, -1)
            return forks if layer == bottom else torch.cat([hidden, forks.to(hidden.device)])

        def attend(layer, _module, query, key, value, _mask, *, scaling=None, softcap=None, s_aux=None, **_):
            if layer < bottom:
                return value.new_zeros(1, query.shape[2], query.shape[1], value.shape[-1]), None
            scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
            return _attend(query, key, value, run.prefix(layer, start), scaling, softcap, s_aux), None

        def replace(layer: int, heads: Tensor) -> Tensor | None:
            if layer not in heads_of:
                return None
            at = torch.tensor(heads_of[layer], device=heads.device)
            split = geometry.split(layer, heads).clone()
            rows = torch.arange(len(split) - len(at), len(split), device=heads.device)
            patched = replacements[layer][at.cpu(), :, : split.shape[-1]].to(split)
            split[rows[:, None], own.to(heads.device), at[:, None]] = patched
            return split.flatten(-2)

        with self._followed(enter, attend), head_outputs(self.loaded, replace):
            positions = torch.arange(start, len(run.ids), device=run.ids.device)
            return self.loaded.model(
                input_ids=run.ids[None, start:], position_ids=positions[None], use_cache=False, logits_to_keep=kept
            ).logits[:, -kept:]

    def cost(self, length: int, start: int) -> float:
        """The forward passes that a head patched from token `start` of `length` on costs, averaged over layers."""
        n_layers = self.loaded.geometry.n_rows
        return self.tokens(length, start) / length * (n_layers + 1) / (2 * n_layers)

    def tokens(self, length: int, start: int) -> int:
        """The tokens that are run again for such a head."""
        return length - start

    def _refusal(self, reason: str) -> UserError:
        return UserError(f"the sweep cannot follow {type(self.loaded.model).__name__}: {reason}")

    @contextmanager
    def _followed(self, enter: Callable, attend: Callable) -> Iterator[None]:
        """The model with `enter(layer, hidden)` before each layer and `attend(layer, module, q, k, v, …)` in it."""
        current = -1

        def hook_for(index: int):
            def hook(_module, inputs, keywords):
                nonlocal current
                current = index
                if inputs:
                    return (enter(index, inputs[0]), *inputs[1:]), keywords
                return inputs, keywords | {"hidden_states": enter(index, keywords["hidden_states"])}

            return hook

        with ExitStack() as stack:
            stack.callback(_ATTEND.reset, _ATTEND.set(lambda *given, **terms: attend(current, *given, **terms)))
            stack.callback(setattr, self.config, "_attn_implementation", self.implementation)
            self.config._attn_implementation = FOLLOWED[self.implementation]
            for index, layer in enumerate(self.layers):
                stack.callback(layer.register_forward_pre_hook(hook_for(index), with_kwargs=True).remove)
            yield


class FullPasses:
    """What ForkingSweep does, by one full forward pass a head, many in a batch: for a model that it cannot follow."""

    def __init__(self, loaded: LoadedModel):
        self.loaded = loaded

    def clean_run(self, ids: Tensor, kept: int = 1) -> CleanRun:
        return CleanRun(ids, self._last_logits(ids[None], kept)[0])

    def logits(
        self, run: CleanRun, places: Sequence[int], replacements: Tensor, targets: Sequence[tuple[int, int]]
    ) -> Tensor:
        geometry, at = self.loaded.geometry, torch.tensor(places)

        def replace(layer: int, heads: Tensor) -> Tensor | None:
            rows = [row for row, (own, _) in enumerate(targets) if own == layer]
            if not rows:
                return None
            own = torch.tensor([targets[row][1] for row in rows])
            split = geometry.split(layer, heads).clone()
            patched = replacements[layer][own, :, : split.shape[-1]].to(split)
            split[torch.tensor(rows)[:, None], at, own[:, None]] = patched
            return split.flatten(-2)

        with head_outputs(self.loaded, replace):
            return self._last_logits(run.ids.expand(len(targets), -1), len(run.logits))

    def _last_logits(self, ids: Tensor, kept: int) -> Tensor:
        return self.loaded.model(input_ids=ids, use_cache=False, logits_to_keep=kept).logits[:, -kept:]

    def cost(self, length: int, start: int) -> float:
        return 1.0

    def tokens(self, length: int, start: int) -> int:
        return length


Sweep = ForkingSweep | FullPasses


@torch.inference_mode()
def sweep_over(loaded: LoadedModel) -> Sweep:
    """The forking sweep, if on a short text it does with the model what full passes do; else those, with a warning."""
    full, geometry, last = FullPasses(loaded), loaded.geometry, TRIED_TOKENS - 1
    ids = torch.arange(7, 7 + TRIED_TOKENS, device=loaded.model.device) % loaded.vocabulary
    targets = [(row, row % count) for row, count in enumerate(geometry.heads)]
    ways: list[Sweep] = [full]

    def logits(sweep: Sweep, start: int) -> Tensor:
        places = range(start, TRIED_TOKENS)
        none = torch.zeros(geometry.n_rows, geometry.n_heads, len(places), geometry.head_dim)
        return sweep.logits(sweep.clean_run(ids), places, none, targets)

    try:
        ways.append(ForkingSweep(loaded))
        slow, fast = ([logits(way, start) for start in (last, last // 2)] for way in ways)
        off = max(logits_off(f, s) for f, s in zip(fast, slow, strict=True))
        if off <= most_rounding(loaded.model.dtype):
            return ways[1]
        reason = f"its logits come out otherwise (by {off:.1g} standard deviations)"
    except UserError as error:
        reason = str(error).partition(": ")[2]
    except Exception as error:  # whatever a model's own code makes of inputs that it does not expect
        if should_reduce_batch_size(error):
            raise
        reason = f"it ends in a {type(error).__name__} there"
    _log.warning(
        "%s is scored by one full forward pass a head, %d a prompt, because the sweep cannot follow it: %s",
        *(type(loaded.model).__name__, len(geometry.places), reason),
    )
    return full


@contextmanager
def head_outputs(loaded: LoadedModel, see: Callable[[int, Tensor], Tensor | None]) -> Iterator[None]:
    """Call `see(row, heads)` with the heads' outputs (B, T, heads * head_dim) before each output projection.

    A tensor that it returns takes their place. The hooks are removed when the block ends.
    """

    def hook_for(layer: int):
        def hook(_module, inputs):
            replacement = see(layer, inputs[0])
            return None if replacement is None else (replacement, *inputs[1:])

        return hook

    with ExitStack() as stack:
        for layer, projection in enumerate(loaded.projections):
            stack.callback(projection.register_forward_pre_hook(hook_for(layer)).remove)
        yield
