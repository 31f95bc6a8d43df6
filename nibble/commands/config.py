"""`nibble schema` and `nibble explain KEY`: the config, from the one place where it stands."""

import json
from typing import Annotated

import typer

from nibble.errors import UsageError, did_you_mean


def schema() -> None:
    """Print the JSON Schema of the config."""
    from nibble.config import RunConfig

    typer.echo(json.dumps(RunConfig.model_json_schema(), indent=2))


def explain(
    key: Annotated[
        str, typer.Argument(help="A dotted key such as lora.rank; none lists all.")
    ] = "",
) -> None:
    """Say what a config key means, its default, its range and its effect on memory."""
    from nibble.config import describe, keys

    known = keys()
    if not key:
        for name, field in known.items():
            typer.echo(f"{name:28} {field.description}")
        return
    if key not in known:
        close = did_you_mean(key, known)
        raise UsageError(
            f"there is no config key {key!r}", fix=close or "`nibble explain` lists all"
        )
    field = known[key]
    takes, memory = describe(key)
    typer.echo(f"{key}\n  {field.description}")
    typer.echo(f"  default: {json.dumps(field.get_default())}")
    typer.echo(f"  takes:   {takes}")
    typer.echo(f"  memory:  {memory}")
