"""What an engine serves for the cells of a grid: the base, and of each steered cell a folder that is written for it."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from soteria.answering.engines import Engine, ServerEngine, make_engine
from soteria.grid.grid_file import Grid
from soteria.steering.adapter import write_adapter
from soteria.steering.checkpoint import steer_checkpoint
from soteria.steering.formula import Steering


def write_model(steering: Steering, folder: Path, language: str) -> None:
    """Write a steering, exactly: as a LoRA where the tuned model is one, else as a whole checkpoint.

    A folder made from the same inputs is kept. Raises UserError for one made from others.
    """
    if steering.vector.tuned.is_adapter:
        write_adapter(steering, folder, language=language, rank=1, max_error=1.0)  # both matter for checkpoints only
    else:
        steer_checkpoint(steering, folder, language=language)


class Serving:
    """The engine of a grid. Raises UserError as `make_engine`."""

    def __init__(self, grid: Grid):
        self._engine = make_engine(grid.answers.engine, "{cell}", grid.answers.concurrency)
        if not isinstance(self._engine, ServerEngine):
            self._engine = replace(self._engine, dtype=grid.dtype)

    @contextmanager
    def of(self, base: str, cell: str, steering: Steering | None, folder: Path, language: str) -> Iterator[Engine]:
        """The engine with a cell's model, for the length of a block; without a steering that is the base.

        A server has the cell under its name. For vLLM in this process, it is written to `folder` and removed again.
        """
        if isinstance(self._engine, ServerEngine):
            yield replace(self._engine, served=self._engine.served.replace("{cell}", cell) if steering else base)
        elif not steering:
            yield replace(self._engine, model=base)
        else:
            is_kept = folder.exists()
            write_model(steering, folder, language)
            adapter = steering.vector.tuned.is_adapter
            try:
                yield (
                    replace(self._engine, model=base, adapter=folder)
                    if adapter
                    else replace(self._engine, model=str(folder))
                )
            finally:
                if not is_kept:
                    shutil.rmtree(folder)
