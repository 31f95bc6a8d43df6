"""Which tokens end an answer."""

from typing import Any


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
