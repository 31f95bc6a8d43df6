"""Text from a model: prefill, decode with a cache, sample."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from nibble.data.chat import prompt_ids
from nibble.model.families import decoder_of, head_of


def generate(
    model: Any,
    tokenizer: Any,
    prompt: str | Sequence[dict[str, Any]],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    on_text: Callable[[str], None] | None = None,
) -> str:
    """The model's answer.

    Args:
        prompt: Plain text to go on from, or messages that go through the chat template.
        temperature: 0 takes the most likely token; above, tokens are drawn.
        top_p: Draw among the likeliest tokens that make up this probability, in (0, 1].
        seed: Of the draw; None leaves it to chance.
        on_text: Receives the text as it grows.
    """
    if isinstance(prompt, str):
        ids = tokenizer(prompt)["input_ids"]
    else:
        ids = prompt_ids(prompt, tokenizer)
    generator = torch.Generator(head_of(model).weight.device)
    if seed is not None:
        generator.manual_seed(seed)
    else:
        generator.seed()
    choose = _chooser(temperature, top_p, generator)
    new_ids: list[int] = []
    shown = ""
    stops = stop_ids(model, tokenizer)
    for token in decode(model, ids, choose, max_new_tokens=max_new_tokens):
        if token in stops:
            break
        new_ids.append(token)
        if on_text is not None:
            text = tokenizer.decode(new_ids, skip_special_tokens=True)
            if not text.endswith("\ufffd"):
                on_text(text[len(shown) :])
                shown = text
    return tokenizer.decode(new_ids, skip_special_tokens=True)


@torch.no_grad()
def decode(
    model: Any, ids: Sequence[int], choose: Callable[[Tensor], int], *, max_new_tokens: int
) -> Iterator[int]:
    """New token ids one by one; the prompt runs once, then one token at a time."""
    model.eval()
    head = head_of(model)
    decoder = decoder_of(model)
    cache = DynamicCache(config=model.config)
    inputs = torch.tensor([list(ids)], device=head.weight.device)
    for _ in range(max_new_tokens):
        output = decoder(input_ids=inputs, past_key_values=cache, use_cache=True)
        token = choose(head.logits(output[0][0, -1]))
        yield token
        inputs = torch.tensor([[token]], device=head.weight.device)


def stop_ids(model: Any, tokenizer: Any) -> set[int]:
    """Ids that end an answer: EOS, and the end-of-turn token of the chat template."""
    found: set[int] = set()
    eos = getattr(model.generation_config, "eos_token_id", None)
    for value in (tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])):
        if value is not None:
            found.add(int(value))
    for marker in ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>"):
        token = tokenizer.convert_tokens_to_ids(marker)
        if token is not None and token != tokenizer.unk_token_id:
            found.add(int(token))
    return found


def _chooser(
    temperature: float, top_p: float, generator: torch.Generator
) -> Callable[[Tensor], int]:
    def choose(logits_V: Tensor) -> int:
        if temperature <= 0:
            return int(logits_V.argmax())
        probabilities_V = (logits_V.float() / temperature).softmax(-1)
        if top_p < 1:
            ordered, order = probabilities_V.sort(descending=True)
            is_out = ordered.cumsum(-1) - ordered >= top_p
            probabilities_V[order[is_out]] = 0.0
        return int(torch.multinomial(probabilities_V, 1, generator=generator))

    return choose
