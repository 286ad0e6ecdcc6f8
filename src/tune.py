"""Scaling factor and number of heads, tuned per language on the validation questions with Optuna.

Two objectives are minimized at once: ASR on the policy questions, and how far the first token of benign answers moves
(KL from the base, in nats). Printed are the Pareto front and the chosen point: the lowest ASR within the limits on
refusals, lost accuracy and changed answers. Everything runs on one loaded base model that is steered in place. An
interrupted run resumes where it was, and more trials continue from those before.
"""

from argparse import ArgumentTypeError
from pathlib import Path

from soteria import cli
from soteria.answering.questions import read_questions
from soteria.errors import UserError
from soteria.grid.limits import Limits
from soteria.languages import find_language, language_names
from soteria.scoring.heads import mean_effect, rank_heads
from soteria.scoring.prompts import TASKS
from soteria.storage import outputs, paths


def fraction(text: str) -> float:
    """A number from 0 to 1."""
    try:
        number = float(text)
    except ValueError:
        raise ArgumentTypeError(f"{text!r} is not a number") from None
    if not 0 <= number <= 1:
        raise ArgumentTypeError(f"{text} is not between 0 and 1")
    return number


def parse_arguments():
    parser = cli.new_parser(
        __doc__,
        "python src/tune.py --finetune_model data/models/polyglot-tuned --base_model data/models/polyglot-base "
        "--language Hindi --trials 40",
    )
    add, limits = parser.add_argument, Limits()
    cli.add_pair(parser)
    add("--language", nargs="+", required=True, help="names or codes, or `all` for the paper's twelve")
    add("--results", type=cli.path, help="the scores that step 1 wrote (default: results/indirect_effect/<base slug>)")
    add("--policy", default="policy-validation", help="question set under data/prompts, as <name>_<Language>.csv")
    add("--benign", default="everyday-validation", help="question set under data/benign, as <name>_<Language>.csv")
    add("--trials", type=cli.positive_int_up_to(cli.MOST_TRIALS), default=40, help="points measured per language")
    add("--seed", type=cli.seed, default=0, help="seed of the points drawn; the first ten are drawn anywhere")
    add("--min_scaling", type=cli.scaling_factor, default=0.5, help="lowest scaling factor")
    add("--max_scaling", type=cli.scaling_factor, default=10.0, help="highest scaling factor")
    add("--shares", nargs=2, type=float, default=[0.05, 1.0], metavar=("LOW", "HIGH"), help="shares of all heads")
    refusals = "share of benign questions the chosen point may refuse beyond the base"
    add("--max_refusals", type=fraction, default=limits.max_refusals, help=refusals)
    loss = "in-context accuracy it may lose, 0.02 being 2 points"
    add("--max_accuracy_loss", type=fraction, default=limits.max_accuracy_loss, help=loss)
    changes = "share of benign answers it may change"
    add("--max_changes", type=fraction, default=limits.max_changes, help=changes)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    names = language_names(arguments.language)
    slug = paths.model_slug(arguments.base_model)
    scores = arguments.results or paths.scores_folder(paths.RESULTS, slug)
    for name in names:
        outputs.check_json(paths.tuning_file(paths.RESULTS, slug, name), "trials", mend="move it elsewhere")

    from tqdm import tqdm

    from soteria.grid.tuning import Bench, Space, SteeredBench, Tuning
    from soteria.judging.costs import read_tasks
    from soteria.judging.judges import judge_basis
    from soteria.judging.refusal import RefusalJudge
    from soteria.models.checkpoints import model_digest
    from soteria.models.loading import load_model
    from soteria.models.task_vector import TaskVector
    from soteria.scoring.notes import scored_split
    from soteria.steering.formula import open_steering

    space = Space((arguments.min_scaling, arguments.max_scaling), tuple(arguments.shares), arguments.seed)
    limits = Limits(**{name: getattr(arguments, name) for name in Limits.model_fields})
    vector = TaskVector.open(arguments.base_model, arguments.finetune_model)
    digest = model_digest(vector.base)
    effects = {name: mean_effect(scores, name, list(TASKS), digest) for name in names}
    for name, effect in effects.items():
        if sorted(rank_heads(effect)) != vector.geometry.all_heads:
            raise UserError(f"{scores} has other heads in {name} than the base, which has {vector.geometry}")

    def bench(name: str) -> Bench:
        language = find_language(name)
        asked = (
            read_questions(str(paths.DATA / folder / f"{each}_{name}.csv"), language).questions
            for folder, each in (("prompts", arguments.policy), ("benign", arguments.benign))
        )
        split = scored_split(scores, [f"{task}_{name}" for task in TASKS])
        return Bench(language, *asked, read_tasks(paths.DATA / "icl", TASKS, language, *split))

    benches = {name: bench(name) for name in names}
    tunings = {
        name: Tuning(
            paths.tuning_file(paths.RESULTS, slug, name),
            {
                "base_model": paths.model_name(arguments.base_model),
                "base_weights": vector.base.fingerprint,
                "finetune_model": paths.model_name(arguments.finetune_model),
                "finetune_weights": vector.tuned.fingerprint,
                "language": name,
                "policy": Path(arguments.policy).name,
                "benign": Path(arguments.benign).name,
                "questions_sha256": benches[name].sha256(),
                "judge": RefusalJudge.description,
                "judge_basis_sha256": judge_basis("refusal"),
            },
            space,
            rank_heads(effects[name]),
            arguments.trials,
            limits,
        )
        for name in names
    }
    found = {name: tuning.finished() for name, tuning in tunings.items()}
    pending = [name for name, result in found.items() if result is None]
    if pending:
        for name in pending:  # refused before anything is measured
            open_steering(vector, tunings[name].ranking, 0.0, source=f"the ranking in {scores}")
        loaded = load_model(arguments.base_model)
        with tqdm(total=len(pending) * arguments.trials, desc="tuning", unit="trial", disable=None) as bar:
            for name in pending:
                found[name] = tunings[name].run(SteeredBench(loaded, vector, benches[name]).measure, bar.update)
    for name, result in found.items():
        print_front(name, result, len(tunings[name].ranking))
    print(f"Note: {next(iter(found.values()))['note']}.")


def print_front(language: str, result: dict, n_heads: int) -> None:
    """The base, the Pareto front by ASR, and the chosen point: rates, and the divergence in nats."""
    from soteria.grid.tuning import RATES

    chosen = result["chosen"] or {"number": None}
    base = {rate: value["value"] for rate, value in result["base"].items()}
    rows = [
        base | {"number": "base", "scaling_factor": 0.0, "n_heads": 0},
        *(result["trials"][i] for i in result["front"]),
    ]
    if chosen["number"] not in (None, *result["front"]):
        rows.append(chosen)  # only points that cost too much beat it
    print(f"{language}: {result['n_trials']} trials on {result['policy']} and {result['benign']}, {result['judge']}")
    form = "{:>6} {:>8} {:>6} {:>7} {:>15} {:>8} {:>13} {:>13} {}"
    titles = ("trial", "scaling", "heads", "ASR", "benign refused", "changed", "KL from base", "ICL accuracy", "")
    print(form.format(*titles).rstrip())
    for row in rows:
        asr, refused, changed, right = (f"{row[rate]:.1%}" for rate in RATES)
        mark = "<- chosen" if row["number"] == chosen["number"] else ""
        scaling, divergence = f"{row['scaling_factor']:.3g}", f"{row['kl_first_token']:.4f}"
        print(
            form.format(row["number"], scaling, row["n_heads"], asr, refused, changed, divergence, right, mark).rstrip()
        )
    if not result["chosen"]:
        print(f"chosen: none, {result['why_none']}")
        return
    print(
        f"chosen: --scaling_factor {chosen['scaling_factor']} with the top {chosen['n_heads']} of {n_heads} heads "
        f"(select_heads.py --top {chosen['n_heads']})"
    )


if __name__ == "__main__":
    cli.run(main)
