"""Step 1: score every attention head of a model on in-context-learning tasks.

Writes, per dataset, the indirect effect of each head on each prompt, the mean head activations behind it, and the
arguments. A finished dataset is skipped, an interrupted one goes on at its next prompt.
"""

import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path

from soteria import cli
from soteria.scoring.prompts import PromptForm
from soteria.scoring.run import DatasetRun, Progress, expand_datasets, json_object
from soteria.storage import paths


def parse_arguments(words: Sequence[str] | None = None) -> Namespace:
    parser = cli.new_parser(
        __doc__,
        "python src/compute_indirect_effect.py --dataset_name '*_Hindi' --model_name data/models/polyglot-base",
    )
    add = parser.add_argument
    add("--dataset_name", nargs="+", required=True, help="one or more <task>_<Language>, or globs such as '*_Hindi'")
    add("--model_name", default="meta-llama/Llama-3.1-8B-Instruct", help="hub id or local folder")
    add("--root_data_dir", type=Path, default=paths.DATA / "icl", help="folder of <task>_<Language>.json")
    add("--save_path_root", type=Path, help="where to write (default: results/indirect_effect/<model slug>)")
    add("--seed", type=int, default=42, help="seed of python, numpy and torch, set once the model is loaded")
    add("--n_shots", type=cli.positive_int, default=10, help="demonstrations in a prompt")
    add("--n_trials", type=cli.positive_int, default=25, help="prompts averaged, and prompts scored")
    add("--test_split", type=float, default=0.3, help="share of the rows not used as demonstrations")
    add("--device", help="cpu, cuda, cuda:1 … (default: cuda if there is one, else cpu)")
    add("--mean_activations_path", type=Path, help="a *_mean_head_activations.pt to use instead of computing it")
    add("--last_token_only", type=cli.truth, default=True, help="True: the last token; False: all ten token classes")
    add("--prefixes", type=json_object, default=PromptForm().prefixes, help="JSON: input, output, instructions")
    add("--separators", type=json_object, default=PromptForm().separators, help="JSON: input, output, instructions")
    add("--max_rows", type=cli.positive_int, help="most tokens at once (default: from free memory; halved if too many)")
    add(
        "--dtype",
        choices=["auto", "float32", "float16", "bfloat16"],
        default="auto",
        help="of the weights; auto: float32 on a CPU, else the checkpoint's own",
    )
    return parser.parse_args(words)


def main() -> None:
    arguments = parse_arguments()
    expand_datasets(arguments.dataset_name, arguments.root_data_dir)

    # torch takes seconds to load: only once the input is sound
    from soteria.models.loading import load_model
    from soteria.models.processes import Processes

    with Processes(arguments.device) as processes:
        started = time.monotonic()
        runs, scored = score(
            arguments, processes, lambda: load_model(arguments.model_name, processes.device, arguments.dtype)
        )
        if processes.is_first:
            if scored < len(runs):
                print(f"{len(runs) - scored} of {len(runs)} datasets are finished already")
            if scored:
                root = runs[0].effect_file.parents[1]
                print(f"wrote {scored} datasets under {root} in {time.monotonic() - started:.1f} s")


def score(arguments: Namespace, processes, load: Callable) -> tuple[list[DatasetRun], int]:
    """Score what is not finished of the datasets named; gives all of them, and how many were scored now.

    `load` gives the model, if it is needed.
    """
    datasets = expand_datasets(arguments.dataset_name, arguments.root_data_dir)
    root = arguments.save_path_root or paths.scores_folder(paths.RESULTS, paths.model_slug(arguments.model_name))
    runs = [DatasetRun(dataset, root, arguments) for dataset in datasets]
    pending = [run for run in runs if not run.is_finished()]
    if pending:
        from soteria.scoring.sweep import ForkingSweep

        sweep = ForkingSweep(load())
        processes.wait()  # nobody writes before everybody has seen what is there
        progress = Progress(len(pending), silent=not processes.is_first)
        for run in pending:
            run.score(sweep, processes, progress)
        progress.close()
    return runs, len(pending)


if __name__ == "__main__":
    cli.run(main)
