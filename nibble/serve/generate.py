"""One answer of a model."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from nibble.data.chat import prompt_ids
from nibble.errors import UsageError
from nibble.serve.batch import Batch
from nibble.serve.sampling import Sampling

__all__ = ["Sampling", "generate"]


def generate(
    model: Any,
    tokenizer: Any,
    prompt: str | Sequence[dict[str, Any]],
    *,
    on_text: Callable[[str], None] | None = None,
    **settings: Any,
) -> str:
    """The model's answer.

        generate(model, tokenizer, "Once upon a time")
        generate(model, tokenizer, messages, temperature=0.7, top_p=0.9, seed=1, stop=["\\n\\n"])

    Args:
        prompt: Plain text to go on from, or messages that go through the chat template.
        on_text: Receives the text as it grows.
        settings: max_new_tokens, temperature, top_p, top_k, seed and stop, as `Sampling` has
            them. An answer also ends where the context of the model does.

    Raises:
        UsageError: If a value is out of range, or the prompt is empty or too long.
    """
    if isinstance(prompt, str):
        ids = list(tokenizer(prompt, verbose=False).input_ids)
    else:
        ids = prompt_ids(prompt, tokenizer)
    sampling = _within_context(model, len(ids), Sampling(**_with_stops(settings)))
    parts: list[str] = []
    for text in _texts(model, tokenizer, ids, sampling):
        parts.append(text)
        if on_text is not None:
            on_text(text)
    return "".join(parts)


def _with_stops(settings: dict[str, Any]) -> dict[str, Any]:
    return {**settings, "stop": tuple(settings["stop"])} if "stop" in settings else settings


def _within_context(model: Any, num_tokens: int, sampling: Sampling) -> Sampling:
    context = getattr(model.config, "max_position_embeddings", None)
    if context is None:
        return sampling
    if num_tokens > context:
        raise UsageError(
            f"the prompt has {num_tokens:,} tokens, and the context of the model {context:,}",
            fix="shorten the prompt",
        )
    most = min(sampling.max_new_tokens, context - num_tokens)
    return replace(sampling, max_new_tokens=most)


def _texts(model: Any, tokenizer: Any, ids: Sequence[int], sampling: Sampling) -> Iterator[str]:
    room = max(1, len(ids) + sampling.max_new_tokens)
    batch = Batch(model, tokenizer, max_tokens=room, max_sequences=1)
    batch.add(ids, sampling)
    while batch.has_work():
        yield from (piece.text for piece in batch.step() if piece.text)
