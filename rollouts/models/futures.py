"""From one future to another: what backends answer becomes steps and scores."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from rollouts.errors import RequestFailed

T = TypeVar("T")


def forward(
    source: Future[T],
    take: Callable[[T], None],
    target: Future[Any],
    refused: Callable[[RequestFailed], None] | None = None,
) -> None:
    """Hand the result of `source` to `take`, which sees to `target`.

    An exception, of `source` or of `take`, becomes that of `target`. Cancelling one of the two cancels the other.

    Args:
        source: What is waited for.
        take: Called with its result, in the thread that sets it; sets the result of `target` or asks for more.
        target: What somebody else waits for.
        refused: Called instead of `take` if the request failed on its own; default: that is an exception like others.
    """

    def done(_: Future[T]) -> None:
        if source.cancelled():
            target.cancel()
        elif not target.done():
            error = source.exception()
            try:
                if refused is not None and isinstance(error, RequestFailed):
                    refused(error)
                else:
                    take(source.result())
            except BaseException as error:  # whatever it is, it belongs to whoever waits
                if not target.done():  # else whoever waited gave up in this moment
                    target.set_exception(error)

    target.add_done_callback(lambda _: source.cancel() if target.cancelled() else None)
    source.add_done_callback(done)


def settled(result: T) -> Future[T]:
    """Return a future that has its result."""
    future: Future[T] = Future()
    future.set_result(result)
    return future
