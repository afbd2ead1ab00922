"""Flags from dataclasses: one field is one flag, one name for `/set`, and one key of a JSON line.

In: a frozen dataclass whose fields carry a type and metadata["help"]. Out: click options that tell what was given apart from
what was left out, parsers for a single field, and the arguments to build the dataclass with. Ranges are the dataclass's
business; here a value only gets its type.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import click

F = TypeVar("F", bound=Callable[..., Any])

_ALLOWED = {int: "a whole number", float: "a number", bool: "on or off", str: "a text"}
_SWITCH = {"on": True, "true": True, "yes": True, "1": True, "off": False, "false": False, "no": False, "0": False}


@dataclass(frozen=True)
class Flag:
    """One field of a dataclass as its users see it. `shape` is one (a value), list (several) or pairs (several ID=BIAS)."""

    name: str
    kind: type
    shape: str
    optional: bool
    default: Any
    help: str

    def parse(self, text: str) -> Any:
        """The value that a text stands for; of a list one item, of pairs one (id, value). ValueError: field, given, allowed."""
        if self.shape != "pairs":
            return self._scalar(text)
        token, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"{self.name} is {text!r}, allowed is ID=BIAS, such as 1234=-5")
        try:
            return int(token), float(value)
        except ValueError:
            raise ValueError(f"{self.name} is {text!r}, allowed is ID=BIAS, such as 1234=-5") from None

    def _scalar(self, text: str) -> Any:
        try:
            return _SWITCH[text.lower()] if self.kind is bool else self.kind(text)
        except (ValueError, KeyError):
            raise ValueError(f"{self.name} is {text!r}, allowed is {_ALLOWED[self.kind]}") from None

    def gather(self, items: Iterable[Any]) -> Any:
        """The field's value from the parsed items of a list or of pairs."""
        return dict(items) if self.shape == "pairs" else tuple(items)

    def read_json(self, value: Any) -> Any:
        """The field's value from a decoded JSON value of the right type; ValueError otherwise."""
        if value is None and self.optional:
            return None
        if self.shape == "list":
            items = [value] if isinstance(value, str) and self.kind is str else value
            if isinstance(items, list) and all(_is(item, self.kind) for item in items):
                return tuple(items)
            raise ValueError(f"{self.name} is {value!r}, allowed is a list, each item {_ALLOWED[self.kind]}")
        if self.shape == "pairs":
            if isinstance(value, dict) and all(_is(bias, float) for bias in value.values()):
                return dict(self.parse(f"{token}={bias}") for token, bias in value.items())
            raise ValueError(f"{self.name} is {value!r}, allowed is an object of token ids and numbers")
        if not _is(value, self.kind):
            allowed = "true or false" if self.kind is bool else _ALLOWED[self.kind]
            raise ValueError(f"{self.name} is {value!r}, allowed is {allowed}")
        return value


def _is(value: Any, kind: type) -> bool:
    if kind is bool or isinstance(value, bool):
        return kind is bool and isinstance(value, bool)
    return isinstance(value, (int, float) if kind is float else kind)


def flags_of(cls: type, *, exclude: Collection[str] = ()) -> dict[str, Flag]:
    """The fields of a dataclass by name, in order; those without a help sentence are no flags."""
    hints = get_type_hints(cls)
    return {
        field.name: _flag(field.name, hints[field.name], field.default, field.metadata.get("help", ""))
        for field in fields(cls)
        if field.name not in exclude and "help" in field.metadata
    }


def _flag(name: str, hint: Any, default: Any, help_: str) -> Flag:
    optional = False
    if get_origin(hint) in (Union, types.UnionType):
        members = [member for member in get_args(hint) if member is not type(None)]
        optional = len(members) < len(get_args(hint))
        assert members in ([members[0]], [int, float]), f"{name}: a flag has one type"
        hint = members[-1]
    shape = {tuple: "list", Mapping: "pairs"}.get(get_origin(hint), "one")
    kind = {"one": hint, "list": (get_args(hint) or (None,))[0], "pairs": float}[shape]
    assert kind in _ALLOWED, f"{name}: no flag for the type {hint}"
    assert default is not MISSING, f"{name}: a flag needs a default"
    return Flag(name, kind, shape, optional, default, help_)


class _FlagType(click.ParamType):
    """Click's view of a Flag: the same parser, the same sentence."""

    def __init__(self, flag: Flag) -> None:
        self.flag = flag
        self.name = "ID=BIAS" if flag.shape == "pairs" else {int: "N", float: "X", str: "TEXT"}.get(flag.kind, "")

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return self.flag.parse(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class _SectionOption(click.Option):
    """An option that --help lists under a heading of its own."""

    def __init__(self, *args: Any, section: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.section = section


class Verb(click.Command):
    """A command whose --help groups the generated flags by the dataclass that they belong to."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {"Options": []}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx) if isinstance(param, click.Option) else None
            if record is not None:
                sections.setdefault(getattr(param, "section", "Options"), []).append(record)
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl(records)


def dataclass_options(cls: type, section: str, *, exclude: Collection[str] = ()) -> Callable[[F], F]:
    """Decorator: a click option for each field of `cls`, listed under `section`. What was given is read with `given`."""

    def decorate(function: F) -> F:
        for flag in reversed(flags_of(cls, exclude=exclude).values()):
            dashed = flag.name.replace("_", "-")
            text = flag.help
            if flag.default is not None and flag.default != () and flag.kind is not bool:
                text += f"  [default: {flag.default}]"
            elif flag.kind is bool:
                text += f"  [default: {'on' if flag.default else 'off'}]"
            function = click.option(
                f"--{dashed}/--no-{dashed}" if flag.kind is bool else f"--{dashed}",
                flag.name,
                type=bool if flag.kind is bool else _FlagType(flag),
                multiple=flag.shape != "one",
                default=None,
                help=text,
                cls=_SectionOption,
                section=section,
            )(function)
        return function

    return decorate


def given(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Those fields of `cls` that were given on the command line, ready for its constructor."""
    return {
        flag.name: values[flag.name] if flag.shape == "one" else flag.gather(values[flag.name])
        for flag in flags_of(cls).values()
        if values.get(flag.name) not in (None, ())
    }
