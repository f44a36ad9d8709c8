"""Computations as generators of the passes that they need, so that several can share the passes of one model."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, Protocol, TypeVar, cast

T = TypeVar("T")


class Pass(Protocol):
    """A pass of the model that a computation waits for."""

    def compute(self) -> Any:
        """Run the pass alone, and return its result."""
        ...


#: A computation that yields passes, and is sent the result of each or is thrown its error; it returns a T.
Passes = Generator[Pass, Any, T]


def drive(passes: Passes[T]) -> T:
    """Run a computation alone: compute the passes that it asks for, one after the other; return its result."""
    try:
        wanted = next(passes)
        while True:
            try:
                result = wanted.compute()
            except Exception as error:  # noqa: BLE001 - the computation decides whether it can continue
                wanted = passes.throw(error)
            else:
                wanted = passes.send(result)
    except StopIteration as end:
        return cast(T, end.value)
    finally:
        passes.close()


def no_passes(value: T) -> Passes[T]:
    """Return a computation that needs no passes, and whose result is ``value``."""
    return value
    yield  # makes this a generator


def finish(found: T | Passes[T]) -> Passes[T]:
    """Return the result of a function that may be a generator of passes, or an ordinary one that returned it."""
    return (yield from found) if isinstance(found, Generator) else found
