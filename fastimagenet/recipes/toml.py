"""Recipes as TOML and as `--set FIELD=VALUE`, with an error that names the field."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from fastimagenet.recipes.recipe import TIMM, Recipe
from pipelines.errors import UserError, did_you_mean
from pipelines.files import read_text


def dumps(recipe: Recipe) -> str:
    """Write the recipe as TOML that `loads` accepts back unchanged."""
    import tomli_w

    return tomli_w.dumps(asdict(recipe))


def loads(text: str, where: str = "recipe") -> Recipe:
    """Read a recipe from TOML. Raises UserError with `where` for bad TOML, fields and values."""
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{where} is not valid TOML: {error}") from None
    if not {"mean", "std"} & data.keys():
        data |= _normalisation(data.get("model"))
    try:
        return _build(Recipe, data, "")
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def from_plain(data: Mapping[str, Any]) -> Recipe:
    """Build a recipe from the plain values of plan.json. Raises UserError naming the field."""
    return _build(Recipe, {key: value for key, value in data.items() if value is not None}, "")


def load(path: Path) -> Recipe:
    """Read a recipe from a TOML file. Raises UserError naming the file or the field."""
    try:
        text = read_text(path)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UserError(f"--recipe {path} cannot be read: {reason}") from None
    return loads(text, f"--recipe {path}")


def with_settings(recipe: Recipe, settings: Mapping[str, Any] | Sequence[str]) -> Recipe:
    """Change fields, given as {"max_lr": 1.2} or as the texts of --set, "phases.0.image_size=96".

    In text the value is read as TOML; a bare word is a string. "phases.*.batch_size" is that of all
    phases. All settings are applied before the recipe is checked, so that fields which depend on
    one another can change together.
    Raises UserError naming the field.
    """
    data = tomllib.loads(dumps(recipe))
    if not isinstance(settings, Mapping):
        settings = dict(map(_key_and_value, settings))
    for key, value in settings.items():
        _assign(data, key, value)
    if "model" in settings and not {"mean", "std"} & settings.keys():
        data |= _normalisation(data["model"])
    return _build(Recipe, data, "")


def _normalisation(model: object) -> dict[str, Any]:
    """Return mean and std of a network of timm's, which are those of its weights; {} for ours."""
    if not isinstance(model, str) or not model.startswith(TIMM):
        return {}
    from fastimagenet.recipes.timms import normalisation

    return normalisation(model)


def _key_and_value(setting: str) -> tuple[str, Any]:
    key, equals, text = setting.partition("=")
    if not equals:
        raise UserError(f"--set {setting}: write it as FIELD=VALUE, such as max_lr=1.2")
    return key.strip(), _value(text.strip())


def settings_between(base: Recipe, recipe: Recipe) -> list[str]:
    """List the texts of --set that change `base` into `recipe`, such as "max_lr=1.2"."""
    before, after = asdict(base), asdict(recipe)
    return [f"{name}={_inline(after[name])}" for name in after if after[name] != before[name]]


def differing_fields(one: Recipe, other: Recipe) -> list[str]:
    """Name the fields in which two recipes differ, such as "max_lr" or "phases.0.data"."""
    before, after = asdict(one), asdict(other)
    names = [name for name in before if before[name] != after[name]]
    if "phases" not in names or len(one.phases) != len(other.phases):
        return names
    return [name for name in names if name != "phases"] + [
        f"phases.{index}.{name}"
        for index, (old, new) in enumerate(zip(before["phases"], after["phases"], strict=True))
        for name in old
        if old[name] != new[name]
    ]


def field_of(recipe: Recipe, name: str) -> Any:
    """Return a field by the name that `differing_fields` gives it."""
    _, *rest = name.split(".")
    return getattr(recipe.phases[int(rest[0])], rest[1]) if rest else getattr(recipe, name)


def _inline(value: Any) -> str:
    """Write a value as TOML on one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_inline(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_inline, value))}]"
    return json.dumps(value, ensure_ascii=False)


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _assign(data: dict[str, Any], key: str, value: Any) -> None:
    node: Any = data
    parts = key.split(".")
    for depth, part in enumerate(parts):
        where = ".".join(parts[:depth])
        index: Any = part
        if isinstance(node, list):
            if part == "*":
                before, after = parts[:depth], parts[depth + 1 :]
                for number in range(len(node)):
                    _assign(data, ".".join([*before, str(number), *after]), value)
                return
            if not part.isdigit() or int(part) >= len(node):
                last = len(node) - 1
                raise UserError(f"--set {key}: {where} has entries 0 to {last}, not {part}")
            index = int(part)
        elif isinstance(node, dict):
            _check_name(part, list(node), where)
        else:
            raise UserError(f"--set {key}: {where} holds a plain value, nothing below it")
        if depth + 1 == len(parts):
            node[index] = value
        else:
            node = node[index]


def _check_name(name: str, known: list[str], where: str) -> None:
    if name in known:
        return
    path = f"{where}.{name}" if where else name
    raise UserError(f"unknown recipe field {path}: {did_you_mean(name, known)}")


def _build(cls: type, data: Mapping[str, Any], where: str) -> Any:
    """Build a dataclass from plain values; every name and type is checked."""
    known = [field.name for field in fields(cls)]
    hints = get_type_hints(cls)
    values = {}
    for name, value in data.items():
        _check_name(name, known, where.rstrip("."))
        values[name] = _convert(hints[name], value, where + name)
    missing = [f.name for f in fields(cls) if f.name not in values and _required(f)]
    if missing:
        raise UserError(f"recipe field {where}{missing[0]} is missing")
    try:
        return cls(**values)
    except UserError as error:
        # A phase does not know its index; the message gets it here.
        raise UserError(str(error).replace("phases.", where) if where else str(error)) from None


def _required(field: Any) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def _convert(hint: Any, value: Any, where: str) -> Any:
    if is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise _wrong(where, "a table", value)
        return _build(hint, value, where + ".")  # type: ignore[arg-type]
    if get_origin(hint) is tuple:
        return _convert_tuple(get_args(hint), value, where)
    if get_origin(hint) is Literal:
        hint = str
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return value  # the recipe makes floats of them
    if hint is str and type(value) is int:  # phases.0.data=160
        return str(value)
    if type(value) is not hint:
        raise _wrong(where, _TYPE_NAMES[hint], value)
    return value


def _convert_tuple(hints: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise _wrong(where, "a list", value)
    if hints[-1] is Ellipsis:
        hints = (hints[0],) * len(value)
    if len(hints) != len(value):
        raise _wrong(where, f"a list of {len(hints)} values", list(value))
    return tuple(
        _convert(hint, item, f"{where}.{index}")
        for index, (hint, item) in enumerate(zip(hints, value, strict=True))
    )


_TYPE_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}


def _wrong(where: str, expected: str, value: Any) -> UserError:
    return UserError(f"recipe field {where} must be {expected}, not {value!r}")
