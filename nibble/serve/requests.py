"""What a request may ask for: the fields of OpenAI's API that are computed, and their bounds.

computed     checked strictly: types, ranges, lengths
harmless     changes no answer: ignored
neutral      asks for nothing, such as "tools": []: ignored
the rest     would change the answer, or is unknown: refused
"""

from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import from_json

from nibble.errors import did_you_mean
from nibble.serve.limits import (
    ADAPTER_NAME,
    MAX_CHOICES,
    MAX_NAME_CHARS,
    MAX_STOP_CHARS,
    MAX_STOPS,
    MAX_TOP_LOGPROBS,
)
from nibble.serve.refusal import Refusal, bad

_HARMLESS = {
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
    "prompt_cache_retention", "parallel_tool_calls",
}  # fmt: skip
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "best_of": (1,),
    "suffix": ("",),
    "audio": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "verbosity": (),
    "web_search_options": (),
    "min_p": (0,),
    "min_tokens": (0,),
    "ignore_eos": (False,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "guided_json": (),
    "guided_regex": (),
}
# Below this a distribution is its likeliest token, and its logits would overflow.
_COLDEST = 1e-5
_SHOWN = 80
_INT64 = 1 << 63

Name = Annotated[str, Field(min_length=1, max_length=MAX_NAME_CHARS)]
Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
Token = Annotated[int, Field(ge=0, lt=_INT64)]
Count = Annotated[int, Field(ge=0, lt=_INT64)]


class StreamOptions(BaseModel):
    """`include_usage` sends a last chunk with the counts of tokens."""

    model_config = ConfigDict(strict=True, extra="forbid")
    include_usage: bool = False
    include_obfuscation: bool = False


class _Sampled(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", protected_namespaces=())

    model: Name
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, lt=_INT64)
    seed: int | None = Field(None, ge=-_INT64, lt=_INT64)
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def has_usage_chunk(self) -> bool:
        """Whether a stream ends with the counts of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage

    def draws(self) -> list[dict[str, Any]]:
        """The part of `Sampling` that says how to draw, for each of the `n` answers."""
        temperature = 1.0 if self.temperature is None else self.temperature
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        shared = {
            "temperature": temperature if temperature >= _COLDEST else 0.0,
            "top_p": 1.0 if self.top_p is None else self.top_p,
            "top_k": max(0, self.top_k or 0),
            "stop": tuple(stop),
        }
        return [{**shared, "seed": self._seed(number)} for number in range(self.n or 1)]

    def _seed(self, number: int) -> int | None:
        return None if self.seed is None else (self.seed + number) % _INT64


class ChatRequest(_Sampled):
    """The body of /v1/chat/completions; the messages are checked when they are rendered."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    max_tokens: Annotated[Count, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[Count, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)

    @property
    def num_logprobs(self) -> int | None:
        """How many likeliest tokens are told beside each token; None is none at all."""
        return self.top_logprobs or 0 if self.logprobs else None

    @property
    def num_new_tokens(self) -> int | None:
        """The longest answer, where the request names it."""
        named = self.max_completion_tokens
        return self.max_tokens if named is None else named


class CompletionRequest(_Sampled):
    """The body of /v1/completions."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=MAX_CHOICES)]
        | Annotated[list[Token], Field(min_length=1)]
        | Annotated[
            list[Annotated[list[Token], Field(min_length=1)]],
            Field(min_length=1, max_length=MAX_CHOICES),
        ]
    )
    max_tokens: Count | None = None
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)

    @property
    def prompts(self) -> list[str | list[int]]:
        """One or more prompts, each as text or as token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        many: list[Any] = self.prompt
        return [many] if isinstance(many[0], int) else many


class LoadRequest(BaseModel):
    """The body of /v1/load_lora_adapter."""

    model_config = ConfigDict(strict=True, extra="forbid")
    lora_name: Name = Field(pattern=ADAPTER_NAME)
    lora_path: str = Field(min_length=1, max_length=4096)


class UnloadRequest(BaseModel):
    """The body of /v1/unload_lora_adapter."""

    model_config = ConfigDict(strict=True, extra="forbid")
    lora_name: Name
    lora_int_id: int | None = None


Request = TypeVar("Request", bound=BaseModel)


def read_request(kind: type[Request], body: bytes) -> Request:
    """The request that a body holds.

    Raises:
        Refusal: 400, naming the first field that is wrong.
    """
    try:
        values = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise bad(f"the body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(values, dict):
        raise bad("the body is not a JSON object", code="invalid_json")
    try:
        request = kind.model_validate(_computed(values, kind))
    except ValidationError as error:
        raise _refusal(error, kind) from None
    if isinstance(request, _Sampled):
        _check_together(request)
    return request


def _computed(values: Mapping[str, Any], kind: type[BaseModel]) -> dict[str, Any]:
    """The values without those that change nothing."""
    kept = {}
    for name, value in values.items():
        if name in kind.model_fields:
            kept[name] = value
        elif name in _NEUTRAL and issubclass(kind, _Sampled):
            if value is not None and not any(_is_same(value, each) for each in _NEUTRAL[name]):
                raise bad(
                    f"{name} = {_short(value)} is not supported; leave it out",
                    name,
                    code="unsupported_parameter",
                )
        elif name not in _HARMLESS:
            kept[name] = value
    return kept


def _is_same(value: Any, other: Any) -> bool:
    """Equal as JSON is: true is not 1."""
    return value == other and isinstance(value, bool) == isinstance(other, bool)


def _check_together(request: _Sampled) -> None:
    if request.stream_options is not None and not request.stream:
        raise bad("stream_options is given without stream: true", "stream_options")
    if isinstance(request, ChatRequest) and request.top_logprobs and not request.logprobs:
        raise bad("top_logprobs is given without logprobs: true", "top_logprobs")


def _refusal(error: ValidationError, kind: type[BaseModel]) -> Refusal:
    problems = error.errors(include_url=False)
    # An unknown field is often the misspelt name of one that is missing.
    problem = min(problems, key=lambda each: each["type"] != "extra_forbidden")
    param = ".".join(str(part) for part in problem["loc"])[:_SHOWN]
    if problem["type"] == "extra_forbidden":
        close = did_you_mean(param, kind.model_fields)
        message = f"unknown field {param!r}" + (f"; {close}" if close else "")
        return bad(message, param, code="unknown_parameter")
    if problem["type"] == "missing":
        return bad(f"the field {param!r} is missing", param, code="missing_parameter")
    name = str(problem["loc"][0])
    message = str(problem["msg"])
    if name in ("prompt", "stop") and len(problem["loc"]) > 1:
        # Each form of the field was tried; the words of one would mislead.
        param, message = name, _FORMS[name]
    return bad(f"{param}: {message}, got {_short(problem['input'])}", param, code="invalid_value")


_FORMS = {
    "prompt": f"expected a text, a list of token ids, or a list of up to {MAX_CHOICES} of either",
    "stop": f"expected a text or up to {MAX_STOPS} texts of 1 to {MAX_STOP_CHARS:,} characters",
}


def _short(value: Any) -> str:
    """A value in a message; a long one is cut before it is printed whole."""
    if isinstance(value, str):
        return repr(value[:_SHOWN]) + ("..." if len(value) > _SHOWN else "")
    if isinstance(value, list | dict):
        return ("a list" if isinstance(value, list) else "an object") + f" of {len(value):,}"
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
