"""From messages and texts to token ids, through the chat template that was trained.

Tokenizers and templates take time, so they run on a thread of their own, one request at a time.
"""

import asyncio
import copy
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from nibble.data.chat import prompt_ids
from nibble.errors import NibbleError
from nibble.serve.refusal import bad
from nibble.serve.text import TextStream

Result = TypeVar("Result")


@dataclass(frozen=True)
class Echo:
    """The prompt as a part of the answer.

    Args:
        first: What the tokenizer makes of the first token alone.
        offsets: Where each token begins in `text`; empty unless asked for.
    """

    text: str
    first: str = ""
    offsets: tuple[int, ...] = ()


@dataclass(frozen=True)
class Prompt:
    """Token ids, and what is echoed of them."""

    ids: Sequence[int]
    echo: Echo | None = None


class Prompts:
    """The tokenizer of a base and the chat templates of its adapters.

    Args:
        num_ids: Token ids that the model has.
    """

    def __init__(self, tokenizer: Any, *, num_ids: int) -> None:
        self._tokenizer, self._num_ids = tokenizer, num_ids
        self._own: dict[str, Any] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="nibble-prompts")

    def use_template(self, adapter: str, folder: Path) -> None:
        """From now on chats with this adapter go through the template of its folder, if any."""
        from nibble.model.tokenizer import read_template

        source = read_template(folder)
        if source is None:
            self._own.pop(adapter, None)
        else:
            self._own[adapter] = copy.copy(self._tokenizer)
            self._own[adapter].chat_template = source

    def forget_template(self, adapter: str) -> None:
        """The adapter is gone."""
        self._own.pop(adapter, None)

    def stream(self) -> TextStream:
        """Tells where each token of an answer begins in its text."""
        return TextStream(self._tokenizer)

    async def of_chat(self, messages: Sequence[dict[str, Any]], adapter: str | None) -> Prompt:
        """The prompt after which the model answers.

        Raises:
            Refusal: 400 if there is no chat template, or it does not take the messages.
        """
        tokenizer = self._own.get(adapter or "", self._tokenizer)
        if adapter is None and not tokenizer.chat_template:
            raise bad("the model has no chat template; use /v1/completions", "model")

        def ids() -> Prompt:
            return self._checked(prompt_ids(messages, tokenizer))

        return await self._aside(ids, "messages")

    async def of_prompts(
        self, prompts: Sequence[str | list[int]], *, echo: bool, with_offsets: bool
    ) -> list[Prompt]:
        """The token ids of texts, as the tokenizer gives them, or of ids.

        Raises:
            Refusal: 400 if an id does not exist.
        """

        def read() -> list[Prompt]:
            return [self._prompt(prompt, echo, with_offsets) for prompt in prompts]

        return await self._aside(read, "prompt")

    def _prompt(self, prompt: str | list[int], echo: bool, with_offsets: bool) -> Prompt:
        is_text = isinstance(prompt, str)
        ids = list(self._tokenizer(prompt, verbose=False).input_ids) if is_text else prompt
        found = self._checked(ids)
        if not echo or not ids:
            return found
        text = prompt if is_text else self._tokenizer.decode(ids, skip_special_tokens=True)
        if not with_offsets:
            return Prompt(ids, Echo(text))
        stream, offsets, at = self.stream(), [], 0
        for token in ids:
            offsets.append(at)
            at += len(stream.push(token))
        return Prompt(ids, Echo(text, self._tokenizer.decode(ids[:1]), tuple(offsets)))

    def _checked(self, ids: Sequence[int]) -> Prompt:
        if not ids:
            raise bad("the prompt is empty", "prompt")
        wrong = next((token for token in ids if token >= self._num_ids), None)
        if wrong is not None:
            raise bad(f"token id {wrong} does not exist; ids end at {self._num_ids - 1}", "prompt")
        return Prompt(ids)

    async def _aside(self, function: Callable[[], Result], param: str) -> Result:
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._thread, function)
        except NibbleError as error:
            raise bad(str(error), param) from None
