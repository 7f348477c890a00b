"""Parameters of commands: those that several have, and those that are made of the options of a recipe."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields
from typing import Annotated, Any, get_type_hints

import typer

from tesseraq_gguf.arguments import as_option
from tesseraq_gguf.recipe.options import OPTIONS, Option
from tesseraq_gguf.recipe.recipe import Recipe

Json = Annotated[bool, typer.Option("--json", help="Print JSON to stdout and nothing else there.")]


def given(context: typer.Context) -> set[str]:
    """Return the names of the parameters that the user gave."""
    return {name for name in context.params if context.get_parameter_source(name).name != "DEFAULT"}  # type: ignore[union-attr]


def takes(made: Sequence[inspect.Parameter]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return what gives a command parameters in place of its `**options`: after its context, before its own."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        named = inspect.signature(command, eval_str=True).parameters.values()
        context, *own = (parameter for parameter in named if parameter.kind is not parameter.VAR_KEYWORD)
        parameters = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in (context, *made, *own)]
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {each.name: each.annotation for each in parameters}
        return command

    return decorate


def of_fields(described: type[Any]) -> list[inspect.Parameter]:
    """Return the parameters that the annotated fields of a dataclass are."""
    hints = get_type_hints(described, include_extras=True)
    return [_made(field.name, field.default, hints[field.name]) for field in fields(described)]


def of_a_recipe() -> list[inspect.Parameter]:
    """Return the parameters that the options of a recipe are, as they are declared, with its fields' defaults."""
    defaults = {field.name: field.default for field in fields(Recipe)}
    return [_declared(option, defaults[option.name]) for option in OPTIONS.values() if option.help]


def _declared(option: Option, default: Any) -> inspect.Parameter:
    kind = list[option.kind] if option.many else option.kind  # type: ignore[name-defined]
    info: Any
    if not option.group:
        info = typer.Argument(help=option.help, metavar=option.metavar)
    else:
        info = typer.Option(
            as_option(option.name),
            help=option.help,
            metavar=option.metavar,
            show_default=option.unset or True,
            rich_help_panel=option.group,
        )
    shown = ",".join(default) or None if isinstance(default, tuple) else default
    return _made(option.name, shown, Annotated[kind | None if shown is None else kind, info])


def _made(name: str, default: Any, annotation: Any) -> inspect.Parameter:
    """A parameter; without a default it must be given."""
    given = inspect.Parameter.empty if default is MISSING else default
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=given, annotation=annotation)
