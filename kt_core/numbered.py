"""Objects by number: custom operators take tensors and numbers, so a kernel is named by one."""

from __future__ import annotations

import itertools
from typing import Generic, TypeVar
from weakref import WeakValueDictionary

T = TypeVar("T")


class Numbered(Generic[T]):
    """Gives out numbers, and finds what they were given to. Keeps nothing alive.

    An operator is global, and so are the numbers it is given: hence a module that defines one has
    one of these, too.
    """

    def __init__(self, what: str) -> None:
        """Take the word for what is numbered, for the error."""
        self._what = what
        self._found: WeakValueDictionary[int, T] = WeakValueDictionary()
        self._next = itertools.count()

    def number_of(self, thing: T) -> int:
        """Return a number that ``get`` takes as long as the thing lives."""
        number = next(self._next)
        self._found[number] = thing
        return number

    def get(self, number: int) -> T:
        """Return what has the number.

        Raises:
            RuntimeError: It is gone.
        """
        thing = self._found.get(number)
        if thing is None:
            msg = (
                f"the {self._what} numbered {number} are gone: the layer was deleted before its "
                "gradient"
            )
            raise RuntimeError(msg)
        return thing
