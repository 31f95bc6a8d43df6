"""How the base of given adapters is to be kept: as it was in training."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nibble.errors import UsageError

_STORAGES = {"lora": "bf16", "qlora": "nf4"}


def base_options(method: str, adapters: Sequence[Path]) -> dict[str, Any]:
    """Arguments of `load_base` for the base of these adapters.

    Args:
        method: lora or qlora; empty takes what the adapters say, and lora where none does.

    Raises:
        UsageError: If the method is unknown, or the adapters need different bases.
        AdapterError: If a folder is broken.
    """
    if method not in ("", *_STORAGES):
        raise UsageError(f"--method is {method!r}, expected lora or qlora")
    if method:
        return {"storage": _STORAGES[method]}

    from nibble.adapter.format import read_base_options

    found = {str(folder): read_base_options(folder) for folder in adapters}
    said = {name: options for name, options in found.items() if options}
    if not said:
        return {"storage": "bf16"}
    (first, options), *others = said.items()
    for name, other in others:
        if other != options:
            raise UsageError(
                f"{first} was trained on {_named(options)}, {name} on {_named(other)}",
                fix="serve them apart, or choose the base for all with --method",
            )
    return options


def _named(options: dict[str, Any]) -> str:
    quant = ", ".join(f"{key} {value}" for key, value in options["quant"].items())
    return f"{options['storage']}{f' ({quant})' if quant else ''}"
