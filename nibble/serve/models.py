"""The names that requests may ask for: the base and its adapters, which come and go."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nibble.errors import did_you_mean
from nibble.serve.limits import Limits
from nibble.serve.prompts import Prompts
from nibble.serve.refusal import Refusal, bad
from nibble.serve.shapes import model_card
from nibble.serve.worker import Worker


class Models:
    """One base and its adapters by name.

    Args:
        base: Name of the base.
        adapters: As `nibble.adapter.many.Adapters`.
        folders: Adapters are loaded from below these, at run time; none allows nothing.
    """

    def __init__(
        self,
        base: str,
        adapters: Any,
        worker: Worker,
        prompts: Prompts,
        *,
        limits: Limits,
        folders: Sequence[Path] = (),
    ) -> None:
        self._base, self._adapters = base, adapters
        self._worker, self._prompts, self._limits = worker, prompts, limits
        self._folders = [folder.expanduser().resolve() for folder in folders]
        self._created = {name: int(time.time()) for name in (base, *adapters.names)}
        # Names that are being loaded or unloaded.
        self._moving: set[str] = set()

    def adapter_of(self, name: str) -> str | None:
        """The adapter that a model's name stands for; None is the base.

        Raises:
            Refusal: 404 if there is no such model.
        """
        if name not in self._created:
            known = ", ".join(list(self._created)[:8])
            close = did_you_mean(name, self._created)
            hint = f"; {close}" if close else ""
            message = f"the model {name[:80]!r} does not exist ({known}){hint}"
            raise Refusal(404, message, param="model", code="model_not_found")
        return None if name == self._base else name

    def listed(self) -> dict[str, Any]:
        """The body of /v1/models."""
        return {"object": "list", "data": [self.card(name) for name in self._created]}

    def card(self, name: str) -> dict[str, Any]:
        """The entry of one model.

        Raises:
            Refusal: 404 if there is no such model.
        """
        is_base = self.adapter_of(name) is None
        return model_card(name, self._created[name], None if is_base else self._base)

    async def load(self, name: str, path: str) -> None:
        """Load an adapter from a folder that is allowed.

        Raises:
            Refusal: 403 if the folder is not, 400 if it does not fit or the name is taken.
        """
        folder = self._allowed(path)
        if name in self._created or name in self._moving:
            raise bad(f"a model named {name!r} is loaded already; unload it first", "lora_name")
        if len(self._created) + len(self._moving) > self._limits.adapters:
            raise bad(f"{self._limits.adapters} adapters are loaded; unload one first")
        self._moving.add(name)
        try:
            await self._worker.call(lambda: self._load(name, folder))
            self._created[name] = int(time.time())
        finally:
            self._moving.discard(name)

    async def unload(self, name: str) -> None:
        """Forget an adapter once the answers that use it have ended; new ones are refused at once.

        Raises:
            Refusal: 404 if there is no such adapter.
        """
        if self.adapter_of(name) is None:
            raise bad(f"{name!r} is the base, which stays", "lora_name")
        del self._created[name]
        self._moving.add(name)
        try:
            await self._worker.call(
                lambda: self._adapters.unload(name),
                when=lambda: not self._worker.batch.uses(name),
            )
        finally:
            self._moving.discard(name)
        self._prompts.forget_template(name)

    def _load(self, name: str, folder: Path) -> None:
        self._prompts.use_template(name, folder)
        try:
            self._adapters.load(name, folder)
        except BaseException:
            self._prompts.forget_template(name)
            raise

    def _allowed(self, path: str) -> Path:
        if not self._folders:
            raise Refusal(
                403,
                "loading adapters is off; start the server with --adapters-from DIR",
                code="loading_off",
            )
        try:
            folder = Path(path).resolve()
            is_folder = folder.is_dir()
        except (OSError, ValueError, RuntimeError):
            raise bad("lora_path is no path of a folder", "lora_path") from None
        if not any(folder.is_relative_to(allowed) for allowed in self._folders):
            raise Refusal(
                403,
                "lora_path is not below a folder that the server was started with "
                "(--adapters-from DIR)",
                param="lora_path",
                code="path_not_allowed",
            )
        if not is_folder:
            raise bad("lora_path is no folder", "lora_path")
        return folder
