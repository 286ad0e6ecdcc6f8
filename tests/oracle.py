"""Step 1 the slow and obvious way: one full forward pass per (layer, head) or (layer, head, class).

Written from the definition and in the manner of the original release (Todd et al., 2024), sharing no code with
`soteria.scoring`: the prompt is built from strings, its tokens are labelled by growing it piece by piece, and a token's
mean is found by counting along the prompt whose every word is `a`.
"""

import json
import random
import re
from pathlib import Path

import numpy as np
import torch
from sklearn.model_selection import train_test_split

CLASS_PATTERNS = (
    r"demonstration_\d+",
    r"demonstration_\d+_label",
    "separator",
    "predictive",
    "structural",
    "end_of_example",
    "query_demonstration",
    "query_structural",
    "query_separator",
    "query_predictive",
)


def draw(data_file: Path, *, seed: int, n_shots: int, n_trials: int, test_split: float):
    """The prompts of a seed: (examples, query) for the means, then those with shuffled labels to be scored."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    rows = [(row["input"], row["output"]) for row in json.loads(data_file.read_text(encoding="utf-8"))]
    train, rest = train_test_split(rows, test_size=test_split, random_state=seed)
    _, valid = train_test_split(rest, test_size=test_split, random_state=seed)
    clean, shuffled = [], []
    for _ in range(n_trials):
        examples = [train[i] for i in np.random.choice(len(train), n_shots, replace=False)]
        clean.append((examples, valid[np.random.choice(np.arange(len(valid)), 1, replace=False)[0]]))
    for _ in range(n_trials):
        examples = [train[i] for i in np.random.choice(len(train), n_shots, replace=False)]
        query = valid[np.random.choice(np.arange(len(valid)), 1, replace=False)[0]]
        labels = np.random.permutation([output for _, output in examples])
        shuffled.append(([(x, str(y)) for (x, _), y in zip(examples, labels, strict=True)], query))
    return clean, shuffled


def label_tokens(examples, query, tokenizer) -> tuple[str, list[str]]:
    """A prompt's text and the label of each of its tokens."""
    adds_bos = len(tokenizer("").input_ids) > 0
    pieces = [] if adds_bos else [("<|endoftext|>", "bos")]
    for i, (x, y) in enumerate(examples, start=1):
        pieces += [("Q:", "structural"), (f" {x}", f"demonstration_{i}"), ("\n", "separator")]
        pieces += [("A:", "structural>predictive"), (f" {y}", f"demonstration_{i}_label")]
        pieces += [("\n\n", "end_of_example<separator")]
    pieces += [("Q:", "query_structural"), (f" {query[0]}", "query_demonstration"), ("\n", "query_separator")]
    pieces += [("A:", "query_structural>query_predictive")]
    labels = ["bos"] if adds_bos else []
    text = ""
    for piece, label in pieces:
        n_before = len(tokenizer.tokenize(text))
        text += piece
        n = len(tokenizer.tokenize(text)) - n_before
        if ">" in label:
            first, last = label.split(">")
            labels += [first] * (n - 1) + [last]
        elif "<" in label:
            first, rest = label.split("<")
            labels += [first] + [rest] * (n - 1)
        else:
            labels += [label] * n
    assert len(labels) == len(tokenizer(text).input_ids)
    return text, labels


def mean_slots(labels: list[str], n_slots: int) -> list[int]:
    """The slot of each token: they count up by one a token, but the tokens of one word share theirs."""
    slots, slot = [], -1
    for i, label in enumerate(labels):
        if i == 0 or label != labels[i - 1] or "demonstration" not in label:
            slot += 1
        slots.append(slot)
    assert slot + 1 == n_slots, "a prompt of another form than the one whose every word is `a`"
    return slots


def score(
    loaded, data_file: Path, *, seed=42, n_shots=10, n_trials=25, test_split=0.3, last_token_only=True, answer="first"
):
    """Effects (n_trials, n_layers, n_heads[, 10]) and mean head activations (n_layers, n_heads, n_slots, head_dim)."""
    model, tokenizer = loaded.model, loaded.tokenizer
    config = model.config
    n_layers, n_heads = config.num_hidden_layers, config.num_attention_heads
    modules = [
        module
        for name, module in model.named_modules()
        if re.search(r"\.\d+\.(self_attn\.o_proj|attn\.c_proj|attention\.dense)$", name)
    ]
    assert len(modules) == n_layers
    clean, shuffled = draw(data_file, seed=seed, n_shots=n_shots, n_trials=n_trials, test_split=test_split)
    n_slots = len(label_tokens([("a", "a")] * n_shots, ("a", "a"), tokenizer)[1])

    # Means: every head's output at every token, tokens of a word averaged, then prompts averaged.
    per_prompt = []
    for examples, query in clean:
        text, labels = label_tokens(examples, query, tokenizer)
        seen = []
        handles = [m.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0][0])) for m in modules]
        with torch.no_grad():
            model(torch.tensor([tokenizer(text).input_ids]), use_cache=False)
        for handle in handles:
            handle.remove()
        heads = torch.stack(seen)  # (n_layers, T, n_heads * head_dim)
        heads = heads.view(n_layers, heads.shape[1], n_heads, -1)
        slots = mean_slots(labels, n_slots)
        words = [[t for t, own in enumerate(slots) if own == slot] for slot in range(n_slots)]
        per_prompt.append(torch.stack([heads[:, tokens].mean(dim=1) for tokens in words], dim=2))
    means = torch.stack(per_prompt).mean(dim=0)  # (n_layers, n_heads, n_slots, head_dim)
    head_dim = means.shape[-1]

    def probability(ids, answer, layer=None, head=None, tokens=(), slots=()):
        def overwrite(_, args):
            heads = args[0].clone()
            for t in tokens:
                heads[0, t, head * head_dim : (head + 1) * head_dim] = means[layer, head, slots[t]]
            return (heads,)

        handle = modules[layer].register_forward_pre_hook(overwrite) if layer is not None else None
        with torch.no_grad():
            logits = model(torch.tensor([ids + answer]), use_cache=False).logits[0]
        if handle:
            handle.remove()
        found = 1.0
        for place, token in enumerate(answer, start=len(ids) - 1):
            found *= logits[place].float().softmax(dim=-1)[token].item()
        return found

    effects = []
    for examples, query in shuffled:
        text, labels = label_tokens(examples, query, tokenizer)
        ids = tokenizer(text).input_ids
        target = tokenizer(f"{text} {query[1]}").input_ids[len(ids) :]
        if answer == "first":
            target = target[:1]
        slots = mean_slots(labels, n_slots)
        if last_token_only:
            token_sets = [[len(ids) - 1]]
        else:
            token_sets = [[t for t, label in enumerate(labels) if re.fullmatch(p, label)] for p in CLASS_PATTERNS]
        base = probability(ids, target)
        effects.append(
            [
                [
                    [probability(ids, target, layer, head, tokens, slots) - base for tokens in token_sets]
                    for head in range(n_heads)
                ]
                for layer in range(n_layers)
            ]
        )
    effects = torch.tensor(effects)
    return (effects[..., 0] if last_token_only else effects), means
