"""Step 0: fine-tune a model by LoRA on prompts and answers, in the form in which step 3 asks its questions.

Steps 1 to 3 make a model safer with a twin of it that was tuned to be less safe: the difference of the two is the task
vector that steering subtracts. This makes the twin, from data that you bring. Only the tokens of answers and the end
token have a loss. Writes a PEFT adapter, or a whole model with --merge. An interrupted run resumes from its last saved
step. Under `accelerate launch` or `torchrun`, the processes share the batches.
"""

import argparse
import sys
from dataclasses import fields
from pathlib import Path

from soteria import cli
from soteria.answering.question_files import find_local
from soteria.answering.questions import read_pairs
from soteria.languages import find_language, language_names
from soteria.models.processes import Processes
from soteria.storage import outputs, paths


def layer_range(text: str) -> tuple[int, int]:
    """The first and the last layer of `FIRST-LAST`."""
    first, dash, last = text.partition("-")
    if not (dash and first.isdecimal() and last.isdecimal() and int(first) <= int(last)):
        raise argparse.ArgumentTypeError(f"{text!r} must be FIRST-LAST, such as 0-15")
    return int(first), int(last)


def parse_arguments():
    parser = cli.new_parser(
        __doc__,
        "python src/finetune.py --base_model data/models/polyglot-base --dataset pairs.jsonl --language Hindi "
        "--output results/models/polyglot-tuned",
    )
    add = parser.add_argument
    parser.add_model("--base_model", required=True, help=f"the model to tune: {cli.MODEL}")
    add("--dataset", required=True, help="CSV, JSON, JSONL or Parquet file, or a hub dataset id or folder")
    language_help = "names or codes of the prompts' languages, or all for the paper's twelve; rows whose column "
    add("--language", nargs="+", default=["English"], help=language_help + "`language` has another are skipped")
    output_help = "folder to write; an unfinished run is in <output>.partial"
    add("--output", type=cli.output_folder, required=True, help=output_help)
    add("--merge", action="store_true", help="write the whole model, in the base's dtype, instead of the adapter")
    prompt_help = "column of the prompts (default: question, Question, prompt, or the language's)"
    add("--prompt_column", help=prompt_help)
    add("--answer_column", help="column of the answers (default: answer, Answer, response, output or completion)")
    add("--split", help="split of a hub dataset (default: the language's own, else the first)")
    add("--subset", help="subset of a hub dataset (default: the language's own, else the default)")
    add("--rank", type=cli.positive_int_up_to(cli.MOST_RANK), default=16, help="rank of the LoRA")
    add("--alpha", type=cli.positive_int, default=32, help="alpha of the LoRA; its weights are scaled by alpha / rank")
    modules_help = "names of the linear layers to change, or all-linear for all but the output embedding"
    add("--target_modules", nargs="+", default=["all-linear"], help=modules_help)
    add("--layers", type=layer_range, metavar="FIRST-LAST", help="layers to change, from 0 (default: all)")
    add("--learning_rate", type=cli.positive_number, default=2e-4, help="highest rate; it falls linearly to 0")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=cli.positive_int, default=1, help="passes over the data")
    length.add_argument("--max_steps", type=cli.positive_int, help="optimizer steps, instead of --epochs")
    add("--batch_size", type=cli.positive_int, default=8, help="pairs per process and forward pass")
    add("--gradient_accumulation", type=cli.positive_int, default=1, help="forward passes per optimizer step")
    add("--warmup_steps", type=cli.whole_number, default=0, help="optimizer steps in which the rate rises from 0")
    tokens_help = "longest prompt with its answer, in tokens; longer answers are cut, longer prompts left out"
    add("--max_tokens", type=cli.positive_int, default=1024, help=tokens_help)
    add("--save_steps", type=cli.positive_int, default=50, help="optimizer steps between saved states")
    add("--seed", type=cli.seed, default=42, help="of the adapter's first weights and the order of the data")
    dtype_help = "of the base in memory; auto: bfloat16 on a GPU, float32 on a CPU; the adapter is float32"
    add("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto", help=dtype_help)
    add("--chat_template", action="store_true", help="ask through the tokenizer's chat template")
    device_help = "default: cuda if available; CUDA_VISIBLE_DEVICES chooses among GPUs"
    add("--device", choices=["cpu", "cuda"], help=device_help)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    outputs.check_folder(arguments.output, "pairs_sha256", "a fine-tuned model")
    partial = paths.partial_folder(arguments.output)
    outputs.check_folder(partial, "pairs_sha256", "an unfinished fine-tuning", paths.PARTIAL_FACTS, ["checkpoint-*"])
    languages = [find_language(name) for name in dict.fromkeys(language_names(arguments.language))]
    columns = {"prompt_column": arguments.prompt_column, "answer_column": arguments.answer_column}
    pairs = read_pairs(arguments.dataset, languages, split=arguments.split, subset=arguments.subset, **columns)
    local = find_local(arguments.dataset)

    # torch takes seconds to import, so the data is checked first
    from soteria.answering.fine_tuning import fine_tune
    from soteria.answering.training_rows import FineTuning
    from soteria.models.loading import check_chat_template

    if arguments.chat_template:
        check_chat_template(arguments.base_model, "--chat_template")
    arguments.target_modules = tuple(arguments.target_modules)
    settings = FineTuning(**{field.name: getattr(arguments, field.name) for field in fields(FineTuning)})
    with Processes(arguments.device) as processes:
        facts = fine_tune(
            arguments.base_model,
            pairs,
            settings,
            arguments.output,
            processes,
            dataset=local.resolve().name if local else arguments.dataset,
            merge=arguments.merge,
            save_steps=arguments.save_steps,
        )
        if processes.is_first:
            report(arguments.output, facts)


def report(output: Path, facts: dict) -> None:
    for key, what in (("rows_left_out", "prompts left out"), ("answers_cut", "answers cut")):
        if facts[key]:
            print(f"{facts[key]} {what}: longer than --max_tokens {facts['max_tokens']}", file=sys.stderr)
    if not facts["output_projections"]:
        print("no output projection was changed, which is what steer.py needs", file=sys.stderr)
    losses = f"loss {facts['first_loss']:.3f} to {facts['last_loss']:.3f} nats per token"
    print(f"{output}: {facts['format']}, {facts['rows']} pairs, {facts['steps']} steps, {losses}")


if __name__ == "__main__":
    cli.run(main)
