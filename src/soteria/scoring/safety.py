"""Heads ranked by safety, a rival of the indirect effect (after the safety heads of Zhou et al., ICLR 2025).

Input: question prompts, disallowed and harmless, and a model. Output: per disallowed question and head

    KL(P(first answer token | question) || the same with the head's output at the last token replaced by its mean),

in nats, the mean being over the harmless questions. A head whose replacement moves the answer most carries most of what
the model does with a disallowed question. The sweep, its check and resuming are step 1's.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from soteria.errors import UserError
from soteria.models.loading import LoadedModel
from soteria.models.tensors import UNQUANTIZED, load_tensor
from soteria.scoring.heads import by_layer
from soteria.scoring.indirect_effect import LAST_TOKEN_CLASSES, TokenizedPrompt
from soteria.scoring.notes import scored_with
from soteria.scoring.run import DatasetRun, ScoringSettings
from soteria.storage import paths


def divergence(patched: Tensor, clean: Tensor) -> Tensor:
    """KL(clean || patched) (…,) in nats, float32, of logits (…, 1, vocabulary)."""
    clean, patched = clean.float().log_softmax(-1), patched.float().log_softmax(-1)
    return (clean.exp() * (clean - patched)).sum(-1).squeeze(-1)


def question_tokens(ids: list[int], loaded: LoadedModel) -> TokenizedPrompt:
    """A question's prompt for the sweep: its last token has a mean slot of its own, the others share one."""
    tokens, before = torch.tensor(ids, device=loaded.model.device), len(ids) - 1
    classes = ["question"] * before + list(LAST_TOKEN_CLASSES)
    return TokenizedPrompt(tokens, [0] * before + [1], classes, tokens[-1:])  # one answer token, which nothing reads


class SafetyRun(DatasetRun):
    """The safety scores of a language under `root`: (questions, n_layers, n_heads), float32, with means and settings.

    `asked`: what they depend on beside the model and its dtype. `inputs` gives the token ids of the harmless and of
    the disallowed questions.
    """

    reading = staticmethod(divergence)
    slack = 10  # it sums what all logits are off by

    def __init__(
        self, language: str, root: Path, settings: ScoringSettings, asked: object, inputs: Callable[[LoadedModel], list]
    ):
        self._lies_in(paths.safety_path(root, language))
        self.settings, self._inputs, self.n_trials = settings, inputs, None
        self.described = {
            "dataset_name": self.folder.name,
            "model_name": settings.model_name,
            "dtype": settings.dtype,
            "asked_sha256": hashlib.sha256(json.dumps(asked).encode()).hexdigest(),
        }

    def _tokenized_prompts(self, loaded: LoadedModel) -> tuple[list, list, int, dict]:
        harmless, harmful = ([question_tokens(ids, loaded) for ids in each] for each in self._inputs(loaded))
        return harmless, harmful, 2, {"n_harmless": len(harmless), "n_harmful": len(harmful)}


def mean_divergence(root: Path, language: str) -> Tensor:
    """The divergence of each head, averaged over the questions: (n_layers, n_heads), float64, NaN where none is."""
    path = paths.safety_path(root, language)
    found = load_tensor(path)
    if found.ndim != 3 or not found.numel() or found.dtype not in UNQUANTIZED:
        raise UserError(f"{path} does not hold scores (questions, layers, heads); delete it and run again")
    return by_layer(found, scored_with(root, path.parent.name), path)
