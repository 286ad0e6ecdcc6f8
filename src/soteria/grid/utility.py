"""Measure a model's abilities with EleutherAI's lm-eval (optional): its own tasks and two made from `data/icl/`.

In: a loaded model, which may be steered in place. Out: metrics per task, in a JSON file with what they came from.
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
from functools import cache
from itertools import zip_longest
from pathlib import Path

import numpy as np
from typing_extensions import TypedDict

from soteria.answering.columns import model_settings
from soteria.errors import UserError
from soteria.languages import PAPER_LANGUAGES, find_language
from soteria.models.loading import BOS_TEXT, LoadedModel
from soteria.models.sources import hub_answers
from soteria.scoring import prompts
from soteria.scoring.prompts import Prompt, PromptForm, load_examples, split_examples
from soteria.storage import files, outputs, paths
from soteria.storage.side_files import Count, Text, is_of, read_noted, side_file

# The local tasks, each a group of twelve, `<name>_<Language>`: questions after examples, and perplexity of headlines.
ICL, TEXT = LOCAL = "soteria_icl", "soteria_text"
LOCAL_VERSION = 1  # raise it with any change of the questions
# sentiment and ag_news have too few different outputs for three wrong choices.
ICL_TASKS, TEXT_TASK = ("country-capital", "antonym"), "ag_news"
LOGITS_BYTES = 2**30  # most that a batch's logits may take: lm-eval computes those of every token
DOCUMENT_TOKENS = 512  # for an estimate of them
N_SHOTS, N_WRONG = 10, 3
DRAW_SEED = 3042  # used for no other draw
SEED = 1234  # lm-eval's default for few-shot examples


@side_file
class Metric(TypedDict):
    value: float
    stderr: float | None


@side_file
class MeasuredTask(TypedDict):
    group: Text | None
    n: Count
    metrics: dict[Text, Metric]


@side_file
class Measurement(TypedDict):
    """A file of `read_or_measure`: what `measure_utility` returns, and what it was made from."""

    inputs: dict
    lm_eval: Text
    tasks: dict[Text, MeasuredTask]


# The local tasks


def documents(
    language: str, form: PromptForm | None = None, *, test_split: float = prompts.TEST_SPLIT, seed: int = prompts.SEED
) -> list[dict]:
    """A language's questions: `text` (the whole prompt), `choices` (one right, three wrong), `answer` (its index).

    All rows are from the `test` part of step 1's split (by `test_split` and `seed`), which step 1 never draws from. No
    wrong choice is an output shown in the prompt. Tasks alternate, so a limit takes equally many questions of each.
    Draws depend only on the number of rows, so all languages get the same questions. Raises UserError for too few rows.
    """
    by_task = []
    for task in ICL_TASKS:
        rows = split_examples(load_examples(paths.DATA / "icl" / f"{task}_{language}.json"), test_split, seed).test
        generator = np.random.default_rng(DRAW_SEED)
        found = []
        for query in rows:
            others = [row for row in rows if row.input != query.input and row.output != query.output]
            order = [others[i] for i in generator.permutation(len(others))]
            shown = order[:N_SHOTS]
            seen = {row.output for row in shown}
            wrong = [output for output in dict.fromkeys(row.output for row in order) if output not in seen][:N_WRONG]
            if len(wrong) < N_WRONG:
                raise UserError(
                    f"{task}_{language} has {len(rows)} unseen rows, too few for {N_SHOTS} shots and {N_WRONG} wrong "
                    "choices; raise --test_split"
                )
            answer = int(generator.integers(N_WRONG + 1))
            choices = [*wrong[:answer], query.output, *wrong[answer:]]
            text = Prompt(shown, query, form or PromptForm()).text
            found.append({"text": text, "choices": choices, "answer": answer})
        by_task.append(found)
    return [document for turn in zip_longest(*by_task) for document in turn if document]


def headlines(
    language: str, form: PromptForm | None = None, *, test_split: float = prompts.TEST_SPLIT, seed: int = prompts.SEED
) -> list[dict]:
    """A language's headlines that step 1 never draws from, as `text`. Nothing is asked, so `form` is not used."""
    rows = load_examples(paths.DATA / "icl" / f"{TEXT_TASK}_{language}.json")
    return [{"text": row.input} for row in split_examples(rows, test_split, seed).test]


DOCUMENTS = {ICL: documents, TEXT: headlines}


def local_tasks(tasks: list[str], languages: list[str] | None = None) -> list[tuple[str, str]]:
    """(group, language) of the local tasks among `tasks`; a group stands for `languages`, None for all twelve.

    Raises UserError for a language without in-context rows.
    """
    found = []
    for group in LOCAL:
        named = [find_language(task.removeprefix(f"{group}_")) for task in tasks if task.startswith(f"{group}_")]
        if group in tasks:
            named += PAPER_LANGUAGES if languages is None else map(find_language, languages)
        for language in named:
            if language not in PAPER_LANGUAGES:
                raise UserError(f"data/icl has no rows in {language.name}; use lm-eval's own tasks instead (--tasks)")
        found += dict.fromkeys((group, language.name) for language in named)
    return found


def _made_tasks(loaded: LoadedModel, tasks: list[str], languages: list[str] | None, **split) -> list:
    """The local tasks among `tasks` as lm-eval's objects, twelve as one group if all are wanted."""
    import datasets
    from lm_eval.api.group import AggMetricConfig, Group
    from lm_eval.api.task import ConfigurableTask

    form = PromptForm() if loaded.adds_bos else PromptForm().starting_with(BOS_TEXT)
    asked = {"output_type": "multiple_choice", "doc_to_text": "text", "doc_to_choice": "choices"}
    asked |= {"doc_to_target": "answer", "metric_list": _metrics("acc", "mean", True)}
    read = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "text"}
    read |= {"metric_list": _metrics("bits_per_byte", "bits_per_byte", False)}

    def task(group: str, language: str) -> ConfigurableTask:
        shown = datasets.Dataset.from_list(DOCUMENTS[group](language, form, **split))
        config = {
            "task": f"{group}_{language}",
            "custom_dataset": lambda **_: {"test": shown},
            "test_split": "test",
            "num_fewshot": 0,  # the demonstrations are in the text
            "metadata": {"version": LOCAL_VERSION},
            **(asked if group == ICL else read),
        }
        return ConfigurableTask(config=config)

    made = {name: task(*name) for name in local_tasks(tasks, languages)}
    if languages is not None:
        return list(made.values())
    groups = []
    for name, metric in ((ICL, "acc"), (TEXT, "bits_per_byte")):
        if name in tasks:
            group = Group(name, aggregate_metric_list=[AggMetricConfig(metric)], metadata={"version": LOCAL_VERSION})
            for part in [made.pop(each) for each in list(made) if each[0] == name]:
                group.add(part)
            groups.append(group)
    return [*groups, *made.values()]


def _metrics(name: str, aggregation: str, higher_is_better: bool) -> list[dict]:
    return [{"metric": name, "aggregation": aggregation, "higher_is_better": higher_is_better}]


# lm-eval


def lm_eval_version() -> str:
    """The installed lm-eval's version. Raises UserError if there is none."""
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
    test_split: float = prompts.TEST_SPLIT,
    seed: int = prompts.SEED,
) -> dict:
    """Measure a loaded model on tasks of lm-eval by name and on the local ones.

    `limit`: the first documents of each task, None for all. `languages`: those that a local task stands for; for all
    twelve (None) their mean is added under its name. `test_split`, `seed`: step 1's.

    Returns `{"lm_eval": version, "tasks": {name: ...}}`, per task its `version`, `group` (the task it is part of, or
    None), `n_shot`, `n` (documents) and `metrics`: `{name: {"value", "stderr", "higher_is_better"}}`, rounded to 6
    digits. Raises UserError for a missing lm-eval, an unknown task, missing data, or a task that fails.
    """
    version = lm_eval_version()
    check_tasks(tasks, languages)
    own = [task for task in tasks if _is_lm_evals(task)]
    with _guarded(tasks, own):
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from transformers import set_seed

        # As lm_eval.simple_evaluate does it, without its five seconds of listing the machine's packages.
        set_seed(SEED)
        vocabulary = loaded.model.config.get_text_config().vocab_size
        model = HFLM(
            pretrained=loaded.model,
            tokenizer=copy.deepcopy(loaded.tokenizer),  # lm-eval may give it a pad token
            batch_size=max(1, min(batch_size, LOGITS_BYTES // (4 * DOCUMENT_TOKENS * vocabulary))),
            trust_remote_code=False,
        )
        measured, texts = {}, [task for task in tasks if task.startswith(TEXT)]
        asked = [task for task in tasks if task not in texts]
        # lm-eval reads a text after a BOS of its own, so a tokenizer must not add another.
        for mine, theirs, adds_bos in ((texts, [], False), (asked, own, model.add_bos_token)):
            if not mine:
                continue
            model.add_bos_token = adds_bos
            local = _made_tasks(loaded, mine, languages, test_split=test_split, seed=seed)
            wanted = _task_manager(bool(theirs)).load([*theirs, *local])
            for task in wanted["tasks"].values():
                if task.get_config("num_fewshot") is None:
                    task.set_config(key="num_fewshot", value=0)
                task.set_fewshot_seed(seed=SEED)
            measured |= _read_results(lm_eval.evaluate(model, wanted, limit=limit, log_samples=False))
    return {"lm_eval": version, "tasks": dict(sorted(measured.items()))}


def check_tasks(tasks: list[str], languages: list[str] | None = None) -> None:
    """Raise UserError for unknown tasks, none at all, or one named twice."""
    if not tasks or len(set(tasks)) < len(tasks):
        raise UserError(f"tasks {' '.join(tasks)!r}: name one or more, each once")
    lm_eval_version()
    local_tasks(tasks, languages)
    for task in filter(_is_lm_evals, tasks):
        if task not in _task_manager(True).all_tasks:
            raise UserError(
                f"unknown task {task!r}; give {' or '.join(LOCAL)}, alone or with _<Language>, or lm-eval's"
            )


def _is_lm_evals(task: str) -> bool:
    return not any(task == group or task.startswith(f"{group}_") for group in LOCAL)


@cache
def _task_manager(with_lm_evals: bool):
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=with_lm_evals)


def _read_results(found: dict) -> dict[str, dict]:
    """The numbers of each task from lm-eval's, which are keyed `metric,filter` and `metric_stderr,filter`."""
    group_of = {task: group for group, parts in found["group_subtasks"].items() for task in parts}
    tasks = {}
    for name, numbers in sorted(found["results"].items()):
        metrics = {}
        for key, value in numbers.items():
            metric, _, kept = key.partition(",")
            if not kept or metric.endswith("_stderr"):
                continue
            stderr = numbers.get(f"{metric}_stderr,{kept}")
            # The last digits depend on the number of threads.
            metrics[metric if kept == "none" else key] = {
                "value": round(float(value), 6),
                "stderr": round(float(stderr), 6) if isinstance(stderr, int | float) else None,
                "higher_is_better": (found["higher_is_better"].get(name) or {}).get(metric),
            }
        if metrics:  # a group without a mean of its own has none
            tasks[name] = {
                "version": str(found["versions"].get(name)),
                "group": group_of.get(name),
                "n_shot": N_SHOTS if name.startswith(ICL) else found["n-shot"].get(name),
                "n": numbers["sample_len"],
                "metrics": metrics,
            }
    return tasks


@contextlib.contextmanager
def _guarded(tasks: list[str], own: list[str]) -> Iterator[None]:
    """Keep lm-eval quiet, and turn what a task's data or code raises into a UserError.

    Its progress bars are shown for its own tasks, on a terminal. If the hub does not answer, only its local cache is
    used; otherwise each data set would retry for half a minute.
    """
    import datasets.config

    def change(module, name: str, value) -> None:
        stack.callback(setattr, module, name, getattr(module, name))
        setattr(module, name, value)

    log = logging.getLogger("lm_eval")
    with contextlib.ExitStack() as stack:
        stack.callback(log.setLevel, log.level)
        log.setLevel(logging.ERROR)
        if not (own and sys.stderr.isatty()):
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        if own and not hub_answers():
            change(datasets.config, "HF_HUB_OFFLINE", True)
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            fix = "; lm-eval's own tasks need the Hugging Face hub, or their data in its cache" if own else ""
            raise UserError(f"tasks {' '.join(tasks)!r} could not be measured ({reason}){fix}") from error


# Files


def model_hash(name: str) -> str:
    """A hash of a model's weights (samples of them), config and tokenizer. Raises UserError if it is not a model."""
    # Of an answer's settings only the model's counts: nothing is generated.
    return model_settings(name, PAPER_LANGUAGES[0], 0, False)["model_sha256"]


def utility_inputs(
    base: str,
    tasks: list[str],
    limit: int | None,
    languages: list[str] | None,
    dtype: str,
    *,
    test_split: float = prompts.TEST_SPLIT,
    seed: int = prompts.SEED,
    **steering,
) -> dict:
    """What a measurement is made from, as JSON. `steering`: what makes the steered model; nothing for the base."""
    split = {"test_split": test_split, "seed": seed}
    asked = [DOCUMENTS[group](name, **split) for group, name in local_tasks(tasks, languages)]
    return {
        "base_model": paths.model_name(base),
        "base_sha256": model_hash(base),
        "dtype": dtype,
        **steering,
        "tasks": tasks,
        "languages": languages,
        "limit": limit,
        "documents_sha256": hashlib.sha256(json.dumps(asked).encode()).hexdigest(),
        "lm_eval": lm_eval_version(),
    }


def read_or_measure(path: Path, inputs: dict, measure: Callable[[], dict]) -> dict:
    """The measurement in a file if it was made from the same inputs, else what `measure` returns, written there.

    Raises UserError for a file that is not a measurement.
    """
    outputs.check_json(path, "inputs")
    found = read_noted(path, Measurement)
    if not found or not is_of(found["inputs"], inputs):
        found = {"inputs": inputs, **measure()}
        files.write_json(path, found)
    return found


def comparison_rows(base: dict, safe: dict) -> list[dict]:
    """What was measured of both, whole tasks only: `task`, `metric`, `n`, `base`, `safe`, `difference` (safe - base).

    The last three are (value, standard error or None). That of the difference treats the two as independent; since
    they answer the same questions, it is too wide rather than too narrow.
    """
    rows = []
    for name, measured in safe["tasks"].items():
        if measured["group"] is not None or name not in base["tasks"]:  # a part, like a subject of mmlu
            continue
        for metric, ours in measured["metrics"].items():
            theirs = base["tasks"][name]["metrics"].get(metric)
            if theirs is None:
                continue
            (before, error), (after, own_error) = ((each["value"], each["stderr"]) for each in (theirs, ours))
            spread = None if None in (error, own_error) else round(float(np.hypot(error, own_error)), 6)
            row = {"task": name, "metric": metric, "n": measured["n"], "base": (before, error)}
            rows.append(row | {"safe": (after, own_error), "difference": (round(after - before, 6), spread)})
    return rows
