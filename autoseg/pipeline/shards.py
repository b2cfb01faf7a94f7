"""Parts of a list of cases, for schedulers that start the same command several times."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from autoseg.errors import ConfigError

T = TypeVar("T")

_TEXT = re.compile(r"(\d+)/(\d+)")


@dataclass(frozen=True, slots=True)
class Shard:
    """One of several parts.

    Attributes:
        number: From 1.
        count: Of all parts.
    """

    number: int = 1
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Read "1/4".

        Raises:
            ConfigError: It is no such text, or there is no such part.
        """
        found = _TEXT.fullmatch(text)
        if found is None or not 1 <= int(found[1]) <= int(found[2]):
            raise ConfigError(
                f"--shard needs I/N with I from 1 to N, got {text!r}", hint="As in --shard 1/4, 2/4, 3/4 and 4/4."
            )
        return cls(int(found[1]), int(found[2]))

    def of(self, items: Sequence[T]) -> tuple[T, ...]:
        """Every N-th item from the I-th: parts differ by one item at most, whatever was done before.

        Neighbours in a list of names tend to be alike in size, so that parts are alike too.
        """
        return tuple(items[self.number - 1 :: self.count])
