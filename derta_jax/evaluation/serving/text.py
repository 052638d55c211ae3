"""The text of an answer as its tokens come, up to where a stop string begins."""

from collections.abc import Sequence

from derta_jax.interop.tokenizer import Tokenizer


class AnswerText:
    """Joined, what `add` and `finish` give is the answer decoded as a whole, cut off before the first stop string.

    What may yet become another character, or the beginning of a stop string, is held back.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()):
        self._tokenizer, self._stops = tokenizer, stops
        self._token_ids: list[int] = []
        self._given = 0
        self.stopped = False

    @property
    def tokens(self) -> int:
        """How many there are, up to the one that completed a stop string."""
        return len(self._token_ids)

    def add(self, token_ids: Sequence[int]) -> str:
        """The text that is certain by now and was not before."""
        before = len(self._token_ids)
        self._token_ids += token_ids
        text = self._tokenizer.decode_settled(self._token_ids)
        if stop := self._first_stop(text):
            start, string = stop
            self._forget_after(string, before)
            return self._give(text[:start])
        return self._give(text[: len(text) - self._begun(text)])

    def finish(self) -> str:
        """What was held back, when no more tokens come."""
        text = self._tokenizer.decode(self._token_ids)
        if stop := self._first_stop(text):
            text = text[: stop[0]]
            self.stopped = True
        return self._give(text)

    def _give(self, text: str) -> str:
        new = text[self._given :]
        self._given += len(new)
        return new

    def _first_stop(self, text: str) -> tuple[int, str] | None:
        """Where the stop string begins that is complete first, and which it is."""
        found = [(text.find(stop, self._given), stop) for stop in self._stops]
        return min((each for each in found if each[0] >= 0), key=lambda each: each[0] + len(each[1]), default=None)

    def _begun(self, text: str) -> int:
        """How many characters at the end may be the beginning of a stop string."""
        longest = max(map(len, self._stops), default=1) - 1
        for length in range(min(longest, len(text) - self._given), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0

    def _forget_after(self, stop: str, count: int) -> None:
        """Leave out the tokens behind the one that completed `stop`, which is not among the first `count`."""
        while stop not in self._tokenizer.decode_settled(self._token_ids[:count])[self._given :]:
            count += 1
        del self._token_ids[count:]
        self.stopped = True
