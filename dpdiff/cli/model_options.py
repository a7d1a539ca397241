"""Options of a model's constructor as text, and back."""

from __future__ import annotations

import difflib
import inspect
import types
import typing
from collections.abc import Sequence
from typing import Any, Literal

ModelName = Literal["dpdiff-ad", "dlsr"]
MODELS: dict[ModelName, str] = {"dpdiff-ad": "DPDiffAD", "dlsr": "DLSR"}


def model_class(name: ModelName) -> type:
    import dpdiff

    return getattr(dpdiff, MODELS[name])


def defaults(function: Any) -> dict[str, Any]:
    """The keyword options of a function or class with their defaults."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}


def parse_settings(cls: type, settings: Sequence[str]) -> dict[str, Any]:
    """`["dim=256", ...]` -> `{"dim": 256}`, typed as the constructor of `cls` declares.

    Raises:
        ValueError: not of the form name=value, an unknown name, a name twice, or a value of another type.
    """
    hints = typing.get_type_hints(cls.__init__)
    known = list(defaults(cls))
    options: dict[str, Any] = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        name = name.strip().replace("-", "_")
        if not equals:
            raise ValueError(f"--set is {setting!r}: expected name=value")
        if name not in known:
            close = difflib.get_close_matches(name, known, n=3)
            hint = f"did you mean {' or '.join(close)}?" if close else f"expected one of {', '.join(known)}"
            raise ValueError(f"--set {setting}: {cls.__name__} has no option {name!r}; {hint}")
        if name in options:
            raise ValueError(f"--set {setting}: {name} is given twice")
        options[name] = _parse(name, text.strip(), hints[name])
    return options


def _parse(name: str, text: str, hint: Any) -> Any:
    kinds = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    for kind in sorted(kinds, key=lambda kind: kind is not type(None)):  # "none" is a str too
        try:
            return _PARSERS[typing.get_origin(kind) or kind](text)
        except (ValueError, KeyError):
            continue
    expected = " or ".join(_NAMES[typing.get_origin(kind) or kind] for kind in kinds)
    raise ValueError(f"{name} is {text!r}: expected {expected}")


def _one_of(values: dict[str, Any]) -> typing.Callable[[str], Any]:
    return lambda text: values[text.lower()]


_PARSERS = {
    type(None): _one_of({"none": None}),
    bool: _one_of({"true": True, "false": False, "1": True, "0": False}),
    int: int,
    float: float,
    Sequence: lambda text: [int(part) for part in text.split(",")],
    str: str,
}
_NAMES = {
    type(None): "none",
    bool: "true or false",
    int: "an integer",
    float: "a number",
    Sequence: "integers like 2,3",
}
