"""Step 1: the indirect effect of every attention head (paper, section on functional heads; Todd et al., 2024).

P(y | prompt with the head's output replaced by its mean) - P(y | prompt), where y is the first token of the query's
answer. The prompt has shuffled labels; the mean is over prompts of the same form with right ones. A head whose
replacement raises P(y) carries the task.

Knows models and prompts; knows nothing of languages, ranks or files.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from soteria.errors import UserError
from soteria.icl import TOKEN_CLASSES, MeanSlots, Prompt, answer_token, token_roles
from soteria.models import LoadedModel

# The classes scored when only the last token is patched: the query's predictive token, alone.
LAST_TOKEN_CLASSES = ("query_predictive",)


@dataclass(frozen=True)
class TokenizedPrompt:
    """A prompt as the model sees it: token ids (T,), the mean slot and the class of each token, the answer's id."""

    ids: Tensor
    slots: list[int]
    classes: list[str]
    answer: int


def tokenize(prompt: Prompt, loaded: LoadedModel, slots: MeanSlots) -> TokenizedPrompt:
    """Token ids with their roles. Raises UserError for a prompt longer than the model's context."""
    ids = loaded.tokenizer(prompt.text).input_ids
    roles = token_roles(prompt, loaded.tokenizer)
    own = loaded.tokenizer.convert_tokens_to_ids(loaded.tokenizer.tokenize(prompt.text))
    if len(roles) != len(ids) or ids[-len(own) :] != own:
        raise UserError(f"the tokenizer of {loaded.name!r} adds tokens after the prompt; such a model cannot be scored")
    if loaded.context_length and len(ids) > loaded.context_length:
        raise UserError(
            f"a prompt has {len(ids)} tokens, {loaded.name!r} takes {loaded.context_length}; fewer --n_shots"
        )
    return TokenizedPrompt(
        torch.tensor(ids, device=loaded.model.device),
        [slots.of(role) for role in roles],
        [role.token_class for role in roles],
        answer_token(prompt, loaded.tokenizer),
    )


@contextmanager
def head_outputs(loaded: LoadedModel, see: Callable[[int, Tensor], Tensor | None]) -> Iterator[None]:
    """Call `see(layer, heads)` with the heads' outputs (B, T, n_heads * head_dim) before each output projection.

    What it returns, if anything, goes on in their stead. The hooks are gone when the block ends.
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


@torch.inference_mode()
def mean_head_activations(loaded: LoadedModel, prompts: Sequence[TokenizedPrompt], n_slots: int) -> Tensor:
    """The mean output of every head over prompts, (n_layers, n_heads, n_slots, head_dim), float32 on the CPU.

    The tokens of one word are averaged into its slot first.
    """
    geometry = loaded.geometry
    total = torch.zeros(geometry.n_layers, n_slots, geometry.n_heads * geometry.head_dim)
    for prompt in prompts:
        heads: dict[int, Tensor] = {}
        with head_outputs(loaded, lambda layer, x, heads=heads: heads.update({layer: x[0].float().cpu()})):
            loaded.model(input_ids=prompt.ids[None], use_cache=False)
        slots = torch.tensor(prompt.slots)
        tokens_per_slot = torch.bincount(slots, minlength=n_slots).clamp(min=1)
        for layer, x in heads.items():  # x: (T, n_heads * head_dim)
            total[layer] += torch.zeros(n_slots, x.shape[1]).index_add_(0, slots, x) / tokens_per_slot[:, None]
    mean = (total / len(prompts)).view(geometry.n_layers, n_slots, geometry.n_heads, geometry.head_dim)
    return mean.transpose(1, 2).contiguous()


def _answer_probability(logits: Tensor, answer: int) -> Tensor:
    """P(answer) for each row of logits (B, vocabulary), softmax in float32 whatever the model's dtype."""
    return logits.float().softmax(dim=-1)[:, answer]


@torch.inference_mode()
def last_token_effects(loaded: LoadedModel, prompt: TokenizedPrompt, means: Tensor, max_rows: int = 256) -> Tensor:
    """Indirect effects of all heads at the last token, (n_layers, n_heads), float32.

    A change at the last token changes nothing before it. So the prompt but its last token is run once, and each patched
    head costs one token over that cache: row 0 is the clean run, each other row has one head replaced.
    """
    geometry, device = loaded.geometry, prompt.ids.device
    patches = [(layer, head) for layer in range(geometry.n_layers) for head in range(geometry.n_heads)]
    at_last = means[:, :, prompt.slots[-1]]  # (n_layers, n_heads, head_dim)
    prefix = DynamicCache(config=loaded.model.config)
    if len(prompt.ids) > 1:
        loaded.model(input_ids=prompt.ids[None, :-1], past_key_values=prefix, use_cache=True, logits_to_keep=1)
    probabilities = []
    for start in range(0, len(patches), max_rows):
        chunk = patches[start : start + max_rows]
        rows = [None, *chunk]

        def patch(layer: int, x: Tensor, rows=rows) -> Tensor:
            x = x.clone()
            for row, target in enumerate(rows):
                if target and target[0] == layer:
                    x[row, -1, geometry.head_slice(target[1])] = at_last[target].to(x)
            return x

        cache = copy.deepcopy(prefix)
        if len(prompt.ids) > 1:
            cache.batch_repeat_interleave(len(rows))
        with head_outputs(loaded, patch):
            logits = loaded.model(
                input_ids=prompt.ids[-1].expand(len(rows), 1),
                past_key_values=cache,
                position_ids=torch.full((len(rows), 1), len(prompt.ids) - 1, device=device),
                use_cache=True,
            ).logits[:, -1]
        p = _answer_probability(logits, prompt.answer)
        probabilities.append(p[1:] - p[0])
    return torch.cat(probabilities).cpu().view(geometry.n_layers, geometry.n_heads)


@torch.inference_mode()
def all_class_effects(loaded: LoadedModel, prompt: TokenizedPrompt, means: Tensor, max_rows: int = 16) -> Tensor:
    """Indirect effects of all heads for each token class, (n_layers, n_heads, 10), float32.

    All tokens of a class are replaced at once. Each (head, class) is one row of a full forward pass.
    """
    geometry = loaded.geometry
    places = {name: [t for t, c in enumerate(prompt.classes) if c == name] for name in TOKEN_CLASSES}
    patches = [
        (layer, head, name)
        for layer in range(geometry.n_layers)
        for head in range(geometry.n_heads)
        for name in TOKEN_CLASSES
    ]
    slots = torch.tensor(prompt.slots)
    clean = _answer_probability(loaded.model(input_ids=prompt.ids[None], use_cache=False).logits[:, -1], prompt.answer)
    effects = []
    for start in range(0, len(patches), max_rows):
        chunk = patches[start : start + max_rows]

        def patch(layer: int, x: Tensor, chunk=chunk) -> Tensor:
            x = x.clone()
            for row, (target, head, name) in enumerate(chunk):
                if target == layer:
                    own = geometry.head_slice(head)
                    x[row, places[name], own] = means[layer, head, slots[places[name]]].to(x)
            return x

        with head_outputs(loaded, patch):
            ids = prompt.ids.expand(len(chunk), -1)
            logits = loaded.model(input_ids=ids, use_cache=False).logits[:, -1]
        effects.append(_answer_probability(logits, prompt.answer) - clean)
    return torch.cat(effects).cpu().view(geometry.n_layers, geometry.n_heads, len(TOKEN_CLASSES))
