"""Parameters of commands: those that several have, and those that are made of the options of a recipe."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, fields
from typing import Annotated, Any

import typer

from tesseraq_gguf.recipe.options import OPTIONS, Option
from tesseraq_gguf.recipe.recipe import Recipe

Json = Annotated[bool, typer.Option("--json", help="Print JSON to stdout and nothing else there.")]


def given(context: typer.Context) -> set[str]:
    """Return the names of the parameters that the user gave."""
    return {name for name in context.params if context.get_parameter_source(name).name != "DEFAULT"}  # type: ignore[union-attr]


def takes_a_recipe(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of a recipe as parameters, in place of its `**options`.

    They come after its context and before what else it takes. A default is that of the recipe's field.
    """
    own = inspect.signature(command, eval_str=True).parameters.values()
    context, *others = (parameter for parameter in own if parameter.kind is not parameter.VAR_KEYWORD)
    defaults = {field.name: field.default for field in fields(Recipe)}
    declared = [_parameter(option, defaults[option.name]) for option in OPTIONS.values() if option.help]
    parameters = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in (context, *declared, *others)]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {each.name: each.annotation for each in parameters}
    return command


def _parameter(option: Option, default: Any) -> inspect.Parameter:
    """What typer takes for an option as it is declared; a default that is MISSING makes it one that must be given."""
    kind = list[option.kind] if option.many else option.kind  # type: ignore[name-defined]
    info: Any
    if not option.group:
        info = typer.Argument(help=option.help, metavar=option.metavar)
    else:
        info = typer.Option(
            option.flag or f"--{option.name.replace('_', '-')}",
            help=option.help,
            metavar=option.metavar,
            show_default=option.unset or True,
            rich_help_panel=option.group,
        )
    shown = ",".join(default) or None if isinstance(default, tuple) else default
    return inspect.Parameter(
        option.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=inspect.Parameter.empty if shown is MISSING else shown,
        annotation=Annotated[kind | None if shown is None else kind, info],  # type: ignore[valid-type]
    )
