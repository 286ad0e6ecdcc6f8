"""The indirect effect of every attention head (step 1; paper, section on functional heads; Todd et al., 2024).

Input: tokenized prompts and a model. Output: mean head activations, and per prompt and head the effect

    P(y | prompt, the head's output replaced by its mean) - P(y | prompt),

y being the first token of the query's answer, or the whole answer: then P(y) is the product of its tokens'
probabilities, each after the tokens before it, and the head is replaced at tokens of the prompt only. The prompt has
shuffled labels; the mean is over prompts of the same form with the right labels. A head whose replacement raises P(y)
carries the task.
"""

import logging
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor

from soteria.errors import UserError
from soteria.models.loading import LoadedModel
from soteria.models.memory import MOST_TOKENS, TokenBudget
from soteria.scoring.prompts import FIRST, MeanSlots, Prompt, answer_tokens, token_roles
from soteria.scoring.sweep import Sweep, head_outputs

# What a patched pass shows: patched logits (…, k, vocabulary) and the clean ones (k, vocabulary) -> (…,).
Reading = Callable[[Tensor, Tensor], Tensor]
# What is scored if only the last token is patched.
LAST_TOKEN_CLASSES = ("query_predictive",)
CLOSE = 1e-5  # how close an effect must be to that by a full forward pass, in float32 or more
# The most that an effect may be rounded in float32, where a check in float64 shows that it is rounding.
MOST_ROUNDING = 2e-4
DOUBLE_TOKENS = 512  # in one pass of that check

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenizedPrompt:
    """Token ids (T,), the mean slot and the class of each token, and the ids of the answer's scored tokens (k,)."""

    ids: Tensor
    slots: list[int]
    classes: list[str]
    answer: Tensor

    @property
    def sequence(self) -> Tensor:
        """The ids that predict the answer, (T + k - 1,): the prompt's, and the answer's but for the last."""
        return torch.cat([self.ids, self.answer[:-1]])


def tokenize(prompt: Prompt, loaded: LoadedModel, slots: MeanSlots, scored: str = FIRST) -> TokenizedPrompt:
    """Tokenize a prompt and its answer, of which the `first` token or the `whole` is scored.

    Raises UserError if they are longer than the model's context or the tokenizer adds to the prompt's end.
    """
    ids, most = loaded.encode(prompt.text), loaded.context_length

    def check_length(length: int) -> None:
        if most and length > most:
            fix = "use fewer --n_shots, or shorter texts"
            raise UserError(f"a prompt has {length} tokens, but {loaded.name!r} takes {most}; {fix}")

    check_length(len(ids))  # first: a role takes as long to find as the prompt to encode
    roles = token_roles(prompt, loaded.tokenizer)
    own = loaded.tokenizer.convert_tokens_to_ids(loaded.tokenizer.tokenize(prompt.text))
    if len(roles) != len(ids) or ids[-len(own) :] != own:
        raise UserError(f"the tokenizer of {loaded.name!r} adds tokens after the prompt; its model cannot be scored")
    answer = answer_tokens(prompt, loaded.tokenizer, scored)
    check_length(len(ids) + len(answer) - 1)
    return TokenizedPrompt(
        torch.tensor(ids, device=loaded.model.device),
        [slots.of(role) for role in roles],
        [role.token_class for role in roles],
        torch.tensor(answer, device=loaded.model.device),
    )


def batches(prompts: Sequence[TokenizedPrompt], max_rows: int) -> list[list[TokenizedPrompt]]:
    """Prompts of equal length, at most `max_rows` tokens but at least one prompt in a batch, shortest first.

    Prompts of unequal length would need padding; its mask selects an attention kernel that rounds differently.
    """
    cut: list[list[TokenizedPrompt]] = []
    for prompt in sorted(prompts, key=lambda prompt: len(prompt.ids)):
        length = len(prompt.ids)
        if cut and len(cut[-1][0].ids) == length and length * (len(cut[-1]) + 1) <= max_rows:
            cut[-1].append(prompt)
        else:
            cut.append([prompt])
    return cut


@torch.inference_mode()
def head_activations(loaded: LoadedModel, prompts: Sequence[TokenizedPrompt], n_slots: int) -> Tensor:
    """The sum over prompts of every head's output, (n_rows, n_heads, n_slots, head_dim), float32 on the CPU.

    A row is a layer that has heads; fewer or narrower ones than the most are filled up with zeros. Tokens that share a
    slot are averaged. The prompts are one batch: all have the same length.
    """
    geometry = loaded.geometry
    # Each token's share in its slot: one matrix product per prompt turns tokens into slots.
    shares = torch.zeros(len(prompts), n_slots, len(prompts[0].ids))
    for row, prompt in enumerate(prompts):
        slots = torch.tensor(prompt.slots)
        shares[row, slots, torch.arange(len(slots))] = 1 / torch.bincount(slots, minlength=n_slots)[slots].float()
    total = torch.zeros(geometry.n_rows, geometry.n_heads, n_slots, geometry.head_dim)

    def collect(row: int, heads: Tensor) -> None:
        found = geometry.split(row, (shares.to(heads.device) @ heads.float()).sum(dim=0)).transpose(0, 1)
        total[row, : found.shape[0], :, : found.shape[-1]] = found.cpu()

    with head_outputs(loaded, collect):
        loaded.model(input_ids=torch.stack([prompt.ids for prompt in prompts]), use_cache=False, logits_to_keep=1)
    return total


def mean_head_activations(
    loaded: LoadedModel,
    prompts: Sequence[TokenizedPrompt],
    n_slots: int,
    rows: TokenBudget | None = None,
    share: Callable[..., Iterable[Tensor]] = map,
) -> Tensor:
    """The mean of `head_activations` over prompts. `share` maps a function over batches in order, like `map`."""
    rows = rows or TokenBudget(MOST_TOKENS)

    def activations_of(batch: list[TokenizedPrompt]) -> Tensor:
        return rows.fit(lambda most: sum(head_activations(loaded, part, n_slots) for part in batches(batch, most)))

    return sum(share(activations_of, batches(prompts, rows.most))) / len(prompts)


def answer_probability(logits: Tensor, answer: Tensor) -> Tensor:
    """P(answer) (…,) for the logits (…, k, vocabulary) that predict its tokens (k,), with the softmax in float32."""
    answer = answer.to(logits.device)  # a model that is spread over devices ends on another one than it begins
    return logits.float().softmax(dim=-1)[..., torch.arange(len(answer), device=answer.device), answer].prod(dim=-1)


def probability_change(answer: Tensor) -> Reading:
    """The indirect effect: how far P(answer) moves."""
    return lambda patched, clean: answer_probability(patched, answer) - answer_probability(clean, answer)


def forward_passes(prompt: TokenizedPrompt, classes: Sequence[str], sweep: Sweep) -> float:
    """The cost of a prompt in forward passes of its sequence: its own, and every head's in every class."""
    geometry, length = sweep.loaded.geometry, len(prompt.sequence)
    each = sum(sweep.cost(length, prompt.classes.index(name)) for name in classes if name in prompt.classes)
    return 1 + len(geometry.places) * each


@torch.inference_mode()
def indirect_effects(
    sweep: Sweep,
    prompt: TokenizedPrompt,
    means: Tensor,
    classes: Sequence[str] = LAST_TOKEN_CLASSES,
    max_rows: int = MOST_TOKENS,
    reading: Reading | None = None,
) -> Tensor:
    """Indirect effects, or another `reading`, of all heads by token class, (n_rows, n_heads, len(classes)), float32.

    NaN where a row has fewer heads than the most. All tokens of a class are replaced at once; a class without tokens in
    the prompt has effect 0. `means` is (n_rows, n_heads, n_slots, head_dim). A forward pass has at most `max_rows`
    tokens, but always a patched prompt.
    """
    geometry, reading = sweep.loaded.geometry, reading or probability_change(prompt.answer)
    targets = geometry.places
    places = {name: [t for t, own in enumerate(prompt.classes) if own == name] for name in classes}
    effects = torch.zeros(len(targets), len(classes))
    run = sweep.clean_run(prompt.sequence, len(prompt.answer))
    for column, at in enumerate(places.values()):
        if not at:
            continue
        replacements = means[:, :, [prompt.slots[place] for place in at]]
        size = max(1, max_rows // sweep.tokens(len(run.ids), at[0]))
        for start in range(0, len(targets), size):
            logits = sweep.logits(run, at, replacements, targets[start : start + size])
            effects[start : start + size, column] = reading(logits, run.logits).cpu()
    every = torch.full((geometry.n_rows, geometry.n_heads, len(classes)), torch.nan)
    rows, heads = zip(*targets, strict=True)
    every[list(rows), list(heads)] = effects
    return every


@torch.inference_mode()
def effect_by_full_forward(
    loaded: LoadedModel,
    prompt: TokenizedPrompt,
    means: Tensor,
    row: int,
    head: int,
    token_class: str,
    reading: Reading | None = None,
) -> float:
    """One head's indirect effect by two ordinary forward passes: slow, to check the sweep against."""
    reading = reading or probability_change(prompt.answer)
    at, kept = [t for t, own in enumerate(prompt.classes) if own == token_class], len(prompt.answer)
    own = means[row, head, [prompt.slots[place] for place in at], : loaded.geometry.head_dims[row]]

    def replace(here: int, heads: Tensor) -> Tensor | None:
        if here != row:
            return None
        heads = heads.clone()
        heads[0, at, loaded.geometry.head_slice(row, head)] = own.to(heads)
        return heads

    def logits() -> Tensor:
        return loaded.model(input_ids=prompt.sequence[None], use_cache=False, logits_to_keep=kept).logits[0, -kept:]

    clean = logits()
    with head_outputs(loaded, replace):
        return reading(logits(), clean).item()


def check_sweep(
    sweep: Sweep,
    prompt: TokenizedPrompt,
    means: Tensor,
    effects: Tensor,
    classes: Sequence[str],
    reading: Reading | None = None,
    slack: float = 1,
) -> None:
    """Check a prompt's effects against full forward passes for two random heads, so that no wrong score is written.

    Raises UserError if they differ by more than the rounding of the model's dtype, times `slack`. Some models round
    more than most (Gemma 3 270M by 4e-5): a float32 model that misses this is checked once more in float64, where
    rounding is nothing, and may then differ from float64 by MOST_ROUNDING.
    """
    loaded, draw = sweep.loaded, random.Random(len(prompt.ids))  # not the generator of the sampling protocol
    present = [name for name in classes if name in prompt.classes]
    heads = [(*draw.choice(loaded.geometry.places), draw.choice(present)) for _ in range(2)]

    def difference(effects: Tensor, means: Tensor, tolerance: float) -> str:
        """How the two ways differ, if they do."""
        for row, head, name in heads:
            slow = effect_by_full_forward(loaded, prompt, means, row, head, name, reading)
            fast = effects[row, head, classes.index(name)].item()
            if not abs(fast - slow) <= tolerance * max(1, abs(slow)):  # true for NaN too
                full = f"{slow:.3g} by a full forward pass"
                where = f"head {head} of layer {loaded.geometry.layers[row]}"
                return f"{where} has effect {full}, but {fast:.3g} by the sweep"
        return ""

    found = difference(effects, means, slack * max(CLOSE, 4 * torch.finfo(loaded.model.dtype).eps))
    if found and loaded.model.dtype == torch.float32 and not hasattr(loaded.model, "hf_device_map"):
        loaded.model.double()
        try:
            exact = indirect_effects(sweep, prompt, means.double(), classes, DOUBLE_TOKENS, reading)
            in_double = difference(exact, means.double(), slack * CLOSE)  # norms and softmaxes stay in float32
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
            exact, in_double = effects, "the memory does not hold it in float64"
        finally:
            loaded.model.float()
        rows, own = map(list, zip(*loaded.geometry.places, strict=True))
        rounding = (effects - exact)[rows, own].abs().nan_to_num(torch.inf).max().item()
        if not in_double and rounding <= slack * MOST_ROUNDING:
            _log.warning("%s rounds effects by up to %.1g in float32 (checked in float64)", loaded.name, rounding)
            found = ""
    if found:
        raise UserError(f"{type(loaded.model).__name__} cannot be scored: {found}; please report the architecture")
