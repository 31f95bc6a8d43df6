"""Configurations of well-known models, so that a plan needs no download.

    preset_config("meta-llama/Llama-3.1-8B")   the values of its config.json
    preset_config("llama-3.1-8b-instruct")     the same: an alias without its owner
    preset_config("my/own-model")              None

`presets.json` lists the models by family: `shared` holds for every model of the family, `config`
is the model's own and wins. Fine-tuned variants share the preset of their base; they differ in
nothing that a plan depends on. The file leaves out what is not architecture (token ids, dropout).

Gemma 3 of 4B and more also reads images, and its hub ids name the whole model. The presets
`gemma-3-4b-text`, `gemma-3-12b-text` and `gemma-3-27b-text` are the text part alone, as
transformers' `gemma3_text`; the hub ids are unknown here on purpose. The 1B is text only.

Source: the paper named with each family, and config.json on the Hugging Face hub. Counts are
those that the hub shows for the safetensors, with tied embeddings counted once; where
`is_exact` is false, they are the rounded figures of the paper.
"""

import json
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any

_FILE = "presets.json"


@dataclass(frozen=True)
class Preset:
    """A well-known model.

    Args:
        name: The hub id, or the short name where the hub id is another model.
        short: A name to type.
        num_parameters: The published count, tied embeddings once.
        config: The values of config.json that are architecture.
        aliases: Other hub ids of the same architecture, such as the instruct variant.
        is_exact: False if the published count is rounded.
    """

    name: str
    short: str
    num_parameters: int
    config: dict[str, Any] = field(repr=False)
    aliases: tuple[str, ...] = ()
    is_exact: bool = True


def find_preset(name: str) -> Preset | None:
    """The preset of a hub id, a short name or an alias, in any case; None if there is none."""
    return _by_spelling().get(name.strip().lower())


def preset_config(name: str) -> dict[str, Any] | None:
    """The values of config.json of a hub id, a short name or an alias; None if unknown.

    The dictionary is the caller's own: changing it changes no preset.
    """
    preset = find_preset(name)
    return None if preset is None else json.loads(json.dumps(preset.config))


def preset_names() -> list[str]:
    """The hub ids, in the order of the file; the short name where there is no hub id."""
    return [preset.name for preset in _presets()]


def preset_short_names() -> list[str]:
    """The names to type, in the order of the file."""
    return [preset.short for preset in _presets()]


@cache
def _presets() -> tuple[Preset, ...]:
    families = json.loads((files("nibble.plan") / _FILE).read_text(encoding="utf-8"))
    return tuple(
        Preset(
            **{
                **model,
                "aliases": tuple(model.get("aliases", ())),
                "config": {**family["shared"], **model["config"]},
            }
        )
        for family in families
        for model in family["models"]
    )


@cache
def _by_spelling() -> dict[str, Preset]:
    """Every accepted spelling, in lower case: each name with and without its owner."""
    spellings: dict[str, Preset] = {}
    for preset in _presets():
        for name in (preset.name, preset.short, *preset.aliases):
            spellings[name.lower()] = preset
            spellings[name.split("/")[-1].lower()] = preset
    return spellings
