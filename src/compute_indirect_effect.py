"""Step 1: score every attention head of a model on in-context-learning tasks.

Writes, per dataset, the indirect effect of each head on each prompt, the mean head activations behind it, and the
arguments. Finished datasets are skipped; an interrupted one resumes at its next prompt.
"""

import time
from argparse import ArgumentTypeError, Namespace
from functools import partial

from soteria import cli, disk
from soteria.errors import UserError
from soteria.scoring.notes import describe_first_tokens
from soteria.scoring.prompts import ANSWERS, WHOLE, expand_datasets
from soteria.scoring.run import ScoringSettings, score_datasets
from soteria.storage import paths


def json_object(text: str) -> dict[str, str]:
    """A JSON object of texts. Raises ArgumentTypeError for anything else."""
    try:
        value = disk.parse_json(text, f"{text!r:.80}")
    except UserError as error:
        raise ArgumentTypeError(str(error)) from None
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        raise ArgumentTypeError(f"{text!r:.80} must be a JSON object of texts")
    return value


def parse_arguments() -> Namespace:
    parser = cli.new_parser(
        __doc__,
        "python src/compute_indirect_effect.py --dataset_name '*_Hindi' --model_name data/models/polyglot-base",
    )
    add, default = parser.add_argument, ScoringSettings()
    add("--dataset_name", nargs="+", required=True, help="one or more <task>_<Language>, or globs such as '*_Hindi'")
    parser.add_model("--model_name", default=default.model_name, help=cli.MODEL)
    add("--root_data_dir", type=cli.path, default=default.root_data_dir, help="folder of <task>_<Language>.json")
    add("--save_path_root", type=cli.path, help="output folder (default: results/indirect_effect/<model slug>[_whole])")
    add(
        "--seed",
        type=cli.seed,
        default=default.seed,
        help="seed of python, numpy and torch, set once the model is loaded",
    )
    add(
        "--n_shots",
        type=cli.positive_int_up_to(cli.MOST_SHOTS),
        default=default.n_shots,
        help="demonstrations in a prompt",
    )
    trials = cli.positive_int_up_to(cli.MOST_TRIALS)
    add("--n_trials", type=trials, default=default.n_trials, help="prompts averaged, and prompts scored")
    add("--test_split", type=float, default=default.test_split, help="share of the rows not used as demonstrations")
    add("--device", type=cli.device, help="cpu, cuda, cuda:1 … (default: cuda if there is one, else cpu)")
    add(
        "--mean_activations_path",
        type=cli.path,
        help="a *_mean_head_activations.pt to use instead of computing the means",
    )
    add("--last_token_only", type=cli.truth, default=True, help="True: the last token; False: all ten token classes")
    answer = "the effect is on the probability of the answer's first token, as in the original, or of the whole answer"
    add("--answer", choices=ANSWERS, default=default.answer, help=answer)
    add("--prefixes", type=json_object, default=default.prefixes, help="JSON: input, output, instructions")
    add("--separators", type=json_object, default=default.separators, help="JSON: input, output, instructions")
    add("--max_rows", type=cli.positive_int, help="most tokens in a forward pass (default: from the free memory)")
    dtypes = ["auto", "float32", "float16", "bfloat16"]
    add("--dtype", choices=dtypes, default="auto", help="of the weights; auto: float32 on a CPU, else the checkpoint's")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    settings = ScoringSettings(**{name: value for name, value in vars(arguments).items() if name != "dataset_name"})
    datasets = expand_datasets(arguments.dataset_name, settings.root_data_dir)
    slug = paths.scored_slug(paths.model_slug(settings.model_name), whole=settings.answer == WHOLE)
    root = settings.save_path_root or paths.scores_folder(paths.RESULTS, slug)

    from soteria.models.loading import load_model  # transformers takes seconds to import: only for valid input
    from soteria.models.processes import Processes

    started = time.monotonic()
    with Processes(settings.device) as processes:
        load = partial(load_model, settings.model_name, processes.device, settings.dtype)
        runs, n_scored = score_datasets(settings, datasets, root, processes, load)
        if processes.is_first and n_scored < len(runs):
            print(f"{len(runs) - n_scored} of {len(runs)} datasets are finished already")
        if processes.is_first:
            for line in describe_first_tokens(root, datasets):
                print(line)
        if processes.is_first and n_scored:
            print(f"wrote {n_scored} datasets under {root} in {time.monotonic() - started:.1f} s")


if __name__ == "__main__":
    cli.run(main)
