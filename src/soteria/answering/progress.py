"""A progress bar over the tokens of answers, whose number is known only when the last one has ended."""

from collections.abc import Sequence

from tqdm import tqdm


class AnswerProgress(tqdm):
    """Tokens generated, of those expected, and so the time left.

    Answers that are being generated count with their limits, those not begun with the mean of those finished, or with
    `longest` before there are any. `share` is how many processes do the same work on other questions.
    """

    def __init__(self, n_answers: int, longest: int, *, share: int = 1, **options):
        self._waiting, self._running, self._longest, self._share = n_answers, 0, longest, share
        self._finished = self._tokens = 0
        super().__init__(unit="token", smoothing=0, total=n_answers * longest, **options)

    def begin(self, limits: Sequence[int]) -> None:
        """Begin a batch of answers of at most so many tokens."""
        self._waiting = max(0, self._waiting - self._share * len(limits))
        self._running = self._share * sum(limits)

    def step(self, n_tokens: int, ended: Sequence[tuple[int, int]] = ()) -> None:
        """Count new tokens, and the answers that ended with them: the length and the limit of each."""
        self._running -= self._share * (n_tokens + sum(limit - length for length, limit in ended))
        self._finished += len(ended)
        self._tokens += sum(length for length, _ in ended)
        expected = self._tokens / self._finished if self._finished else self._longest
        self.total = round(self.n + self._share * n_tokens + self._running + self._waiting * expected)
        self.update(self._share * n_tokens)
