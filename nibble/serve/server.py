"""The app of `nibble serve`: OpenAI's routes over one base and its adapters."""

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from nibble.serve.choice import Choice
from nibble.serve.guard import read_body
from nibble.serve.limits import Limits
from nibble.serve.models import Models
from nibble.serve.prompts import Prompt, Prompts
from nibble.serve.refusal import Refusal, bad, failed, to_json
from nibble.serve.reply import Reply
from nibble.serve.requests import (
    ChatRequest,
    CompletionRequest,
    LoadRequest,
    UnloadRequest,
    read_request,
)
from nibble.serve.shapes import ChatShape, CompletionShape
from nibble.serve.worker import Answers, Ask, Worker

# What OpenAI's completions give a request that names no number.
_SHORT_ANSWER = 16


@dataclass(frozen=True)
class Service:
    """What the routes work with.

    Args:
        context: Tokens that a prompt and its answer may have together.
    """

    worker: Worker
    models: Models
    prompts: Prompts
    limits: Limits
    context: int


def make_app(service: Service) -> Starlette:
    """The routes, with every error in OpenAI's form."""
    routes = {
        ("GET", "/health"): _health,
        ("GET", "/v1/models"): _list_models,
        ("GET", "/v1/models/{name:path}"): _show_model,
        ("POST", "/v1/chat/completions"): _chat,
        ("POST", "/v1/completions"): _complete,
        ("POST", "/v1/load_lora_adapter"): _load,
        ("POST", "/v1/unload_lora_adapter"): _unload,
    }
    app = Starlette(
        routes=[
            Route(path, _bound(endpoint, service), methods=[method])
            for (method, path), endpoint in routes.items()
        ],
        exception_handlers={
            Refusal: _refused,
            HTTPException: _no_route,
            Exception: _crashed,
        },
        lifespan=_lifespan(service.worker),
    )
    app.router.redirect_slashes = False
    return app


async def _health(service: Service, request: Request) -> Response:
    return _json({"status": "ok"})


async def _list_models(service: Service, request: Request) -> Response:
    return _json(service.models.listed())


async def _show_model(service: Service, request: Request) -> Response:
    return _json(service.models.card(request.path_params["name"]))


async def _chat(service: Service, request: Request) -> Reply:
    asked = await _read(service, request, ChatRequest)
    adapter = service.models.adapter_of(asked.model)
    draws = asked.draws()
    answers = service.worker.reserve(len(draws))
    try:
        prompt = await service.prompts.of_chat(asked.messages, adapter)
        settings = {
            "max_new_tokens": _num_new(service, prompt, asked.num_new_tokens),
            "num_logprobs": asked.num_logprobs,
        }
        await answers.start([Ask(prompt.ids, draw | settings, adapter) for draw in draws])
    except BaseException:
        answers.close()
        raise
    has_logprobs = asked.num_logprobs is not None
    choices = [
        Choice(handle, stream=service.prompts.stream() if has_logprobs else None)
        for handle in answers.handles
    ]
    shape = ChatShape(asked.model, has_usage=asked.has_usage_chunk)
    return _reply(answers, shape, choices, asked)


async def _complete(service: Service, request: Request) -> Reply:
    asked = await _read(service, request, CompletionRequest)
    adapter = service.models.adapter_of(asked.model)
    draws, has_logprobs = asked.draws(), asked.logprobs is not None
    answers = service.worker.reserve(len(asked.prompts) * len(draws))
    try:
        prompts = await service.prompts.of_prompts(
            asked.prompts, echo=bool(asked.echo), with_offsets=has_logprobs
        )
        most = _SHORT_ANSWER if asked.max_tokens is None else asked.max_tokens
        settings = {
            "num_logprobs": asked.logprobs,
            "of_prompt": bool(asked.echo) and has_logprobs,
        }
        asks = []
        for prompt in prompts:
            settings["max_new_tokens"] = _num_new(service, prompt, most)
            asks += [Ask(prompt.ids, draw | settings, adapter) for draw in draws]
        await answers.start(asks)
    except BaseException:
        answers.close()
        raise
    echoes = [prompt.echo for prompt in prompts for _ in draws]
    choices = [
        Choice(
            handle,
            stream=service.prompts.stream() if has_logprobs else None,
            echo=echo,
            has_end=True,
        )
        for handle, echo in zip(answers.handles, echoes, strict=True)
    ]
    shape = CompletionShape(asked.model, has_usage=asked.has_usage_chunk)
    return _reply(answers, shape, choices, asked)


async def _load(service: Service, request: Request) -> Response:
    asked = await _read(service, request, LoadRequest)
    await service.models.load(asked.lora_name, asked.lora_path)
    return PlainTextResponse(f"Success: LoRA adapter '{asked.lora_name}' added successfully.")


async def _unload(service: Service, request: Request) -> Response:
    asked = await _read(service, request, UnloadRequest)
    await service.models.unload(asked.lora_name)
    return PlainTextResponse(f"Success: LoRA adapter '{asked.lora_name}' removed successfully.")


async def _read(service: Service, request: Request, kind: type[Any]) -> Any:
    body = await read_body(request.headers, request.receive, service.limits)
    return read_request(kind, body)


def _num_new(service: Service, prompt: Prompt, asked: int | None) -> int:
    """The longest answer to a prompt.

    Raises:
        Refusal: 400 if it is longer than the server allows, or than the context.
    """
    room, most = service.context - len(prompt.ids), service.limits.new_tokens
    if asked is not None and asked > most:
        raise bad(f"max_tokens is {asked:,}, at most {most:,} are allowed here", "max_tokens")
    if room < (1 if asked is None else asked):
        raise bad(
            f"{len(prompt.ids):,} tokens of the prompt and up to {asked or 1:,} new ones are more "
            f"than the context of {service.context:,}; shorten the prompt",
            "prompt",
            code="context_length_exceeded",
        )
    return min(most, room) if asked is None else asked


def _reply(
    answers: Answers,
    shape: ChatShape | CompletionShape,
    choices: Sequence[Choice],
    asked: ChatRequest | CompletionRequest,
) -> Reply:
    return Reply(
        answers,
        shape,
        choices,
        copies=asked.n or 1,
        is_stream=bool(asked.stream),
        has_usage_chunk=asked.has_usage_chunk,
    )


def _bound(endpoint: Callable[..., Any], service: Service) -> Callable[[Request], Any]:
    async def bound(request: Request) -> Any:
        return await endpoint(service, request)

    return bound


def _lifespan(worker: Worker) -> Callable[[Starlette], Any]:
    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        worker.start()
        try:
            yield
        finally:
            await worker.end()

    return lifespan


def _json(values: dict[str, Any]) -> Response:
    return Response(to_json(values), media_type="application/json")


def _to_response(refusal: Refusal) -> Response:
    return Response(
        refusal.to_bytes(),
        refusal.status,
        headers=refusal.headers,
        media_type="application/json",
    )


async def _refused(request: Request, error: Exception) -> Response:
    return _to_response(error if isinstance(error, Refusal) else failed())


async def _no_route(request: Request, error: Exception) -> Response:
    """404 and 405, which the router finds."""
    status = error.status_code if isinstance(error, HTTPException) else 404
    headers = dict(error.headers or {}) if isinstance(error, HTTPException) else {}
    where = f"{request.method[:20]} {request.url.path[:80]}"
    what = "is no route of this server" if status == 404 else "takes another method"
    return _to_response(Refusal(status, f"{where} {what}", code="no_route", headers=headers))


async def _crashed(request: Request, error: Exception) -> Response:
    return _to_response(failed())
