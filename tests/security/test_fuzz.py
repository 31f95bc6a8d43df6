"""Any template and any adapter: a result or an error for a person, within a second."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import nn

from nibble.adapter.config import CONFIG_FILE
from nibble.adapter.format import WEIGHTS_FILE, read_adapter
from nibble.data import template
from nibble.data.template import TemplateError, render
from nibble.errors import AdapterError

pytestmark = pytest.mark.torture
# Of one example; the fuzz is for what hangs, not for how busy the machine is.
IN_TIME = settings(deadline=1000)
NAMES = ("messages", "m", "ns.x", "x", "bos_token", "loop", "missing", "range", "dict", "namespace",
         "f", "self", "caller", "raise_exception", "strftime_now", "messages[0]",
         "cycler")  # fmt: skip
VALUES = ("'a'", "'%s{}{:>9}'", "[]", "{}", "(1, 2)", "1", "0", "-1", "9999999", "1.5", "none",
          "true", "{'a': 1}", "'\\n\\t'", "'__class__'", "10 ** 9")  # fmt: skip
FILTERS = ("join", "list", "length", "tojson", "tojson(indent=9)", "replace('a', m)", "indent(99)",
           "map(attribute='__class__')", "map('upper')", "sort", "sum", "batch(3)", "slice(9)",
           "center(999)", "format(m, m)", "int", "string", "attr('__init__')", "groupby('role')",
           "unique", "dictsort", "first", "round(99)", "title", "random", "safe",
           "default(x)")  # fmt: skip
METHODS = ("upper()", "split()", "replace('a', 'b' * 999)", "join(messages)", "format(m, x=m)",
           "items()", "append(1)", "__class__", "__globals__", "encode()", "zfill(99999)",
           "translate({97: 'b'})", "expandtabs(9999)", "role", "mro()")  # fmt: skip
OPERATORS = ("+", "*", "**", "%", "~", "-", "/", "//", "==", "<", "in", "and", "is")
_atom = st.sampled_from(NAMES + VALUES)


def _larger(inner):
    pair = st.tuples(inner, st.sampled_from(OPERATORS), inner)
    return (
        pair.map(lambda parts: f"({' '.join(parts)})")
        | st.tuples(inner, st.sampled_from(FILTERS)).map(lambda parts: f"({' | '.join(parts)})")
        | st.tuples(inner, st.sampled_from(METHODS)).map(lambda parts: f"{'.'.join(parts)}")
        | st.lists(inner, max_size=3).map(lambda parts: f"[{', '.join(parts)}]")
        | st.tuples(inner, inner).map(lambda parts: f"{parts[0]}[{parts[1]}]")
        | st.tuples(inner, inner).map(lambda parts: f"{parts[0]}({parts[1]})")
    )


_expression = st.recursive(_atom, _larger, max_leaves=8)
_statement = _expression.map(lambda e: f"{{{{ {e} }}}}") | st.text(max_size=9)


def _blocks(inner):
    body = st.lists(inner, max_size=3).map("".join)
    return st.one_of(
        st.tuples(_expression, body).map(lambda p: f"{{% for m in {p[0]} %}}{p[1]}{{% endfor %}}"),
        st.tuples(_expression, body).map(lambda p: f"{{% if {p[0]} %}}{p[1]}{{% endif %}}"),
        body.map(lambda b: f"{{% macro f(x) %}}{b}{{% endmacro %}}{{{{ f(1) }}}}"),
        body.map(lambda b: f"{{% set x %}}{b}{{% endset %}}"),
        body.map(lambda b: f"{{% generation %}}{b}{{% endgeneration %}}"),
        _expression.map(lambda e: f"{{% set ns = namespace(x={e}) %}}{{% set ns.x = {e} %}}"),
        _expression.map(
            lambda e: f"{{% for i in range(99999) %}}{{% set ns.x = {e} %}}{{% endfor %}}"
        ),
        body.map(lambda b: f"{{% for i in range(9999) %}}{b}{{% endfor %}}"),
    )


_template = st.lists(st.recursive(_statement, _blocks, max_leaves=6), max_size=4).map("".join)


@IN_TIME
@given(source=_template)
def test_any_template_gives_a_text_or_its_own_error(source):
    turns = [{"role": "user", "content": "a" * 99}, {"role": "assistant", "content": "b"}]
    before = json.dumps(turns)
    template.MAX_RENDER_S, kept = 0.1, template.MAX_RENDER_S
    try:
        text = render(source, turns, variables={"bos_token": "<s>"})
    except TemplateError:
        text = ""
    finally:
        template.MAX_RENDER_S = kept
    assert "<module" not in text
    assert "subclass" not in text
    assert json.dumps(turns) == before


class _Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 4, bias=False), nn.Linear(4, 2, bias=False)


CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "lora_dropout": 0.0, "bias": "none"}
KEYS = (*CONFIG, "use_rslora", "use_dora", "auto_mapping", "megatron_core", "rank_pattern",
        "modules_to_save", "target_modules", "revision", "base_model_name_or_path")  # fmt: skip
TENSORS = {
    f"base_model.model.{name}.lora_{letter}.weight": torch.ones(shape)
    for name, letter, shape in (
        ("first", "A", (2, 6)), ("first", "B", (4, 2)), ("second", "A", (2, 4)),
    )
} | {"base_model.model.second.lora_B.weight": torch.ones(2, 2)}  # fmt: skip
WEIGHTS = save(TENSORS)
HEADER_BYTES = int.from_bytes(WEIGHTS[:8], "little")
HEADER = json.loads(WEIGHTS[8 : 8 + HEADER_BYTES])
VALUE_BYTES = WEIGHTS[8 + HEADER_BYTES :]
_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)
_config = st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=8), _json, max_size=2).map(
    lambda changes: json.dumps({**CONFIG, **changes}).encode()
)


def _file(header):
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + VALUE_BYTES


@st.composite
def _weights(draw):
    """A whole file with one value of its header, some bytes or its end changed; or any bytes."""
    kind = draw(st.sampled_from(["header", "bytes", "end", "whole", "any"]))
    if kind == "header":
        name = draw(st.sampled_from([*HEADER]))
        field = draw(st.sampled_from(["dtype", "shape", "data_offsets"]))
        numbers = st.lists(st.integers(-1, 2**65) | st.integers(0, 9), max_size=4)
        return _file({**HEADER, name: {**HEADER[name], field: draw(numbers | _json)}})
    if kind == "bytes":
        at, byte = draw(st.integers(0, len(WEIGHTS) - 1)), draw(st.binary(min_size=1, max_size=4))
        return WEIGHTS[:at] + byte + WEIGHTS[at + len(byte) :]
    if kind == "end":
        return WEIGHTS[: draw(st.integers(0, len(WEIGHTS) - 1))]
    return WEIGHTS if kind == "whole" else draw(st.binary(max_size=200))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    return tmp_path_factory.mktemp("adapter")


@IN_TIME
@given(config=_config | st.binary(max_size=60), weights=_weights())
def test_any_adapter_is_read_or_refused(adapter, config, weights):
    (adapter / CONFIG_FILE).write_bytes(config)
    (adapter / WEIGHTS_FILE).write_bytes(weights)
    model = _Model()
    try:
        read_adapter(model, adapter)
    except AdapterError:
        return
    values = [p for name, p in model.named_parameters() if "lora" in name]
    assert sum(value.numel() for value in values) == sum(t.numel() for t in TENSORS.values())
    assert all(torch.isfinite(value).all() for value in values)
