"""What steering costs in ability: the base beside its steered model on tasks of EleutherAI's lm-eval, per language.

The steered model is one that steer.py wrote (--safe_model), or the base steered in place (--finetune_model,
--head_folder, --language, --scaling_factor). The default task is made from data/icl/ and needs no network: four choices
after ten examples, on rows that step 1 never draws from. The steered model is asked in its own language, the base once
in all twelve. A file made from the same inputs is reused, so an interrupted run resumes. Needs:
pip install -r requirements-utility.txt.
"""

from functools import cache
from pathlib import Path

from soteria import cli
from soteria.errors import UserError
from soteria.languages import language_names
from soteria.scoring.heads import read_heads
from soteria.scoring.prompts import SEED, TEST_SPLIT
from soteria.storage import outputs, paths
from soteria.storage.side_files import read_noted

IN_PLACE = ("finetune_model", "language", "scaling_factor", "head_folder")


def parse_arguments():
    parser = cli.new_parser(
        __doc__,
        "python src/evaluate_utility.py --finetune_model data/models/polyglot-tuned --base_model "
        "data/models/polyglot-base --language Hindi --scaling_factor 2 --head_folder polyglot-base",
    )
    add = parser.add_argument
    parser.add_model("--base_model", required=True, help=f"the model before steering: {cli.MODEL}")
    add("--safe_model", help="folder of a model steered by steer.py, which says its language and scaling factor")
    tuned_help = f"to steer in place: the harmfully tuned model, {cli.MODEL}, or folder of a LoRA adapter"
    add("--finetune_model", help=tuned_help)
    add("--language", nargs="+", help="to steer in place: names or codes, or all for the paper's twelve")
    add("--scaling_factor", type=cli.scaling_factor, help="to steer in place: how much of the task vector to subtract")
    add("--head_folder", help="to steer in place: folder of <Language>_Heads.json, path or name under results/heads")
    tasks = "lm-eval's names (for real models mmlu truthfulqa_mc1 truthfulqa_mc2; needs the hub), or soteria_icl"
    add("--tasks", nargs="+", default=["soteria_icl"], help=tasks)
    limit = "number of documents per task, from the first; for mmlu, per subject; or all"
    add("--limit", type=document_limit, default=32, help=limit)
    add("--seed", type=cli.seed, default=SEED, help="step 1's, whose unseen rows are asked")
    add("--test_split", type=float, default=TEST_SPLIT, help="step 1's fraction of unseen rows, which are asked")
    add("--batch_size", type=cli.positive_int, default=16, help="choices per forward pass")
    add("--device", type=cli.device, help="default: cuda if there is one, else cpu")
    add("--output", type=cli.path, help="folder of one JSON file per model and language (default: results/utility)")
    return parser.parse_args()


def document_limit(text: str) -> int | None:
    """A whole number >= 1, or None for `all`."""
    return None if text == "all" else cli.positive_int(text)


def main() -> None:
    arguments = parse_arguments()
    wrong = [name for name in IN_PLACE if (getattr(arguments, name) is None) != bool(arguments.safe_model)]
    if wrong and arguments.safe_model:
        raise UserError(f"--{wrong[0]} and --safe_model do not go together: that model is already steered")
    if wrong:
        raise UserError(f"--{wrong[0]} is missing; give it to steer in place, or --safe_model for a written model")
    if not arguments.safe_model:
        names = list(dict.fromkeys(language_names(arguments.language)))
        folder = paths.head_folder(arguments.head_folder)
        heads = {name: read_heads(folder / paths.language_file(name)) for name in names}
        factor = arguments.scaling_factor

    from tqdm import tqdm

    from soteria.grid import utility
    from soteria.models.loading import default_device, load_model, resolve_dtype
    from soteria.models.task_vector import TaskVector
    from soteria.steering.formula import head_list_hash, open_steering, steered_in_place

    base, tasks, limit = arguments.base_model, arguments.tasks, arguments.limit
    rows = {"test_split": arguments.test_split, "seed": arguments.seed}
    made, steerings = {}, {}
    if arguments.safe_model:
        name, factor = written_model(base, arguments.safe_model)
        names = [name]
    utility.check_tasks(tasks, names)
    if arguments.safe_model:
        made[name] = {"safe_sha256": utility.model_hash(arguments.safe_model), "scaling_factor": factor}
    else:
        vector = TaskVector.open(base, arguments.finetune_model)
        for name in names:
            steerings[name] = open_steering(vector, heads[name], factor, source=str(folder / paths.language_file(name)))
            made[name] = {"finetune_weights": vector.tuned.fingerprint, "scaling_factor": factor}
            made[name]["heads_sha256"] = head_list_hash(heads[name])
    output = arguments.output or paths.RESULTS / "utility"
    places = {name: paths.utility_file(output, base, name, factor) for name in (None, *names)}
    for place in places.values():
        outputs.check_json(place, "inputs")
    dtype = str(resolve_dtype("auto", arguments.device or default_device())).removeprefix("torch.")
    load = cache(lambda model: load_model(model, arguments.device))

    def measure(name: str | None) -> dict:
        """The base if no language is named, else its steered model."""
        options = {"limit": limit, "batch_size": arguments.batch_size, "languages": name and [name], **rows}
        loaded = load(arguments.safe_model if name and arguments.safe_model else base)
        if name not in steerings:
            return utility.measure_utility(loaded, tasks, **options)
        with steered_in_place(loaded, steerings[name]):
            return utility.measure_utility(loaded, tasks, **options)

    inputs = {
        name: utility.utility_inputs(base, tasks, limit, name and [name], dtype, **rows, **made.get(name, {}))
        for name in (None, *names)
    }
    found = {}
    for name in tqdm(inputs, desc="measuring", unit="model", disable=None):
        found[name] = utility.read_or_measure(places[name], inputs[name], lambda name=name: measure(name))
    print(f"{paths.model_slug(base)} and steered, lm-eval {utility.lm_eval_version()}, ± standard error")
    print_table([(name, factor, row) for name in names for row in utility.comparison_rows(found[None], found[name])])


def written_model(base: str, safe: str) -> tuple[str, float]:
    """Language and scaling factor of a steered model. Raises UserError if steer.py did not make it from the base."""
    from soteria.models.checkpoints import Checkpoint
    from soteria.steering.checkpoint import CheckpointFacts

    facts = read_noted(Path(safe) / paths.FACTS, CheckpointFacts)
    if facts.get("format") != "checkpoint":
        raise UserError(f"{safe} has no {paths.FACTS} of a steered checkpoint; make one with steer.py")
    if facts["base_weights"] != Checkpoint.open(base).fingerprint:
        raise UserError(f"{safe} was not made from {base!r}; give the --base_model it was made from")
    return facts["language"], facts["scaling_factor"]


def print_table(rows: list[tuple[str, float, dict]]) -> None:
    """Per language and task: base, safe, and safe minus base."""

    def shown(number: tuple[float, float | None], sign: str = "") -> str:
        value, error = number
        return f"{value:{sign}.4f}" + (f" ± {error:.4f}" if error is not None else "")

    width = max([4, *(len(row["task"]) for *_, row in rows)])
    form = f"{{:10}} {{:>7}} {{:{width}}} {{:8}} {{:>6}} {{:>16}} {{:>16}} {{:>17}}"
    print(form.format("language", "scaling", "task", "metric", "n", "base", "safe", "difference"))
    for language, factor, row in rows:
        measured = (shown(row["base"]), shown(row["safe"]), shown(row["difference"], "+"))
        print(form.format(language, f"{factor:g}", row["task"], row["metric"], row["n"], *measured))


if __name__ == "__main__":
    cli.run(main)
