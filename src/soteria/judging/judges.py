"""The judge of a name: `refusal`, `openai:<model>` or `hf:<model>`, and what its verdicts depend on."""

import hashlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from soteria.errors import UserError
from soteria.judging.interface import Judge
from soteria.judging.presets import JudgeSettings
from soteria.judging.refusal import BASIS, RefusalJudge


def judge_basis(name: str, settings: JudgeSettings | None = None, harmful_labels: Sequence[str] = ()) -> str:
    """A hash of the judge's phrases and grammar, or of its settings; verdicts made with others are not reused.

    The weights of a local model count; those of a hub id do not, which a revision pins. Raises UserError for settings
    that the judge does not have.
    """
    settings = settings or JudgeSettings()
    if name == "refusal":
        _refuse(settings, harmful_labels)
        return hashlib.sha256(b"".join(path.read_bytes() for path in BASIS)).hexdigest()
    more, model = ",".join(sorted(harmful_labels)), Path(name.removeprefix("hf:"))
    if name.startswith("hf:") and model.exists():
        found = {path: path.stat() for path in (sorted(model.iterdir()) if model.is_dir() else [model])}
        more += _local_digest(model, *((path.name, it.st_size, it.st_mtime_ns) for path, it in found.items()))
    return hashlib.sha256((settings.basis + more).encode()).hexdigest() if more else settings.basis


@cache
def _local_digest(model: Path, *_state: tuple) -> str:
    """A hash of a model's files. `_state` is theirs: the cells of a grid ask again and again."""
    from soteria.models.checkpoints import Checkpoint, model_digest  # torch takes seconds to import

    return model_digest(Checkpoint.open(str(model), whole=True))


def make_judge(
    name: str,
    settings: JudgeSettings | None = None,
    *,
    concurrency: int = 16,
    time_limit: float | None = None,
    harmful_labels: Sequence[str] = (),
) -> Judge:
    """The judge of a name. Raises UserError if there is none.

    An endpoint gets `concurrency` calls at once, each with `time_limit` seconds for a reply. `harmful_labels` are those
    of a sequence classifier, which takes no settings.
    """
    settings = settings or JudgeSettings()
    kind, _, model = name.partition(":")
    if name == "refusal":
        _refuse(settings, harmful_labels)
        return RefusalJudge()
    if kind == "openai" and model:
        from soteria.judging.endpoint import EndpointJudge
        from soteria.models.endpoint import TIME_LIMIT_S

        return EndpointJudge(model, concurrency, settings, time_limit or TIME_LIMIT_S)
    if kind == "hf" and model:
        from soteria.judging.classifier import ClassifierJudge
        from soteria.judging.local import LocalJudge
        from soteria.models.loading import is_classifier, load_judge

        loaded = load_judge(model)
        if not is_classifier(loaded.model.config):
            if harmful_labels:
                raise UserError(f"{model!r} is not a classifier; leave out --harmful_labels")
            return LocalJudge(loaded, settings)
        if settings != JudgeSettings():
            raise UserError(f"{model!r} is a classifier, which no prompt is put to; leave out the --judge_… options")
        return ClassifierJudge(loaded, harmful_labels)
    raise UserError(f"unknown judge {name!r}; give refusal, openai:<model> or hf:<model>")


def check_judge(name: str, settings: JudgeSettings | None = None, harmful_labels: Sequence[str] = ()) -> None:
    """Raise UserError for a judge that could not be made; of a local model only the config is read."""
    kind, _, model = name.partition(":")
    if kind == "hf" and model:
        from soteria.models.loading import load_config

        load_config(model)
    else:
        make_judge(name, settings, harmful_labels=harmful_labels)


def settings_of(name: str, names: Sequence[str], settings: JudgeSettings) -> JudgeSettings:
    """How one of several judges is asked: the refusal judge beside others is asked nothing."""
    return JudgeSettings() if name == "refusal" and len(names) > 1 else settings


def _refuse(settings: JudgeSettings, harmful_labels: Sequence[str]) -> None:
    if settings != JudgeSettings() or harmful_labels:
        like = "--judge_preset and its like (judge_options in a grid file)"
        raise UserError(f"the refusal judge is not asked anything; leave out {like}")
