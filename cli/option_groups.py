"""Groups of options that several commands share, defined once as the fields of a dataclass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import wraps
from inspect import Parameter, signature
from typing import Any, get_type_hints


def with_option_groups(command: Callable[..., None]) -> Callable[..., None]:
    """Add the fields of a command's dataclass parameters to it as options.

    The fields of such a class are typer options, or dataclasses of the same kind. Typer sees the
    options as if the command had declared them, and the command gets objects of these classes.
    """
    declared = signature(command, eval_str=True)
    groups = {
        each.name: each.annotation
        for each in declared.parameters.values()
        if is_dataclass(each.annotation)
    }
    parameters: list[Parameter] = []
    for each in declared.parameters.values():
        parameters += _options_of(groups[each.name]) if each.name in groups else [each]

    @wraps(command)
    def run(**given: Any) -> None:
        built = {name: _build(group, given) for name, group in groups.items()}
        names = {each.name for each in parameters} & declared.parameters.keys()
        command(**{name: given[name] for name in names}, **built)

    run.__annotations__ = {each.name: each.annotation for each in parameters}
    run.__signature__ = declared.replace(parameters=parameters)  # type: ignore[attr-defined]
    return run


def _members(group: Any) -> Iterator[tuple[Field[Any], Any]]:
    hints = get_type_hints(group, include_extras=True)
    for field in fields(group):
        yield field, hints[field.name]


def _options_of(group: Any) -> Iterator[Parameter]:
    for field, kind in _members(group):
        if is_dataclass(kind):
            yield from _options_of(kind)
            continue
        default = Parameter.empty if field.default is MISSING else field.default
        yield Parameter(field.name, Parameter.KEYWORD_ONLY, default=default, annotation=kind)


def _build(group: Any, given: Mapping[str, Any]) -> Any:
    return group(
        **{
            field.name: _build(kind, given) if is_dataclass(kind) else given[field.name]
            for field, kind in _members(group)
        }
    )
