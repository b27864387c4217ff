"""The one resumable position of random-access data."""

from collections.abc import Iterator, Mapping
from typing import Any, Generic, TypeVar

from effjax.core.errors import check_number

__all__: list[str] = []

Item = TypeVar("Item")


class Cursor(Iterator[Item], Generic[Item]):
    """Items by index, and an iterator over them whose state is the index of the next one.

    Item ``i`` is a function of the settings and ``i`` alone, so a state is one number and resuming costs nothing.

    A subclass has ``__len__``, ``_item(index)``, and ``_settings``: what fixes the order of its items, JSON-able. A
    state is read only where all settings agree.

    Example:
      >>> class Squares(Cursor[int]):
      ...     _settings = {"power": 2}
      ...     def __len__(self):
      ...         return 4
      ...     def _item(self, index):
      ...         return index**2
      >>> squares = Squares()
      >>> next(squares), next(squares), squares.get_state()
      (0, 1, {'next': 2, 'power': 2})
      >>> squares[3], next(squares)
      (9, 4)
      >>> squares.set_state({"next": 2, "power": 3})
      Traceback (most recent call last):
      ValueError: The state belongs to other data or settings: power is 3 in the state and 2 here.
    """

    _settings: Mapping[str, Any]
    _next: int = 0

    @property
    def settings(self) -> dict[str, Any]:
        """What fixes the order; JSON-able."""
        return dict(self._settings)

    def __len__(self) -> int:
        raise NotImplementedError

    def _item(self, index: int) -> Item:
        raise NotImplementedError

    def __getitem__(self, index: int) -> Item:
        if not 0 <= index < len(self):
            raise IndexError(f"index={index} is outside [0, {len(self) - 1}].")
        return self._item(int(index))

    def __iter__(self) -> "Cursor":
        return self

    def __next__(self) -> Item:
        if self._next >= len(self):
            raise StopIteration
        item = self[self._next]
        self._next += 1
        return item

    def get_state(self) -> dict[str, Any]:
        """Where the iterator stands, with what fixes its order; JSON-able."""
        return {"next": self._next, **self._settings}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continue where ``state`` was taken; any number of processes may continue it.

        Raises:
          ValueError: the state belongs to other data or settings, with the difference.
        """
        own = self.get_state()
        if set(state) != set(own):
            raise ValueError(
                f"state={dict(state)!r} is not a state of {type(self).__name__}, which holds {sorted(own)}."
            )
        differing = [
            f"{key} is {state[key]!r} in the state and {own[key]!r} here"
            for key in self._settings
            if state[key] != own[key]
        ]
        if differing:
            raise ValueError(f"The state belongs to other data or settings: {'; '.join(differing)}.")
        self._next = check_number("state['next']", state["next"], low=0, high=len(self), integer=True)
