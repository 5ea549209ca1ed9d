"""What requests and answers look like, from what a predictor says of its columns: checks, and the OpenAPI page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, get_origin

from pydantic import BaseModel, ConfigDict, Field, create_model
from typing_extensions import NotRequired

from engine.predict.choices import Option
from engine.predict.predictor import Predictor


class Problem(BaseModel):
    """Why there is no answer."""

    error: str = Field(description="one line: what is wrong, and what to do about it")


class State(BaseModel):
    """How the server is."""

    status: str


class About(BaseModel):
    """The model."""

    model: str = Field(description="name of its folder")
    version: str = Field(description="of zerobert")
    architecture: str
    head: str
    labels: list[str] | None = Field(description="of its classes; null where it has none")
    columns: list[str] = Field(description="of a row that is asked for")
    predicted: list[str] = Field(description="columns of a prediction")
    max_length: int = Field(description="tokens that are read of a text or a window")
    precision: str
    device: str
    threads: int


_OPTION = Annotated[str, Field(pattern=r"[^\s\x1c-\x1f]")]
#: what pydantic knows options of a question by: none is blank, and there are two at least
OPTIONS: dict[Any, Any] = {Option: _OPTION, list[Option]: Annotated[list[_OPTION], Field(min_length=2)]}


def fields_of(types: Mapping[str, Any]) -> dict[str, Any]:
    """Columns as pydantic's fields, under names of our own: a column may be called what pydantic doesn't allow."""
    fields: dict[str, Any] = {}
    for index, (name, kind) in enumerate(types.items()):
        absent = get_origin(kind) is NotRequired
        inner = kind.__args__[0] if absent else kind
        fields[f"column_{index}"] = (OPTIONS.get(inner, inner), Field(None if absent else ..., alias=name, title=name))
    return fields


def request_model(predictor: Predictor, most: int) -> type[BaseModel]:
    """The body of a request: `rows`, 1 to `most` objects with the model's columns and no others."""
    strict = ConfigDict(extra="forbid")
    types = predictor.row_types()
    row = create_model("Row", __config__=strict, **fields_of(types))
    example: dict[str, Any] = {"rows": [example_row(predictor)]}
    config = ConfigDict(extra="forbid", json_schema_extra={"example": example})
    return create_model("Rows", __config__=config, rows=(list[row], Field(min_length=1, max_length=most)))  # type: ignore[valid-type]


def response_model(predictor: Predictor) -> type[BaseModel]:
    """The body of an answer."""
    row = create_model("Prediction", __config__=ConfigDict(extra="forbid"), **fields_of(predictor.column_types()))
    rows = Field(description="of each row, in their order")
    cut = Field(description="rows whose text was cut at the model's max_length")
    return create_model("Predictions", predictions=(list[row], rows), truncated=(int, cut))  # type: ignore[valid-type]


def example_row(predictor: Predictor) -> dict[str, Any]:
    """A row that the model can predict."""
    return {name: ["a", "b"] if kind == list[Option] else "a text" for name, kind in predictor.row_types().items()}


def one_line(errors: Sequence[Mapping[str, Any]]) -> str:
    """The first of pydantic's complaints about a request."""
    first = errors[0]
    _, *place = first["loc"]
    if first["type"] == "json_invalid":
        return f"body: not JSON at character {place[0]}: {first['ctx']['error']}"
    if not place:
        return "body: give a JSON object with rows, and the header Content-Type: application/json"
    name = str(place[0])
    if len(place) > 1:
        name = f"rows, line {place[1] + 1}"
    if len(place) > 2:
        name += f": column {place[2]!r:.60}"
    return " ".join(f"{name}: {first['msg']}; /docs shows what a request has".split())
