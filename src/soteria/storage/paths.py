"""Where everything lies: every path, file name and column name of the project is made here and nowhere else."""

import os
from dataclasses import dataclass
from pathlib import Path

from soteria.errors import UserError

# Installed as a package, there is no repository around this file: results go below the current folder then.
_SOURCE = Path(__file__).resolve().parents[3]
ROOT = _SOURCE if (_SOURCE / "pyproject.toml").exists() else Path.cwd()
DATA = ROOT / "data"
RESULTS = Path(os.environ.get("SOTERIA_RESULTS") or ROOT / "results")

SAFE_ANSWER, BASE_ANSWER = "SAFE ANSWER", "BASE ANSWER"
# Answer column -> (verdict column, name in the JSON)
ANSWER_COLUMNS = {SAFE_ANSWER: ("Verdict_Safe", "safe"), BASE_ANSWER: ("Verdict_Base", "base")}
THINKING_COLUMNS = {SAFE_ANSWER: "SAFE THINKING", BASE_ANSWER: "BASE THINKING"}  # where a model thinks first
REFUSAL_COLUMNS = {SAFE_ANSWER: "Refused_Safe", BASE_ANSWER: "Refused_Base"}  # where a judge tells that too

FACTS = "soteria.json"  # in a steered or fine-tuned model's folder: how it was made
# Harmless questions, everyday ones and some that look harmful: each a folder beside answers, and a set of a cell.
BENIGN, BORDERLINE = HARMLESS = "benign", "borderline"


def model_slug(name: str) -> str:
    """A model's name in paths: a hub id with `/` replaced by `_`, or a local folder's or GGUF file's own name."""
    path = Path(name)
    if path.suffix == ".gguf":
        return path.stem
    return path.resolve().name if path.is_dir() else name.strip("/").replace("/", "_")


def unpacked_folder(results: Path, gguf: Path) -> Path:
    """Where the model of a GGUF file goes as an ordinary folder."""
    return results / "models" / f"{gguf.stem}_gguf"


def model_name(name: str) -> str:
    """A model's name in files that people publish: a hub id, or a local folder's own name without its path."""
    path = Path(name)
    return path.resolve().name if path.is_dir() or path.is_absolute() else name


def from_root(path: Path) -> str:
    """A path in files that people publish, without this machine's folders: from the repository on, or the last name."""
    whole = path.absolute()
    return str(whole.relative_to(ROOT)) if whole.is_relative_to(ROOT) else whole.name


def list_name(source: str) -> str:
    """A head list's name in files that people publish: its folder's and its own, of a path."""
    return "/".join(Path(source).parts[-2:])


def names_another(name: str, other: str) -> bool:
    """Whether two names surely stand for different models; of a folder that was moved, its own name counts."""
    here, there = Path(name), Path(other)
    if here.is_dir() and there.is_dir():
        return not here.samefile(there)
    return here.name != there.name


# Step 0

PARTIAL_FACTS = "settings.json"  # in the folder of an unfinished fine-tuning


def partial_folder(output: Path) -> Path:
    """What an unfinished fine-tuning has saved so far."""
    return output.with_name(f"{output.name}.partial")


# Step 1


def scored_slug(slug: str, *, whole: bool) -> str:
    """What a model's scores, and whatever is made from them, lie under: those of whole answers under another name."""
    return f"{slug}_whole" if whole else slug


def scores_folder(results: Path, slug: str) -> Path:
    return results / "indirect_effect" / slug


def effect_path(root: Path, dataset: str) -> Path:
    """The indirect effects of one dataset (`<task>_<Language>`) below a scores folder."""
    return root / dataset / f"{dataset}_indirect_effect.pt"


def safety_path(root: Path, language: str) -> Path:
    """How far each head moves a language's answers to disallowed questions, beside the indirect effects."""
    return root / f"safety_{language}" / f"safety_{language}_divergence.pt"


def scoring_file(root: Path, dataset: str) -> Path:
    """How a dataset was scored: the arguments of step 1 and what is noted of the run."""
    return root / dataset / "indirect_effect_args.txt"


# Step 2


def heads_root(results: Path) -> Path:
    return results / "heads"


def language_file(language: str) -> str:
    return f"{language}_Heads.json"


def group_file(group: str) -> str:
    return f"{group.strip().capitalize()}_Lang.json"


def head_folder(name: str) -> Path:
    """A folder of head lists: a path, or a name under `results/heads`. Raises UserError where it is neither."""
    for folder in (Path(name), heads_root(RESULTS) / name):
        if folder.is_dir():
            return folder
    raise UserError(f"no head folder {name!r}, neither as a path nor in {heads_root(RESULTS)}")


# Step 3


def steered_folder(results: Path, language: str, base: str, scaling_factor: float, kind: str = "checkpoint") -> Path:
    name = f"{language}_{model_slug(base)}_scaling_{scaling_factor:g}"
    return results / "models" / (name if kind == "checkpoint" else f"{name}_{kind}")


def delta_folder(results: Path, base: str) -> Path:
    """Where a base's task vector goes, with the head lists of its languages."""
    return results / "models" / f"{model_slug(base)}_delta"


def answer_files(results: Path, language: str, base: str, dataset: str, scaling_factor: float) -> tuple[Path, Path]:
    """Where the answers to a question set go, and their verdicts."""
    name = f"{model_slug(base)}_{language}_{dataset}_scaling_{scaling_factor:g}.csv"
    return results / "generations" / name, results / "evaluated" / f"Evaluated_{name}"


def harmless_file(answers: Path, kind: str) -> Path:
    """Where the answers to a kind of `HARMLESS` questions go."""
    return answers.parent / kind / answers.name


def first_token_file(answers: Path, column: str) -> Path:
    """Where the log-probabilities of the first token of a column's answers lie."""
    return answers.with_name(f"{answers.stem}.{ANSWER_COLUMNS[column][1]}.first_token.safetensors")


def tuning_file(results: Path, slug: str, language: str) -> Path:
    return results / "tuning" / f"{slug}_{language}.json"


def utility_file(folder: Path, base: str, language: str | None, scaling_factor: float) -> Path:
    """Where `evaluate_utility.py` puts what it measured of the base (no language) or of its steered model."""
    return folder / f"{model_slug(base)}_{f'{language}_scaling_{scaling_factor:g}' if language else 'base'}.json"


def facts_file(csv: Path) -> Path:
    """The JSON beside a CSV of answers or verdicts that says how it was made."""
    return csv.with_suffix(".json")


def answer_journal(answers: Path, column: str) -> Path:
    return answers.with_name(f".{answers.name}.{ANSWER_COLUMNS[column][1]}.journal")


def base_answer_files(answers: Path, name: str) -> tuple[Path, Path]:
    """The journal and the first-token file of the base model's answers, which runs of every scaling factor share."""
    folder = answers.parent / "base_answers"
    return folder / f"{name}.jsonl", folder / f"{name}.first_token.safetensors"


BY = ".by_"  # between a set of answers and the judge, in the name of verdicts


def judge_slug(judge: str) -> str:
    """A judge's name in file names."""
    return model_slug(judge.replace(":", "_"))


def own_verdicts(verdicts: Path, judge: str) -> Path:
    """Where one of several judges' verdicts go, beside those of the majority."""
    return verdicts.with_name(f"{verdicts.stem}{BY}{judge_slug(judge)}.csv")


def verdict_journal(verdicts: Path) -> Path:
    return verdicts.with_name(f".{verdicts.name}.journal")


def base_verdict_journal(verdicts: Path, digest: str) -> Path:
    """The journal of the verdicts on the base model's answers, which runs of every scaling factor share."""
    return verdicts.parent / "base_verdicts" / f"{digest}.jsonl"


# Step 4: grids


@dataclass(frozen=True)
class CellFiles:
    """The files of one cell of a grid: one model in one language under one steering."""

    folder: Path

    def answers(self, prompt_set: str) -> Path:
        return self.folder / f"{prompt_set}.csv"

    def verdicts(self, prompt_set: str, judge: str) -> Path:
        return self.folder / f"{prompt_set}{BY}{judge_slug(judge)}.csv"

    @property
    def facts(self) -> Path:
        """What the cell was made from, and what steering costs in it."""
        return self.folder / "cell.json"

    @property
    def utility(self) -> Path:
        return self.folder / "utility.json"

    def failure(self, step: str) -> Path:
        """Why a step (answering, judging) failed in this cell, while it does."""
        return self.folder / f"failed_{step}.txt"


RESERVED_SETS = (*HARMLESS, "cell", "utility")  # names of a cell's other files, so no prompt set can have them


def cell_files(results: Path, name: str) -> CellFiles:
    """The files of a cell by its name, `<scored slug>/<language>/<steering>`."""
    return CellFiles(results / "cells" / name)


def served_model(results: Path, name: str) -> Path:
    """The steered model of a cell, by the cell's name, where an engine serves it."""
    return results / "served" / name


def model_failure(results: Path, slug: str) -> Path:
    """Why a grid's model could not be opened, while it cannot."""
    return results / "cells" / slug / "failed.txt"


def dtype_file(results: Path, slug: str) -> Path:
    return results / "cells" / slug / "dtype.txt"


def durations_file(results: Path, slug: str) -> Path:
    """How long the steps of a grid took with a model, a JSON object a line."""
    return results / "cells" / slug / "costs.jsonl"


def table_file(results: Path, grid: str, table: str, ending: str) -> Path:
    return results / "tables" / f"{grid}_{table}.{ending}"


def report_file(results: Path) -> Path:
    """The report of the grid that was run last."""
    return results / "report.html"
