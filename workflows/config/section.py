"""The base class of all sections of the configuration."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from workflows.errors import brief

LARGEST = 2**63 - 1
"""The largest signed 64-bit integer."""


SEEDS = 2**32 - 1
"""The largest seed that every library accepts, NumPy included."""


MOST_STEPS = 2**24
"""Most sampling steps: float32 can't tell more times apart."""


Steps = Annotated[int, Field(ge=1, le=MOST_STEPS)]


def _takes(annotation: Any, kind: type) -> bool:
    """Whether a field of this type takes values of this kind."""
    return annotation is kind or any(_takes(part, kind) for part in get_args(annotation))


class Section(BaseModel):
    """Numbers are finite, integers fit 64 bits, booleans are not numbers, and strings are not empty. Unknown fields are refused.

    `OPTIONS` names the fields that a method or a network added (assembly.py).
    """

    OPTIONS: ClassVar[tuple[str, ...]] = ()

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _sound(cls, value: Any, info: ValidationInfo) -> Any:
        annotation = cls.model_fields[str(info.field_name)].annotation
        for one in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(one, bool) and not _takes(annotation, bool):
                raise ValueError(f"{str(one).lower()} should be a {'text' if _takes(annotation, str) else 'number'}")
            if isinstance(one, int) and abs(one) > LARGEST:
                raise ValueError(f"{brief(one)} is more than a whole number of 64 bits holds")
            if isinstance(one, str) and (not one.strip() or "\0" in one):
                raise ValueError(f"{one!r} is no text")
        return value
