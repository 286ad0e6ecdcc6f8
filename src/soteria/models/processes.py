"""One task shared among the processes that `accelerate launch` or `torchrun` starts; without them, a single process."""

import os
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from soteria.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")


class Processes:
    """This process and its peers, as a context manager. All of them must make the same calls of `map` and `wait`."""

    def __init__(self, device: str | None):
        self.count, self.index, self.device, self._state = 1, 0, device, None
        size = os.environ.get("WORLD_SIZE") or "1"  # set by the launchers
        if not size.isdecimal():
            raise UserError(f"WORLD_SIZE is {size!r}; unset it, or start with torchrun or accelerate launch")
        if int(size) > 1:
            from accelerate import PartialState

            self._state = PartialState(cpu=device == "cpu")
            self.count, self.index = self._state.num_processes, self._state.process_index
            self.device = device or str(self._state.device)

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *_) -> None:
        if self._state:  # its threads sometimes abort a process if they are left to the interpreter's exit
            self._state.destroy_process_group()

    @property
    def is_first(self) -> bool:
        """Whether this process writes the files and reports to the user."""
        return self.index == 0

    def map(self, function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
        """Each item's result, in order, in every process. Each item is computed by one process."""
        if self.count == 1:
            yield from map(function, items)
            return
        from accelerate.utils import gather_object

        for start in range(0, len(items), self.count):
            own = items[start + self.index : start + self.index + 1]
            yield from gather_object([function(item) for item in own])

    def agree(self, value: Result) -> Result:
        """The first process's value, in every process."""
        return next(self.map(lambda _: value, [None]))

    def need_one(self, what: str) -> None:
        """Raise UserError where there are several: an engine shares the work itself."""
        if self.count > 1:
            raise UserError(f"{what} shares the work itself; start one process")

    def wait(self) -> None:
        """Wait for all processes to get here."""
        if self._state:
            self._state.wait_for_everyone()
