"""stub"""
from typing import Any
class Library:
    instructions = ""
    def encode(self, *a: Any, **k: Any) -> None: ...
    def decode(self, *a: Any, **k: Any) -> None: ...
def load() -> Library | None:
    return None
