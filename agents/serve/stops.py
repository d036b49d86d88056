"""Stop texts of a request: where its answer ends, whatever pieces it comes in."""

from __future__ import annotations

from collections.abc import Sequence


class StopText:
    """The text of an answer up to the stop text that is complete first, which is not part of it.

    Attributes:
        matched: The stop text that ended it; None if none has.
        held: What is not given yet, as it may be the beginning of a stop text.
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        """Take the stop texts; with none everything is given as it comes."""
        self._stops = [stop for stop in stops if stop]
        self.matched: str | None = None
        self.held = ""

    def feed(self, piece: str) -> str:
        """Return what can be given now that another piece of the answer is there."""
        text = self.held + piece
        found = [(text.find(stop), stop) for stop in self._stops if stop in text]
        if found:  # not the one that begins first: whether it will be one, other pieces would not know yet
            end, self.matched = min(found, key=lambda each: (each[0] + len(each[1]), each[0]))
            self.held = ""
            return text[:end]
        begun = (
            size for stop in self._stops for size in range(min(len(stop) - 1, len(text)), 0, -1)
            if text.endswith(stop[:size])
        )  # fmt: skip
        keep = len(text) - max(begun, default=0)
        self.held = text[keep:]
        return text[:keep]

    def rest(self) -> str:
        """Return what was held back, at the end of the answer."""
        rest, self.held = self.held, ""
        return rest
