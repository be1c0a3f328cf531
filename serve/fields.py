"""The base of the bodies of OpenAI's and our own routes: unknown fields are refused, and similar ones named.

Not covered: A1111's bodies, whose clients always send many fields that are irrelevant here.
"""

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from oneword.serve.errors import UNKNOWN, from_validation, unknown_field

Body = TypeVar("Body", bound="Fields")


class Fields(BaseModel):
    """A body whose unknown fields are errors that name similar ones."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _known(cls, data: Any) -> Any:
        if isinstance(data, Mapping):
            for name in data:
                if name not in cls.model_fields:
                    error = unknown_field(str(name), cls.model_fields)
                    context = {"text": error.message, "field": error.param}
                    raise PydanticCustomError(UNKNOWN, "{text}", context)
        return data


def validated(model: type[Body], data: object) -> Body:
    """`data` as a body. Raises ApiError, one line that names the field, what was given and what is allowed."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise from_validation([{**item, "loc": ("body", *item["loc"])} for item in error.errors()]) from None
