"""A room that shares its name with a public function is that function when called."""

import importlib
import sys
from types import ModuleType
from typing import Any


def make_callable(room: str, home: str) -> None:
    """Let the package `room` be called as the function of the same last name in `home`.

    `nibble.train` is a package as soon as any of its modules is imported; with this it is also
    the public function, in whichever order they are imported.
    """
    name = room.rpartition(".")[2]

    class CallableRoom(ModuleType):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return getattr(importlib.import_module(home), name)(*args, **kwargs)

    sys.modules[room].__class__ = CallableRoom
