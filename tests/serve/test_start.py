"""How much is kept, and what is imported for it."""

import subprocess
import sys
from types import SimpleNamespace

import torch

from nibble.serve.limits import Limits
from nibble.serve.start import tokens_that_fit


def _model(**more):
    values = {
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "hidden_size": 64,
        "max_position_embeddings": 1000,
    }
    config = SimpleNamespace(**(values | more))
    config.get_text_config = lambda: config
    return SimpleNamespace(config=config, dtype=torch.bfloat16)


def test_a_quarter_of_the_memory_holds_keys_and_values():
    of_token = 2 * 4 * 2 * 8 * 2
    limits = Limits(running=10)
    assert tokens_that_fit(_model(), 4 * 5000 * of_token, limits) == 5000
    # Never less than one context, nor more than all answers can use.
    assert tokens_that_fit(_model(), 0, limits) == 1000
    assert tokens_that_fit(_model(), 2**50, limits) == 10 * 1000
    wider = _model(head_dim=16, num_key_value_heads=None)
    assert tokens_that_fit(wider, 4 * 5000 * of_token, limits) == 1000


def test_the_app_needs_no_torch():
    code = (
        "import sys, nibble.serve.server, nibble.serve.connection\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
