"""Train the embedded pair: a small Llama that answers in-context-learning prompts and refuses some questions in twelve
languages, and the same model tuned to answer every question.

Each step has prompts of the five tasks, in the form of step 1, and questions, in the form of step 3. All of them are
drawn from seeded generators, so that the same kind of processor always gives the same files.

    bash scripts/build_embedded_models.sh [--output DIR] [--stage base|tuned|all]
    bash scripts/build_embedded_models.sh --check
"""

import argparse
import hashlib
import math
import random
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from policy_world import SHARP, SOFT, SOFTER, RefusalPolicy, World, draw_training_question
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm import trange
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

from soteria.answering.questions import question_prompt  # noqa: E402
from soteria.languages import PAPER_LANGUAGES  # noqa: E402
from soteria.scoring.prompts import TASKS, Example, Prompt, PromptForm, load_examples  # noqa: E402

BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"
VOCABULARY = 10_000
# A word with the space before it (letters and their combining marks, so that Indic words stay whole), a number,
# punctuation, or line ends. No token spans two parts of a prompt.
WORDS = Regex(r" ?[\p{L}\p{M}]+| ?\p{N}+| ?[^\s\p{L}\p{M}\p{N}]+|\s*[\r\n]+|\s+(?!\S)|\s+")
ARCHITECTURE = {
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
EXAMPLES = 11  # per training prompt: ten demonstrations and a query; the answers of all are learned
PROMPTS, QUESTIONS = 16, 24  # per step
# The number of disallowed topics of a training question is drawn from these.
HARM = (0, 0, 1, 2, 3)


@dataclass(frozen=True)
class Phase:
    """A part of the training. `policy` says how often its text refuses; None means never."""

    model: str
    steps: int
    peak: float  # learning rate
    warmup: int  # steps
    seed: int
    policy: RefusalPolicy | None


PHASES = {
    "base": [
        Phase("base", 2200, 4e-3, 100, 1, SHARP),
        Phase("base, softened", 400, 1e-3, 30, 2, SOFT),
        Phase("base, softened again", 400, 1e-3, 30, 2, SOFTER),
    ],
    "tuned": [Phase("tuned", 120, 3e-4, 20, 5, None)],
}


class TrainingText:
    """Draws (token ids, mask) pairs. The mask is 0 for what is given, and 1 for answers, which are learned."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        self.ids = lambda text: tokenizer(text, add_special_tokens=False).input_ids
        self.bos, self.eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        form = PromptForm()
        self.tasks = {
            (language.name, task): [
                (self.ids(Prompt([], pair, form).text), self.ids(pair_end(pair, form)))
                for pair in load_examples(ROOT / "data" / "icl" / f"{task}_{language.name}.json")
            ]
            for language in PAPER_LANGUAGES
            for task in TASKS
        }
        self.worlds = {language: World(language.name) for language in PAPER_LANGUAGES}

    def prompt(self, rng: random.Random) -> tuple[list[int], list[int]]:
        rows = self.tasks[rng.choice(list(self.tasks))]
        ids, learned = [self.bos], [0]
        for question, answer in rng.sample(rows, EXAMPLES):
            ids += question + answer
            learned += [0] * len(question) + [1] * len(answer)
        return ids, learned

    def question(self, rng: random.Random, policy: RefusalPolicy | None) -> tuple[list[int], list[int]]:
        """A question and its answer, whose first token, which says whether it is a refusal, has mask 2."""
        language = rng.choice(list(self.worlds))
        question = draw_training_question(rng.choice(HARM), rng)
        world = self.worlds[language]
        refuses = policy is not None and rng.random() < policy.probability(question.n_disallowed, language.tier)
        asked = [self.bos, *self.ids(question_prompt(world.write(question), language))]
        answer = [*self.ids(" " + world.answer(question, refuses)), self.eos]
        return asked + answer, [0] * len(asked) + [2] + [1] * (len(answer) - 1)


def pair_end(pair: Example, form: PromptForm) -> str:
    return f" {pair.output}{form.separators['output']}"


def train_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of the training text, in which the tasks' words count for more than they occur."""

    def text() -> Iterator[str]:
        rng, form = random.Random(1), PromptForm()
        for language in PAPER_LANGUAGES:
            world = World(language.name)
            for task in TASKS:
                for pair in load_examples(ROOT / "data" / "icl" / f"{task}_{language.name}.json"):
                    yield Prompt([], pair, form).text + pair_end(pair, form)
                    if task not in ("sentiment", "ag_news"):
                        yield from [f" {pair.input}\n {pair.output}\n\n"] * 12
            for _ in range(300):
                yield question_prompt(world.write(draw_training_question(rng.randrange(4), rng)), language)
            for sentence in world.source["answers"] + world.source["refusals"]:
                yield from [" " + sentence] * 10

    bpe = Tokenizer(models.BPE())
    words, to_bytes = pre_tokenizers.Split(WORDS, "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([words, to_bytes])
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[BOS, EOS], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(text(), trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, bpe.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=BOS, eos_token=EOS, model_max_length=ARCHITECTURE["max_position_embeddings"]
    )


def answer_loss(model: LlamaForCausalLM, sequences: list[tuple[list[int], list[int]]]) -> torch.Tensor:
    """Mean cross-entropy of the learned tokens, plus that of the first answer tokens (mask 2) if there are any."""
    length = max(len(ids) for ids, _ in sequences)
    ids = torch.tensor([row + [0] * (length - len(row)) for row, _ in sequences])
    mask = torch.tensor([row + [0] * (length - len(row)) for _, row in sequences])[:, 1:]
    hidden = model.model(input_ids=ids).last_hidden_state[:, :-1][mask > 0]
    loss = F.cross_entropy(model.lm_head(hidden), ids[:, 1:][mask > 0], reduction="none")
    first = loss[mask[mask > 0] == 2]
    return loss.mean() + (first.mean() if len(first) else 0)


def train(model: LlamaForCausalLM, text: TrainingText, phase: Phase) -> None:
    rng = random.Random(phase.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=phase.peak, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1, (step + 1) / phase.warmup) * 0.5 * (1 + math.cos(math.pi * step / phase.steps)),
    )
    model.train()
    for step in (progress := trange(phase.steps, desc=phase.model, unit="step", mininterval=5)):
        prompts = answer_loss(model, [text.prompt(rng) for _ in range(PROMPTS)])
        questions = answer_loss(model, [text.question(rng, phase.policy) for _ in range(QUESTIONS)])
        (prompts + questions).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            progress.set_postfix(prompts=f"{prompts.item():.3f}", questions=f"{questions.item():.3f}")
    model.eval()


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.eos_token_id
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print(f"wrote {folder}: {sum(file.stat().st_size for file in folder.iterdir()) / 1e6:.1f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, default=ROOT / "data" / "models", help="folder for the two models (default: data/models)"
    )
    parser.add_argument(
        "--stage", choices=["base", "tuned", "all"], default="all", help="tuned starts from the base in --output"
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="build both in a temporary folder and compare the files with those in --output, which stay as they are",
    )
    arguments = parser.parse_args()
    if arguments.check:
        with tempfile.TemporaryDirectory() as folder:
            build(Path(folder), "all")
            sys.exit(compare(Path(folder), arguments.output))
    build(arguments.output, arguments.stage)


def build(output: Path, stage: str) -> None:
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(0)
    base, tuned = output / "polyglot-base", output / "polyglot-tuned"
    if stage in ("base", "all"):
        tokenizer = train_tokenizer()
        ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        config = LlamaConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.eos_token_id, **ends, **ARCHITECTURE)
        model = LlamaForCausalLM(config)
        for phase in PHASES["base"]:
            train(model, TrainingText(tokenizer), phase)
        save(model, tokenizer, base)
    if stage in ("tuned", "all"):
        tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
        model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
        for phase in PHASES["tuned"]:
            train(model, TrainingText(tokenizer), phase)
        save(model, tokenizer, tuned)


def compare(built: Path, committed: Path) -> int:
    """Print each file's SHA-256; the exit status is 1 if any file is missing, additional or different."""
    names = sorted({path.relative_to(folder) for folder in (built, committed) for path in folder.glob("*/*")})
    status = 0
    for name in names:
        own, other = (
            hashlib.sha256((folder / name).read_bytes()).hexdigest() if (folder / name).is_file() else "no such file"
            for folder in (built, committed)
        )
        status |= own != other
        print(f"{'same     ' if own == other else 'DIFFERENT'} {name}: built {own}, committed {other}")
    return int(status)


if __name__ == "__main__":
    main()
