"""What a model can still do, measured by EleutherAI's lm-eval: its own tasks by name, and one made of `data/icl/`.

Knows lm-eval, an optional extra; knows nothing of heads or scaling factors. A model is measured as it stands: one that
is steered in place need not be written.
"""

import contextlib
import copy
import hashlib
import importlib.metadata
import io
import json
import logging
import sys
from collections.abc import Callable, Iterator
from functools import cache, partial
from itertools import zip_longest
from pathlib import Path

import numpy as np

from soteria.answering.columns import model_settings
from soteria.errors import UserError
from soteria.languages import PAPER_LANGUAGES, find_language
from soteria.models.loading import BOS_TEXT, LoadedModel
from soteria.scoring.prompts import Pair, Prompt, PromptForm, load_pairs, split_pairs
from soteria.scoring.run import seed_everything
from soteria.storage import files, paths

# The local task: the group of twelve languages, `soteria_icl_<Language>` one of them.
LOCAL = "soteria_icl"
LOCAL_VERSION = 1  # to be raised with any change of what is asked
# Of the five in-context tasks, those whose outputs are many: sentiment and ag_news have too few for three wrong ones.
LOCAL_TASKS = ("country-capital", "antonym")
N_SHOTS, N_WRONG = 10, 3
SPLIT, SPLIT_SEED = 0.3, 42  # step 1's
DRAW_SEED = 3042  # no other draw's
SEED = 1234  # lm-eval's for few-shot examples
PROBE_SECONDS = 5  # how long the hub is given to answer at all
# Documents of the local task


def documents(language: str, form: PromptForm | None = None) -> list[dict]:
    """A language's questions: `text` (the whole prompt), `choices` (one right, three wrong), `answer` (its index).

    All rows are those that step 1's split leaves in `test`: they chose no heads. Demonstrations and wrong choices come
    from other rows than the query's, and a wrong choice is the output of no row shown. The tasks take turns, so that a
    limit takes as many of each. The draws depend on the number of rows alone: languages are asked the same.
    Raises UserError for a language without rows.
    """
    form = form or PromptForm()
    by_task = []
    for task in LOCAL_TASKS:
        rows = split_pairs(load_pairs(paths.DATA / "icl" / f"{task}_{language}.json"), SPLIT, SPLIT_SEED).test
        generator = np.random.default_rng(DRAW_SEED)
        by_task.append([_document(query, rows, form, generator) for query in rows])
    return [document for turn in zip_longest(*by_task) for document in turn if document]


def _document(query: Pair, rows: list[Pair], form: PromptForm, generator: np.random.Generator) -> dict:
    """One question about `query`. Raises UserError where the other rows are too few."""
    others = [row for row in rows if row.input != query.input and row.output != query.output]
    order = [others[i] for i in generator.permutation(len(others))]
    shown, left = order[:N_SHOTS], order[N_SHOTS:]
    seen = {row.output for row in shown}
    wrong = [output for output in dict.fromkeys(row.output for row in left) if output not in seen][:N_WRONG]
    if len(wrong) < N_WRONG:
        raise UserError(f"{len(rows)} rows are too few for {N_SHOTS} shots and {N_WRONG} wrong choices")
    answer = int(generator.integers(N_WRONG + 1))
    choices = [*wrong[:answer], query.output, *wrong[answer:]]
    return {"text": Prompt(shown, query, form).text, "choices": choices, "answer": answer}


def local_languages(tasks: list[str], languages: list[str] | None = None) -> list[str]:
    """Names of the languages whose local tasks are among `tasks`.

    `soteria_icl` stands for `languages`, None for all twelve. Raises UserError for a language without in-context rows.
    """
    named = [find_language(task.removeprefix(f"{LOCAL}_")) for task in tasks if task.startswith(f"{LOCAL}_")]
    if LOCAL in tasks:
        named += list(PAPER_LANGUAGES if languages is None else map(find_language, languages))
    for language in named:
        if language not in PAPER_LANGUAGES:
            raise UserError(f"there are no in-context rows in {language.name}; give --tasks of lm-eval's own")
    return list(dict.fromkeys(language.name for language in named))


# lm-eval


def lm_eval_version() -> str:
    """The installed lm-eval's version. Raises UserError where there is none."""
    try:
        return importlib.metadata.version("lm_eval")
    except importlib.metadata.PackageNotFoundError:
        raise UserError("lm-eval is not installed; pip install -r requirements-utility.txt") from None


def measure_utility(
    loaded: LoadedModel,
    tasks: list[str],
    *,
    limit: int | None,
    batch_size: int = 16,
    languages: list[str] | None = None,
) -> dict:
    """Measure a loaded model, as it stands, on tasks by lm-eval's names and on the local one.

    `limit`: the first documents of each task, None for all. `languages`: which ones `soteria_icl` stands for; where
    that is all twelve (None), their mean is measured too, by that name. Returns `{"lm_eval": version, "tasks": {name:
    ...}}`, of each task its `version`, `group` (the task that it is a part of, or None), `n_shot`, `n` (documents) and
    `metrics`: `{name: {"value", "stderr", "higher_is_better"}}`, rounded to 6 digits; `stderr` is lm-eval's, None where
    it gives none.

    Raises UserError for a missing lm-eval, an unknown task, one whose data cannot be had, or one that fails.
    """
    version = lm_eval_version()
    check_tasks(tasks, languages)
    own = [task for task in tasks if _is_lm_evals(task)]
    with _quiet(show_bars=bool(own)):
        import lm_eval
        from lm_eval.models.huggingface import HFLM

        # A pad token may be given to the tokenizer: to a copy.
        model = HFLM(
            pretrained=loaded.model,
            tokenizer=copy.deepcopy(loaded.tokenizer),
            batch_size=batch_size,
            trust_remote_code=False,
        )
        with _explained(tasks), _offline_where_unreachable(bool(own)):
            chosen = _task_manager(bool(own)).load([*own, *_local_tasks(loaded, tasks, languages)])
        # What lm_eval.simple_evaluate does too; that one also asks the machine for its packages, which takes seconds.
        seed_everything(SEED)
        for task in chosen["tasks"].values():
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=SEED)
        with _explained(tasks):
            found = lm_eval.evaluate(lm=model, task_dict=chosen, limit=limit, log_samples=False)
    return {"lm_eval": version, "tasks": _read_results(found)}


def check_tasks(tasks: list[str], languages: list[str] | None = None) -> None:
    """Raise UserError for tasks that neither lm-eval nor this file knows, or none, or one named twice.

    Looking at lm-eval's own takes seconds, once a process.
    """
    if not tasks or len(set(tasks)) < len(tasks):
        raise UserError(f"tasks {' '.join(tasks)!r}: name one or more, each once")
    lm_eval_version()
    local_languages(tasks, languages)
    own = [task for task in tasks if _is_lm_evals(task)]
    if own:
        known = set(_task_manager(True).all_tasks)
        for task in own:
            if task not in known:
                raise UserError(f"unknown task {task!r}; give {LOCAL}, {LOCAL}_<Language> or one of lm-eval's")


def _is_lm_evals(task: str) -> bool:
    return task != LOCAL and not task.startswith(f"{LOCAL}_")


@cache
def _task_manager(with_lm_evals: bool):
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=with_lm_evals)


def _local_tasks(loaded: LoadedModel, tasks: list[str], languages: list[str] | None) -> list:
    """The local tasks among `tasks` as lm-eval's objects, the twelve as one group where all are asked for.

    Their data never become files: no cache is left behind.
    """
    from lm_eval.api.group import AggMetricConfig, Group
    from lm_eval.api.task import ConfigurableTask

    form = PromptForm() if loaded.adds_bos else PromptForm().starting_with(BOS_TEXT)
    made = [
        ConfigurableTask(
            config={
                "task": f"{LOCAL}_{language}",
                "custom_dataset": partial(_dataset, language, form),
                "output_type": "multiple_choice",
                "test_split": "test",
                "num_fewshot": 0,  # the demonstrations are in the text
                "doc_to_text": "text",
                "doc_to_choice": "choices",
                "doc_to_target": "answer",
                "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
                "metadata": {"version": LOCAL_VERSION},
            }
        )
        for language in local_languages(tasks, languages)
    ]
    if LOCAL not in tasks or languages is not None:
        return made
    group = Group(LOCAL, aggregate_metric_list=[AggMetricConfig("acc")], metadata={"version": LOCAL_VERSION})
    for task in made:
        group.add(task)
    return [group]


def _dataset(language: str, form: PromptForm, **_) -> dict:
    import datasets

    return {"test": datasets.Dataset.from_list(documents(language, form))}


def _read_results(found: dict) -> dict[str, dict]:
    """Each task's numbers out of lm-eval's, where they are keyed `metric,filter` and `metric_stderr,filter`."""
    group_of = {task: group for group, parts in found["group_subtasks"].items() for task in parts}
    tasks = {}
    for name, numbers in sorted(found["results"].items()):
        metrics = {}
        for key, value in numbers.items():
            metric, _, kept = key.partition(",")
            if not kept or metric.endswith("_stderr"):
                continue
            stderr = numbers.get(f"{metric}_stderr,{kept}")
            better = (found["higher_is_better"].get(name) or {}).get(metric)
            # The last digits depend on how many threads computed them.
            metrics[metric if kept == "none" else key] = {
                "value": round(float(value), 6),
                "stderr": round(float(stderr), 6) if isinstance(stderr, int | float) else None,
                "higher_is_better": better,
            }
        if metrics:  # a group without a mean of its own has none
            tasks[name] = {
                "version": str(found["versions"].get(name)),
                "group": group_of.get(name),
                "n_shot": found["n-shot"].get(name) if _is_lm_evals(name) else N_SHOTS,
                "n": numbers["sample_len"],
                "metrics": metrics,
            }
    return tasks


@contextlib.contextmanager
def _quiet(show_bars: bool) -> Iterator[None]:
    """Keep lm-eval's log to errors, and its progress bars to a terminal, where a task may take long."""
    log = logging.getLogger("lm_eval")
    level = log.level
    log.setLevel(logging.ERROR)
    bars = contextlib.nullcontext() if show_bars and sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO())
    try:
        with bars:
            yield
    finally:
        log.setLevel(level)


@contextlib.contextmanager
def _explained(tasks: list[str]) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # whatever a task's data or code leads lm-eval to
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        mend = "; it needs the Hugging Face hub, or its data in the hub's cache" if _is_about_network(error) else ""
        raise UserError(f"tasks {' '.join(tasks)!r} cannot be measured ({reason}){mend}") from error


def _is_about_network(error: BaseException) -> bool:
    return isinstance(error, ConnectionError) or "offline" in str(error).lower()


@contextlib.contextmanager
def _offline_where_unreachable(needed: bool) -> Iterator[None]:
    """Keep to the hub's cache where the hub does not answer: each data set would wait for half a minute."""
    import datasets.config
    import huggingface_hub
    from huggingface_hub import constants

    if not needed or constants.is_offline_mode():
        yield
        return
    try:
        huggingface_hub.get_session().head(constants.ENDPOINT, timeout=PROBE_SECONDS)
        yield
        return
    except Exception as error:  # of the client's own kinds: no name, no route, a proxy's refusal, time out
        if not type(error).__module__.startswith("httpx"):
            raise
    kept = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = kept


# Files


def model_hash(name: str) -> str:
    """A hash of a model's weights (samples of them), config and tokenizer. Raises UserError for what is no model."""
    # Of an answer's settings, only the model's counts here: nothing is generated.
    return model_settings(name, PAPER_LANGUAGES[0], 0, False)["model_sha256"]


def utility_inputs(
    base: str, tasks: list[str], limit: int | None, languages: list[str] | None, dtype: str, **steering
) -> dict:
    """What a measurement is made from, as JSON. `steering`: what made the base another model, nothing for the base."""
    asked = [documents(language) for language in local_languages(tasks, languages)]
    return {
        "base_model": base,
        "base_sha256": model_hash(base),
        "dtype": dtype,
        **steering,
        "tasks": tasks,
        "languages": languages,
        "limit": limit,
        "documents_sha256": hashlib.sha256(json.dumps(asked).encode()).hexdigest(),
        "lm_eval": lm_eval_version(),
    }


def utility_file(folder: Path, base: str, language: str | None = None, scaling_factor: float | None = None) -> Path:
    """Where a measurement goes: the base's own, or that of the base steered for a language."""
    which = "base" if language is None else f"{language}_scaling_{scaling_factor:g}"
    return folder / f"{paths.model_slug(base)}_{which}.json"


def read_or_measure(path: Path, inputs: dict, measure: Callable[[], dict]) -> dict:
    """The measurement in a file where that was made from the same inputs, else what `measure` gives, written there.

    It is `measure_utility`'s, with `inputs`. Raises UserError for a file that is no measurement.
    """
    found = files.read_facts(path)
    if path.exists() and "inputs" not in found:
        raise UserError(f"{path} exists and is no measurement of utility; remove it or give another --output")
    if found.get("inputs") == inputs:
        return found
    found = {"inputs": inputs, **measure()}
    files.write_json(path, found)
    return found


def comparison_rows(base: dict, safe: dict) -> list[dict]:
    """What was measured of both, whole tasks only: `task`, `metric`, `n`, `base`, `safe`, `difference` (safe - base).

    The last three are (value, standard error or None). That of the difference takes the two as independent; they answer
    the same questions, so it is rather too wide.
    """
    rows = []
    for name, measured in safe["tasks"].items():
        if measured["group"] is not None or name not in base["tasks"]:  # a part, as a subject of mmlu is
            continue
        for metric, ours in measured["metrics"].items():
            theirs = base["tasks"][name]["metrics"][metric]
            pair = [(number["value"], number["stderr"]) for number in (theirs, ours)]
            errors = [error for _, error in pair if error is not None]
            spread = round(float(np.hypot(*errors)), 6) if len(errors) == 2 else None
            difference = (round(pair[1][0] - pair[0][0], 6), spread)
            rows.append({"task": name, "metric": metric, "n": measured["n"], "base": pair[0], "safe": pair[1]})
            rows[-1]["difference"] = difference
    return rows
