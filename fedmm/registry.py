"""Leaves that a config can choose by name: encoders, fusions, heads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from fedmm.errors import ConfigError

T = TypeVar("T")


class Registry(Generic[T]):
    """Name to constructor. `@images.register("cnn")` beside the class; `images.get(name)` where a config is read."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        def add(entry: T) -> T:
            if name in self._entries:
                raise ValueError(f"{self.kind} {name!r} is registered twice")
            self._entries[name] = entry
            return entry

        return add

    def get(self, name: str) -> T:
        """Raises: ConfigError that lists the known names."""
        if name not in self._entries:
            raise ConfigError(f"unknown {self.kind} {name!r}", fix=f"choose one of {', '.join(self.names())}")
        return self._entries[name]

    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self._entries))
