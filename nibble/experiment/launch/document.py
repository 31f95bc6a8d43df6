"""Values as a YAML file that a person can read."""

from collections.abc import Iterator
from typing import Any

import yaml

from nibble.experiment.launch.script import MARK

_WIDTH = 100


def to_text(*documents: dict[str, Any]) -> str:
    """The documents in their order; text of several lines stands as such."""
    texts = []
    for values in documents:
        node = yaml.compose(yaml.safe_dump(values, sort_keys=False), Loader=yaml.SafeLoader)
        for scalar in _scalars(node):
            if "\n" in scalar.value:
                scalar.style = "|"
        texts.append(yaml.serialize(node, Dumper=yaml.SafeDumper, width=_WIDTH))
    return f"{MARK}\n" + "---\n".join(texts)


def _scalars(node: Any) -> Iterator[yaml.ScalarNode]:
    if isinstance(node, yaml.ScalarNode):
        yield node
        return
    for part in node.value:
        for inner in part if isinstance(part, tuple) else (part,):
            yield from _scalars(inner)
