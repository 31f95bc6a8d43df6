"""From a base and its adapters to a server that listens, and to its end.

A signal ends it: no new connections, answers go on for a while, the rest of them are refused.
"""

import asyncio
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from nibble.adapter.many import Adapters
from nibble.serve.batch import Batch
from nibble.serve.connection import connections
from nibble.serve.guard import Guard
from nibble.serve.limits import Limits
from nibble.serve.models import Models
from nibble.serve.prompts import Prompts
from nibble.serve.server import Service, make_app
from nibble.serve.worker import Worker

# A quarter of the free memory holds keys and values; the rest is for what a step makes.
_SHARE = 4
_LOOK_EVERY_SECONDS = 0.1


@dataclass(frozen=True)
class Door:
    """Where a server listens and to whom.

    Args:
        sock: Bound, not yet listening.
        token: None asks for none.
        hosts: Names of this server in a Host header.
        any_address: Whether any IP address is one of its names.
    """

    sock: socket.socket
    token: str | None
    hosts: Sequence[str]
    any_address: bool = False


def build_service(
    model: Any,
    tokenizer: Any,
    *,
    name: str,
    adapters: Mapping[str, Path],
    limits: Limits,
    max_tokens: int,
    folders: Sequence[Path] = (),
) -> Service:
    """The parts of a server around a loaded base.

    Args:
        name: What requests call the base.
        max_tokens: As `Batch` takes it.
        folders: Adapters may be loaded from below these at run time.

    Raises:
        AdapterError: If an adapter does not fit.
        UsageError: If a name is taken twice.
    """
    many = Adapters(model)
    prompts = Prompts(tokenizer, num_ids=model.get_input_embeddings().num_embeddings)
    for each, folder in adapters.items():
        prompts.use_template(each, folder)
        many.load(each, folder)
    batch = Batch(model, tokenizer, many, max_tokens=max_tokens, max_sequences=limits.running)
    worker = Worker(batch, num_places=limits.held)
    models = Models(name, many, worker, prompts, limits=limits, folders=folders)
    context = getattr(model.config, "max_position_embeddings", None) or max_tokens
    return Service(worker, models, prompts, limits, min(context, max_tokens))


def tokens_that_fit(model: Any, free_bytes: int, limits: Limits) -> int:
    """How many tokens' keys and values to keep: what a quarter of the free memory holds.

        2 * layers * key-value heads * head width * bytes of a number, for each token

    At least one context, at most one for each answer that runs.
    """
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    of_token = 2 * config.num_hidden_layers * kv_heads * width * model.dtype.itemsize
    context = getattr(config, "max_position_embeddings", None) or 4096
    return max(context, min(free_bytes // _SHARE // of_token, limits.running * context))


def run_server(service: Service, door: Door) -> None:
    """Answer requests until SIGINT or SIGTERM, which is raised again at the end."""
    asyncio.run(serve(make_server(service, door), service, door.sock))


def make_server(service: Service, door: Door) -> uvicorn.Server:
    """The app behind its guard, on connections that are watched."""
    limits = service.limits
    app = Guard(make_app(service), token=door.token, hosts=door.hosts, any_address=door.any_address)
    config = uvicorn.Config(
        app,
        http=connections(H11Protocol, limits),  # type: ignore[arg-type]
        ws="none",
        lifespan="on",
        log_level="error",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=round(limits.stop_seconds + 2),
    )
    return uvicorn.Server(config)


async def serve(server: uvicorn.Server, service: Service, sock: socket.socket) -> None:
    """Run a server until it is asked to exit; what is not done soon after is refused."""
    ending = asyncio.create_task(_end_answers(server, service))
    try:
        await server.serve(sockets=[sock])
    finally:
        ending.cancel()


async def _end_answers(server: uvicorn.Server, service: Service) -> None:
    while not server.should_exit:
        await asyncio.sleep(_LOOK_EVERY_SECONDS)
    await asyncio.sleep(service.limits.stop_seconds)
    service.worker.refuse_all()
