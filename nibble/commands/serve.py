"""`nibble serve`: an OpenAI-compatible server over one base and its adapters."""

import json
import re
import shlex
import signal
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nibble.commands import progress
from nibble.commands.bases import base_options
from nibble.environment import quick_imports

if TYPE_CHECKING:
    from nibble.serve.start import Door

_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_TOKEN_BYTES = 24


def serve(
    model: Annotated[str, typer.Option(help="Hub id or local folder.")],
    adapter: Annotated[
        list[str] | None, typer.Option(help="name=FOLDER; again for more adapters.")
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    allow_host: Annotated[
        list[str] | None, typer.Option(help="Another name of this server in a Host header.")
    ] = None,
    method: Annotated[
        str,
        typer.Option(help="lora: 16-bit base; qlora: 4-bit base; as the adapters were trained."),
    ] = "",
    name: Annotated[str, typer.Option(help="What requests call the base.")] = "",
    token: Annotated[
        str, typer.Option(help="What clients must send; none asks for none.", envvar="NIBBLE_TOKEN")
    ] = "",
    adapters_from: Annotated[
        list[Path] | None, typer.Option(help="Adapters may be loaded from below this at run time.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 1024,
    max_running: Annotated[int, typer.Option(min=1, help="Answers at a time.")] = 64,
    max_waiting: Annotated[
        int, typer.Option(min=0, help="Answers that wait; beyond them requests get a 429.")
    ] = 192,
    max_tokens: Annotated[
        int | None,
        typer.Option(min=2, help="Tokens kept of all answers; what free memory holds."),
    ] = None,
) -> None:
    """Serve a base and its adapters by the API of OpenAI, on this machine alone and with a token.

    A model's name in a request chooses the base or an adapter. Ctrl-C and SIGTERM end it within
    ten seconds.
    """
    base = name or _name_of(model)
    folders = _adapters(adapter or [], base)
    known_token = _token(token, host)
    signal.signal(signal.SIGTERM, _leave)
    _import_server()
    with _bound(host, port) as sock:
        with progress.working(f"loading {base}"), quick_imports():
            service = _load(
                model,
                base_options(method, list(folders.values())),
                name=base,
                adapters=folders,
                folders=adapters_from or [],
                max_tokens=max_tokens,
                limits=_limits(max_new_tokens, max_running, max_waiting),
            )
        from nibble.serve.start import run_server

        # Whoever reads the address may connect at once.
        sock.listen()
        _say(sock, known_token, is_given=bool(token), names=[base, *folders])
        run_server(service, _door(sock, known_token, host, allow_host or []))


def _limits(new_tokens: int, running: int, waiting: int) -> Any:
    from nibble.serve.limits import Limits

    return Limits(new_tokens=new_tokens, running=running, waiting=waiting)


def _load(
    model: str, options: dict[str, Any], *, max_tokens: int | None, limits: Any, **parts: Any
) -> Any:
    import torch

    from nibble.model.load import load_base
    from nibble.serve.start import build_service, tokens_that_fit
    from nibble.train.memory import available_bytes

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    base, tokenizer = load_base(model, device=device, **options)
    if max_tokens is None:
        max_tokens = tokens_that_fit(base, available_bytes(device), limits)
    return build_service(base, tokenizer, max_tokens=max_tokens, limits=limits, **parts)


def _name_of(model: str) -> str:
    """The last part of a folder's path, or the hub id."""
    folder = Path(model).expanduser()
    return folder.resolve().name if folder.is_dir() else model


def _adapters(given: Sequence[str], base: str) -> dict[str, Path]:
    from nibble.errors import UsageError
    from nibble.serve.limits import ADAPTER_NAME

    found: dict[str, Path] = {}
    for each in given:
        name, equals, folder = each.partition("=")
        if not (name and equals and folder):
            raise UsageError(
                f"--adapter {each}: expected name=FOLDER", fix="--adapter law=runs/law"
            )
        if not re.fullmatch(ADAPTER_NAME, name):
            raise UsageError(f"--adapter {each}: {name!r} is no name", fix="use letters and digits")
        if name in found or name == base:
            raise UsageError(f"--adapter {each}: the name {name!r} is taken", fix="choose another")
        found[name] = Path(folder).expanduser()
    return found


def _token(given: str, host: str) -> str | None:
    """The token that clients must send; None where none is asked for."""
    import secrets

    from nibble.errors import UsageError

    if given == "none":
        if host not in _LOOPBACK:
            raise UsageError(
                f"--token none on {host} would let anybody in who reaches it",
                fix="leave --token out, or listen on 127.0.0.1",
            )
        return None
    if given and not (given.isascii() and given.isprintable() and " " not in given):
        raise UsageError(
            "--token has characters that no header takes", fix="use letters and digits"
        )
    return given or secrets.token_urlsafe(_TOKEN_BYTES)


def _import_server() -> None:
    from nibble.errors import UnavailableError

    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UnavailableError(
            f"the package {error.name} is not installed", fix='pip install "nibble[serve]"'
        ) from None


def _bound(host: str, port: int) -> socket.socket:
    """A socket on the address, before the model is loaded: a port in use is known at once."""
    from nibble.errors import UnavailableError, UsageError

    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise UsageError(f"--host {host} is no address: {error}", fix="--host 127.0.0.1") from None
    family, kind, protocol, _, address = found[0]
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except (OSError, OverflowError) as error:
        sock.close()
        raise UnavailableError(
            f"cannot listen on {host}:{port}: {error}", fix="--port 0 takes a free port"
        ) from None
    return sock


def _door(sock: socket.socket, token: str | None, host: str, allowed: Sequence[str]) -> "Door":
    from nibble.serve.start import Door

    if host in _LOOPBACK:
        return Door(sock, token, (*_LOOPBACK, *allowed))
    names = (*_LOOPBACK, host, socket.gethostname(), *allowed)
    return Door(sock, token, names, any_address=True)


def _say(sock: socket.socket, token: str | None, *, is_given: bool, names: Sequence[str]) -> None:
    """Where it is, what to send, and a line to try."""
    host, port = sock.getsockname()[:2]
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
    shown = "$NIBBLE_TOKEN" if is_given else token
    header = "" if token is None else f' -H "Authorization: Bearer {shown}"'
    message = {"role": "user", "content": "hello"}
    body = json.dumps({"model": names[-1], "messages": [message], "max_tokens": 50})
    lines = [
        f"address  {address}",
        f"models   {', '.join(names)}",
        f"token    {'none' if token is None else 'as given' if is_given else token}",
        f"try      curl {address}/chat/completions{header} "
        f"-H 'Content-Type: application/json' -d {shlex.quote(body)}",
    ]
    if host not in _LOOPBACK:
        lines.append("warning  the token and all text travel unencrypted on the network")
    typer.echo("\n".join(lines), err=True)


def _leave(number: int, frame: object) -> None:
    raise SystemExit(0)
