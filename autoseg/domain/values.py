"""The base of every serialised value: frozen, no unknown keys, canonical JSON, digests."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    SerializationInfo,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
)

from autoseg.errors import AutosegError, ConfigError

DIGEST_LENGTH = 12
"""Hex digits of a digest: 48 bits, far beyond the number of plans anybody compares."""


EVERY_FIELD = "every field"
"""As `model_dump(context=EVERY_FIELD)`: later fields are written with their defaults too."""


class Value(BaseModel):
    """A frozen value; unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def to_json(self) -> str:
        """Indented JSON with a final newline, keys in the order of the fields."""
        return json.dumps(self.model_dump(mode="json"), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str | Path, error: type[AutosegError] = ConfigError) -> Self:
        """Read the value from JSON text.

        Args:
            text: The JSON.
            where: File or key, for messages.
            error: The kind of error to raise.

        Raises:
            AutosegError: Of kind `error`: not JSON, or unknown, missing or wrong keys, all listed.
        """
        try:
            return cls.model_validate_json(text)
        except ValidationError as problem:
            raise error(f"{where} is not a valid {cls.__name__}", problems=validation_problems(problem)) from None


class GrownValue(Value):
    """A value with fields that came later: where they have their defaults they are not written.

    So files and digests are those of values that never knew of them, and models of an older version stay valid.

    Attributes:
        LATER_FIELDS: Their names.
    """

    LATER_FIELDS: ClassVar[tuple[str, ...]]

    @model_serializer(mode="wrap")
    def _leave_out_defaults(self, write: SerializerFunctionWrapHandler, how: SerializationInfo) -> dict[str, Any]:
        data: dict[str, Any] = write(self)
        if how.context == EVERY_FIELD:
            return data
        for name in self.LATER_FIELDS:
            if getattr(self, name) == type(self).model_fields[name].default:
                data.pop(name, None)
        return data


def validation_problems(problem: ValidationError) -> tuple[str, ...]:
    """One line a problem: where, what, and what was got."""
    lines = []
    for item in problem.errors(include_url=False):
        where = ".".join(str(part) for part in item["loc"]) or "(top level)"
        got = "" if item["type"] == "missing" else f" (got {str(item.get('input'))[:80]!r})"
        lines.append(f"{where}: {item['msg']}{got}")
    return tuple(lines)


def digest_of(data: Any) -> str:
    """The digest of anything JSON can hold, independent of key order."""
    canonical = json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:DIGEST_LENGTH]
