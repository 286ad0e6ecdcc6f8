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

FACTS = "soteria.json"  # in a steered model's folder: how it was made
BENIGN = "benign"  # harmless questions: a folder beside answers, and a set of a cell


def model_slug(name: str) -> str:
    """A model's name in paths: a hub id with `/` replaced by `_`, or a local folder's own name."""
    path = Path(name)
    return path.resolve().name if path.is_dir() else name.strip("/").replace("/", "_")


# Step 1


def scores_folder(results: Path, slug: str) -> Path:
    """Where step 1 writes a model's scores by default."""
    return results / "indirect_effect" / slug


def effect_path(root: Path, dataset: str) -> Path:
    """The indirect effects of one dataset (`<task>_<Language>`) below a scores folder."""
    return root / dataset / f"{dataset}_indirect_effect.pt"


# Step 2


def heads_root(results: Path) -> Path:
    """Where head folders lie."""
    return results / "heads"


def language_file(language: str) -> str:
    """The file name of a language's head list."""
    return f"{language}_Heads.json"


def group_file(group: str) -> str:
    """The file name of a group's head list."""
    return f"{group.strip().capitalize()}_Lang.json"


def head_folder(name: str) -> Path:
    """A folder of head lists: a path, or a name under `results/heads`. Raises UserError where it is neither."""
    for folder in (Path(name), heads_root(RESULTS) / name):
        if folder.is_dir():
            return folder
    raise UserError(f"no head folder {name!r}, neither as a path nor in {heads_root(RESULTS)}")


# Step 3


def steered_folder(results: Path, language: str, base: str, scaling_factor: float) -> Path:
    """Where a steered model goes."""
    return results / "models" / f"{language}_{model_slug(base)}_scaling_{scaling_factor:g}"


def delta_folder(results: Path, base: str) -> Path:
    """Where a base's task vector goes, with the head lists of its languages."""
    return results / "models" / f"{model_slug(base)}_delta"


def answer_files(results: Path, language: str, base: str, dataset: str, scaling_factor: float) -> tuple[Path, Path]:
    """Where the answers to a question set go, and their verdicts."""
    name = f"{model_slug(base)}_{language}_{dataset}_scaling_{scaling_factor:g}.csv"
    return results / "generations" / name, results / "evaluated" / f"Evaluated_{name}"


def benign_file(answers: Path) -> Path:
    """Where the same models' answers to harmless questions lie."""
    return answers.parent / BENIGN / answers.name


def first_token_file(answers: Path, column: str) -> Path:
    """Where the log-probabilities of the first token of a column's answers lie."""
    return answers.with_name(f"{answers.stem}.{ANSWER_COLUMNS[column][1]}.first_token.safetensors")


def tuning_file(results: Path, slug: str, language: str) -> Path:
    """Where `tune.py` puts what it found for a language."""
    return results / "tuning" / f"{slug}_{language}.json"


# Step 4: grids


@dataclass(frozen=True)
class CellFiles:
    """The files of one cell of a grid: one model in one language under one steering."""

    folder: Path

    def answers(self, prompt_set: str) -> Path:
        return self.folder / f"{prompt_set}.csv"

    def verdicts(self, prompt_set: str, judge: str) -> Path:
        return self.folder / f"{prompt_set}.by_{model_slug(judge.replace(':', '_'))}.csv"

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


RESERVED_SETS = (BENIGN, "cell", "utility")  # names of a cell's other files, so no prompt set can have them


def cell_files(results: Path, name: str) -> CellFiles:
    """The files of a cell by its name, `<model slug>/<language>/<steering>`."""
    return CellFiles(results / "cells" / name)


def model_failure(results: Path, slug: str) -> Path:
    """Why a grid's model could not be opened, while it cannot."""
    return results / "cells" / slug / "failed.txt"


def durations_file(results: Path, slug: str) -> Path:
    """How long the steps of a grid took with a model, a JSON object a line."""
    return results / "cells" / slug / "costs.jsonl"


def table_file(results: Path, grid: str, table: str, ending: str) -> Path:
    """A table or a figure of a grid."""
    return results / "tables" / f"{grid}_{table}.{ending}"


def tables_stamp(results: Path, grid: str) -> Path:
    """What a grid's tables were made from."""
    return results / "tables" / f".{grid}.json"


def report_file(results: Path) -> Path:
    """The report of the grid that was run last."""
    return results / "report.html"
