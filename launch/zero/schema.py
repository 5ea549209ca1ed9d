"""Checks a resolved DeepSpeed configuration against the models of the DeepSpeed that is installed."""

from __future__ import annotations

import difflib
import types
from enum import Enum
from importlib import metadata
from typing import Any, Union, get_args, get_origin

from engine.errors import UserError
from launch.zero.keys import fail

#: type -> its name in messages
WORDS: dict[type, str] = {
    bool: "true or false",
    int: "a whole number, without quotes",
    float: "a number, without quotes",
    str: "text",
}


def check_models(path: str, values: dict[str, Any]) -> None:
    """Refuse unknown keys, wrong types and wrong values in the sections zero_optimization, bf16 and fp16.

    Args:
        path: the file that the values come from, for the message.
        values: a DeepSpeed configuration without "auto" values.

    Raises:
        UserError: names the file, the key, its value and the remedy.
    """
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    models = {"zero_optimization": DeepSpeedZeroConfig, "bf16": DeepSpeedBF16Config, "fp16": DeepSpeedFP16Config}
    for name, model in models.items():
        section = values.get(name, {})
        _check_keys(path, name, model, section)
        try:
            model(**section)
        except (ValueError, AssertionError) as error:  # pydantic's ValidationError is a ValueError
            raise _refused(path, name, error) from error


def _refused(path: str, section: str, error: Exception) -> UserError:
    """One line from an error of DeepSpeed's models."""
    errors = getattr(error, "errors", None)
    if errors is None:
        return fail(path, section, f"is refused by DeepSpeed: {error}")
    first = errors()[0]
    key = ".".join([section, *map(str, first["loc"])])
    value = f"{first['input']!r} " if first["loc"] else ""
    return fail(path, key, f"{value}is refused by DeepSpeed: {first['msg'].removeprefix('Value error, ')}; change it")


def _check_keys(path: str, section: str, model: Any, values: dict[str, Any]) -> None:
    fields = {alias: info for name, info in model.model_fields.items() for alias in {name, info.alias or name}}
    for key, value in values.items():
        dotted = f"{section}.{key}"
        if key not in fields:
            near = difflib.get_close_matches(key, list(fields), n=1)
            remedy = f"did you mean {near[0]}?" if near else "delete it"
            raise fail(path, dotted, f"is no key of DeepSpeed {metadata.version('deepspeed')}; {remedy}")
        if (fields[key].json_schema_extra or {}).get("deprecated"):
            raise fail(path, dotted, f"is deprecated; give {fields[key].json_schema_extra['new_param']}")
        _check_type(path, dotted, fields[key].annotation, value)


def _check_type(path: str, key: str, annotation: Any, value: Any) -> None:
    """Stricter than DeepSpeed, which takes "2" and true for numbers."""
    kinds = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    kind = next(one for one in kinds if one is not type(None))
    if hasattr(kind, "model_fields"):
        if not isinstance(value, dict):
            raise fail(path, key, f"is {value!r}; give an object {{...}}")
        _check_keys(path, key, kind, value)
    elif isinstance(kind, type) and issubclass(kind, Enum):
        choices = [member.value for member in kind]
        if type(value) is not type(choices[0]) or value not in choices:
            raise fail(path, key, f"is {value!r}; give one of {', '.join(map(repr, choices))}")
    elif kind in WORDS and not _is(kind, value):
        raise fail(path, key, f"is {value!r}; give {WORDS[kind]}")


def _is(kind: type, value: Any) -> bool:
    if kind is bool or isinstance(value, bool):
        return kind is bool and isinstance(value, bool)
    if kind is int:
        return isinstance(value, int | float) and value == int(value)
    return isinstance(value, int | float) if kind is float else isinstance(value, kind)
