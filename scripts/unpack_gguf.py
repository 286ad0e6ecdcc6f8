"""Write a model in a GGUF file, of any quantization, as an ordinary model folder in float32.

python scripts/unpack_gguf.py MODEL.gguf OUTPUT
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

from soteria import cli  # noqa: E402


def main() -> None:
    parser = cli.new_parser(__doc__, "python scripts/unpack_gguf.py model.gguf model")
    parser.add_argument("gguf", type=Path, help="file to read")
    parser.add_argument("output", type=Path, help="folder to write")
    arguments = parser.parse_args()

    from soteria.models.gguf import unpack

    n_parameters = unpack(arguments.gguf, arguments.output)
    print(f"wrote {arguments.output}: {n_parameters / 1e6:.0f} M parameters")


if __name__ == "__main__":
    cli.run(main)
