"""Ways to spoil a folder: each makes a function that takes the folder and the one outside of it."""

import json
import os
from dataclasses import dataclass
from typing import Any

from safetensors.torch import load_file, save_file

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Case:
    """What is done to a good folder, how it is then used, and the error that must come.

    Args:
        error: The class of the error; "" where the folder must load, without harm.
        says: Part of the message.
    """

    spoil: Any
    use: str
    error: str = ""
    says: str = ""


def both(*spoils):
    def spoil(folder, outside):
        for one in spoils:
            one(folder, outside)

    return spoil


def edit(name, **values):
    def spoil(folder, outside):
        path = folder / name
        content = json.loads(path.read_text()) if path.exists() else {}
        filled = json.loads(json.dumps(values).replace("OUTSIDE", str(outside)))
        path.write_text(json.dumps({**content, **filled}))

    return spoil


def write(name, content):
    def spoil(folder, outside):
        data = content.encode() if isinstance(content, str) else content
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data.replace(b"OUTSIDE", str(outside).encode()))

    return spoil


def replace(name, old, new):
    def spoil(folder, _):
        text = (folder / name).read_text()
        if old not in text:
            raise SystemExit(f"{name} has no {old}")
        (folder / name).write_text(text.replace(old, new))

    return spoil


def link(name, target):
    """A link to OUTSIDE/..., to an absolute path, or to a name in the folder."""

    def spoil(folder, outside):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target.replace("OUTSIDE", str(outside)))

    return spoil


def remove(*names):
    return lambda folder, _: [(folder / name).unlink() for name in names]


def rename(name, other):
    return lambda folder, _: (folder / name).rename(folder / other)


def pipe(name):
    def spoil(folder, _):
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return spoil


def directory(name):
    def spoil(folder, _):
        (folder / name).unlink(missing_ok=True)
        (folder / name).mkdir()

    return spoil


def header(name, entries, values=b"", length=None):
    """A safetensors file with this header, which may lie about its own length."""
    content = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    size = len(content) if length is None else length
    return write(name, size.to_bytes(8, "little") + content + values)


def entry(shape, offsets, dtype="F32", name="a"):
    return {name: {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


def tensors(name, change):
    def spoil(folder, _):
        held = load_file(folder / name)
        change(held)
        save_file(held, folder / name, metadata={"format": "pt"})

    return spoil


def index(weight_map):
    """An index in the place of the single file of weights, which is renamed to one.safetensors."""
    return both(
        rename(WEIGHTS, "one.safetensors"),
        write(INDEX, json.dumps({"weight_map": weight_map})),
    )
