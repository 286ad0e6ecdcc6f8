"""Write a model in a GGUF file, of any quantization, as an ordinary model folder in float32.

python scripts/unpack_gguf.py MODEL.gguf OUTPUT
"""

import argparse
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

from soteria.storage import files  # noqa: E402


def unpack(gguf: Path, output: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # The weights are plain numbers now: without its quantizer's marks, transformers saves and loads them as such.
    del model.config.quantization_config
    model.is_quantized = False
    model.hf_quantizer = None
    with files.whole_folder(output) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    print(f"wrote {output}: {sum(parameter.numel() for parameter in model.parameters()) / 1e6:.0f} M parameters")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf", type=Path, help="file to read")
    parser.add_argument("output", type=Path, help="folder to write")
    arguments = parser.parse_args()
    unpack(arguments.gguf, arguments.output)
