"""Tables of what can be chosen by name: tasks, architectures, optimizers. Other packages may add to them.

An entry may be given as "module:attribute", which is imported when it is first asked for, so that a command line is
checked without importing torch.
"""

from __future__ import annotations

import pkgutil
from typing import Generic, TypeVar, cast

from engine.errors import UserError

Entry = TypeVar("Entry")


class Registry(Generic[Entry]):
    """Entries by the name that the configuration gives them."""

    def __init__(self, field: str, entries: dict[str, Entry | str]) -> None:
        """Args: field is the option that names an entry, such as optim.name."""
        self.field = field
        self._entries: dict[str, Entry | str] = dict(entries)

    @property
    def names(self) -> tuple[str, ...]:
        """The names that the option takes."""
        return tuple(self._entries)

    def register(self, name: str, entry: Entry | str) -> None:
        """Add an entry.

        Raises:
            ValueError: the name is taken.
        """
        if name in self._entries:
            raise ValueError(f"{self.field}: {name!r} is registered already")
        self._entries[name] = entry

    def remove(self, name: str) -> None:
        """Take an entry away again, as a test does with its own."""
        del self._entries[name]

    def check(self, name: str) -> None:
        """Refuse a name that nothing is registered under.

        Raises:
            UserError: names the option and its choices.
        """
        if name not in self._entries:
            raise UserError(f"{self.field}: {name!r} is not allowed; choose one of {', '.join(self.names)}")

    def get(self, name: str) -> Entry:
        """The entry of a name, imported if need be.

        Raises:
            UserError: as `check` does.
        """
        self.check(name)
        entry = self._entries[name]
        if isinstance(entry, str):
            entry = self._entries[name] = cast(Entry, pkgutil.resolve_name(entry))
        return entry
