"""What steering costs in ability: the base beside its steered model on tasks of EleutherAI's lm-eval, per language.

The model is one that steer.py wrote (--safe_model), or the base steered in place (--finetune_model, --head_folder,
--scaling_factor). The default task is made of data/icl/ and needs no network: four choices after ten examples, of rows
that chose no heads. The steered model is asked in its own language, the base once in all twelve. A file made from the
same inputs is reused, so that an interrupted run goes on where it was. Needs: pip install -r requirements-utility.txt.
"""

from pathlib import Path

from soteria import cli
from soteria.errors import UserError
from soteria.languages import language_names
from soteria.scoring.heads import read_heads
from soteria.storage import files, paths
from soteria.storage.paths import language_file


def parse_arguments():
    parser = cli.new_parser(
        __doc__,
        "python src/evaluate_utility.py --finetune_model data/models/polyglot-tuned --base_model "
        "data/models/polyglot-base --language Hindi --scaling_factor 5 --head_folder polyglot-base",
    )
    add = parser.add_argument
    add("--base_model", required=True, help="the model before steering: hub id or folder")
    add("--safe_model", help="a steered model's folder, as steer.py writes it; it says its language and scaling factor")
    add("--finetune_model", help="to steer in place: the harmfully tuned model, hub id, folder, or LoRA adapter folder")
    add("--language", nargs="+", help="to steer in place: names or codes, or all for the paper's twelve")
    add("--scaling_factor", type=cli.scaling_factor, help="to steer in place: how much of the task vector to subtract")
    add(
        "--head_folder", help="to steer in place: folder of <Language>_Heads.json, a name under results/heads or a path"
    )
    add(
        "--tasks",
        nargs="+",
        default=["soteria_icl"],
        help="lm-eval's names, for real models mmlu truthfulqa_mc1 truthfulqa_mc2 (the hub is needed), or soteria_icl",
    )
    add(
        "--limit",
        type=document_limit,
        default=32,
        help="the first so many documents of a task, of mmlu those of each subject; or all",
    )
    add("--batch_size", type=cli.positive_int, default=16, help="choices in one forward pass")
    add("--device", help="default: cuda if there is one, else cpu")
    add("--output", type=Path, help="folder of one JSON file a model and language (default: results/utility)")
    return parser.parse_args()


def document_limit(text: str) -> int | None:
    """A whole number above zero, or None for `all`."""
    return None if text == "all" else cli.positive_int(text)


def main() -> None:
    arguments = parse_arguments()
    if arguments.safe_model:
        cells = [written_model(arguments)]
        selected = {}
    else:
        for option in ("finetune_model", "language", "scaling_factor", "head_folder"):
            if getattr(arguments, option) is None:
                raise UserError(
                    f"--{option} is missing; give it to steer in place, or --safe_model for a written model"
                )
        names = list(dict.fromkeys(language_names(arguments.language)))
        folder = paths.head_folder(arguments.head_folder)
        selected = {name: read_heads(folder / language_file(name)) for name in names}
        cells = [(name, arguments.scaling_factor) for name in names]

    from functools import cache

    from tqdm import tqdm

    from soteria.grid import utility
    from soteria.models.loading import default_device, load_model, resolve_dtype
    from soteria.models.task_vector import TaskVector
    from soteria.steering.checkpoint import fingerprint
    from soteria.steering.formula import head_list_hash, open_steering, steered_in_place

    tasks, limit = arguments.tasks, arguments.limit
    utility.check_tasks(tasks)
    for name, _ in cells:
        utility.local_languages(tasks, [name])
    output = arguments.output or paths.RESULTS / "utility"
    dtype = str(resolve_dtype("auto", arguments.device or default_device())).removeprefix("torch.")
    load = cache(lambda name: load_model(name, arguments.device))
    inputs = {None: utility.utility_inputs(arguments.base_model, tasks, limit, None, dtype)}
    if arguments.safe_model:
        ((name, factor),) = cells
        made = {"safe_sha256": utility.model_hash(arguments.safe_model), "scaling_factor": factor}
    else:
        vector = TaskVector.open(arguments.base_model, arguments.finetune_model)
        steerings = {
            name: open_steering(vector, heads, arguments.scaling_factor, source=str(folder / language_file(name)))
            for name, heads in selected.items()
        }
        made = {"finetune_weights": fingerprint(vector.tuned), "scaling_factor": arguments.scaling_factor}
    for name, _ in cells:
        own = {"heads_sha256": head_list_hash(selected[name])} if selected else {}
        inputs[name] = utility.utility_inputs(arguments.base_model, tasks, limit, [name], dtype, **made, **own)

    def measure(name: str | None) -> dict:
        """The base where no language is named, else its steered model."""
        options = {"limit": limit, "batch_size": arguments.batch_size, "languages": name and [name]}
        if name and arguments.safe_model:
            return utility.measure_utility(load(arguments.safe_model), tasks, **options)
        loaded = load(arguments.base_model)
        if not name:
            return utility.measure_utility(loaded, tasks, **options)
        with steered_in_place(loaded, steerings[name]):
            return utility.measure_utility(loaded, tasks, **options)

    found = {}
    for name, factor in tqdm([(None, None), *cells], desc="measuring", unit="model", disable=None):
        path = utility.utility_file(output, arguments.base_model, name, factor)
        found[name] = utility.read_or_measure(path, inputs[name], lambda name=name: measure(name))
    print(
        f"{paths.model_slug(arguments.base_model)} and steered, lm-eval {utility.lm_eval_version()}, ± standard error"
    )
    print_table([(name, factor, utility.comparison_rows(found[None], found[name])) for name, factor in cells])


def written_model(arguments) -> tuple[str, float]:
    """Language and scaling factor of --safe_model. Raises UserError for one that steer.py did not make of the base."""
    from soteria.models.checkpoints import Checkpoint
    from soteria.steering.checkpoint import fingerprint
    from soteria.storage.paths import FACTS

    for option in ("finetune_model", "language", "scaling_factor", "head_folder"):
        if getattr(arguments, option) is not None:
            raise UserError(f"--{option} and --safe_model do not go together: that model is steered already")
    facts = files.read_facts(Path(arguments.safe_model) / FACTS)
    if facts.get("format") != "checkpoint":
        raise UserError(f"{arguments.safe_model} has no {FACTS} of a steered checkpoint; make one with steer.py")
    if facts["base_weights"] != fingerprint(Checkpoint.open(arguments.base_model)):
        raise UserError(f"{arguments.safe_model} was not made from {arguments.base_model!r}; give its own --base_model")
    return facts["language"], facts["scaling_factor"]


def print_table(cells: list[tuple[str, float, list[dict]]]) -> None:
    """Per language and task: base, safe, and safe minus base."""

    def shown(number: tuple[float, float | None], sign: str = "") -> str:
        value, error = number
        return f"{value:{sign}.4f}" + (f" ± {error:.4f}" if error is not None else "")

    width = max([4, *(len(row["task"]) for _, _, rows in cells for row in rows)])
    print(
        f"{'language':10} {'scaling':>7} {'task':{width}} {'metric':8} {'n':>6} {'base':>16} {'safe':>16} "
        f"{'difference':>17}"
    )
    for language, factor, rows in cells:
        for row in rows:
            print(
                f"{language:10} {factor:>7g} {row['task']:{width}} {row['metric']:8} {row['n']:>6} "
                f"{shown(row['base']):>16} {shown(row['safe']):>16} {shown(row['difference'], '+'):>17}"
            )


if __name__ == "__main__":
    cli.run(main)
