"""`nibble merge`: fold an adapter into its base, measured and certified."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nibble.commands import progress
from nibble.environment import quick_imports

if TYPE_CHECKING:
    from nibble.adapter.certificate import Certificate

_DTYPES = ("bfloat16", "float16", "float32")


def merge(
    adapter: Annotated[Path, typer.Option(help="Adapter folder, or that of its run.")],
    out: Annotated[Path, typer.Option(help="Folder of the merged model; new or empty.")],
    model: Annotated[str, typer.Option(help="Hub id or folder; what the adapter names.")] = "",
    onto: Annotated[
        str, typer.Option(help="16bit, dequantized, 4bit, 4bit-search or auto.")
    ] = "auto",
    data: Annotated[str, typer.Option(help="Held-out examples; those of the run.")] = "",
    method: Annotated[
        str, typer.Option(help="lora or qlora: what it was trained by, if it does not say.")
    ] = "",
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "",
    anyway: Annotated[bool, typer.Option(help="Keep a model outside the bounds.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the certificate.")] = False,
) -> None:
    """Write the merged model, compare it with base and adapter, and certify it.

    `auto` merges onto every base that is of use and keeps the one with the lowest held-out loss.
    Exit code 65 where the merge would lose the update or what was learnt.
    """
    from nibble.errors import UsageError

    if method not in ("", "lora", "qlora"):
        raise UsageError(f"--method is {method!r}, expected lora or qlora")
    if dtype not in ("", *_DTYPES):
        raise UsageError(f"--dtype is {dtype!r}, expected one of {', '.join(_DTYPES)}")
    with quick_imports():
        from nibble import api

    given = _given(method, dtype)
    with progress.working("merging") as show:
        certificate = api.merge(
            adapter,
            out,
            model=model,
            onto=onto,
            data=data,
            options=given,
            anyway=anyway,
            tell=show,
        )
    if as_json:
        typer.echo(progress.to_json(certificate.to_dict()))
        return
    for name, value in _lines(certificate):
        typer.echo(f"{name:15}{value}")
    for problem in certificate.problems:
        typer.echo(f"kept all the same: {problem}", err=True)
    typer.echo(f"try it         nibble chat --model {out}", err=True)


def _given(method: str, dtype: str) -> dict[str, Any]:
    import torch

    given: dict[str, Any] = {}
    if method:
        given["storage"] = "nf4" if method == "qlora" else "bf16"
    if dtype:
        given["dtype"] = getattr(torch, dtype)
    return given


def _lines(certificate: "Certificate") -> list[tuple[str, str]]:
    rounding, measured = certificate.rounding, certificate.measured
    update, error = rounding.rms("update"), rounding.rms("error")
    lines = [
        ("merged onto", certificate.onto),
        (
            "update",
            f"rms {update:.2e}, rounding error {error:.2e}, kept {100 * rounding.kept:.1f} %",
        ),
    ]
    if measured is None:
        return [*lines, ("measured", "nothing: there is no held-out text; give --data")]
    m = measured.merged
    return [
        *lines,
        *((f"  {name}", f"{loss:.4f}") for name, loss in certificate.candidates.items()),
        (
            "held-out loss",
            f"{m.loss:.4f} (adapter {measured.live_loss:.4f}, base {measured.base_loss:.4f})",
        ),
        ("KL", f"mean {m.mean_kl:.1e}, largest {m.max_kl:.1e} nats a token"),
        ("same token", f"{100 * m.top1_agreement:.1f} % of {m.num_target_tokens:,}"),
    ]
