"""Adapter and checkpoint folders that lie or are broken, and a run on a spoilt base."""

import torch
from spoil import (
    Case,
    both,
    directory,
    edit,
    entry,
    header,
    link,
    pipe,
    remove,
    rename,
    replace,
    tensors,
    write,
)

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
STATE, MANIFEST = "step-00000001/state.safetensors", "step-00000001/manifest.json"


def _adapter(error, says, **values):
    return Case(edit(CONFIG, **values), "adapter", error, says)


def _file(says, spoil, error="AdapterError"):
    return Case(spoil, "adapter", error, says)


def _first(change):
    return tensors(WEIGHTS, lambda held: held.update({min(held): change(held[min(held)])}))


def _extra(name):
    add = {f"base_model.model.{name}": torch.ones(3, 4)}
    return tensors(WEIGHTS, lambda held: held.update(add))


def _fill(value):
    return _first(lambda factor: factor.fill_(value))


ADAPTERS = {
    **{
        f"adapter: {key} is {str(value)[:30]}": _adapter("AdapterError", key, **{key: value})
        for key, value in (
            ("r", 10**9), ("r", 10**30), ("r", 65_536), ("r", 0), ("r", -4), ("r", 2.5),
            ("r", "8"), ("r", True), ("r", None), ("lora_alpha", 10**400 // 10**90),
            ("lora_alpha", "32"), ("lora_alpha", None), ("lora_dropout", 1.0),
            ("lora_dropout", -0.1), ("lora_dropout", "x"), ("use_rslora", "yes"),
            ("peft_type", "PROMPT_TUNING"), ("peft_type", "../evil"), ("peft_type", ["LORA"]),
            ("modules_to_save", ["lm_head"]), ("rank_pattern", {"q_proj": 10**9}),
            ("alpha_pattern", {"q_proj": 1}), ("layer_replication", [[0, 10**9]]),
            ("megatron_core", "evil.module"), ("megatron_config", {"a": 1}),
            ("use_dora", True), ("bias", "all"), ("lora_bias", True), ("fan_in_fan_out", True),
            ("init_lora_weights", "pissa"), ("trainable_token_indices", [1]),
            ("trust_remote_code", True), ("custom_module", "evil"), ("auto_map", {"A": "evil.E"}),
        )
        if key != "r" or value != 65_536
    },
    "adapter: a rank that its factors lack": _adapter("AdapterError", "has shape", r=65_536),
    "adapter: auto_mapping of other code": _adapter(
        "", "", auto_mapping={"base_model_class": "Evil", "parent_library": "evil"}
    ),
    "adapter: alpha is NaN": _file("NaN", replace(CONFIG, '"lora_alpha": 5', '"lora_alpha": NaN')),
    "adapter: alpha is infinite": _file(
        "lora_alpha", replace(CONFIG, '"lora_alpha": 5', '"lora_alpha": 1e999')
    ),
    "adapter: a key twice": _file("twice", replace(CONFIG, '"r":', '"r": 10, "r":')),
    "adapter: deep": _file("too deep", write(CONFIG, "[" * 200_000)),
    "adapter: UTF-16": _file("not valid JSON", write(CONFIG, "{}".encode("utf-16"))),
    "adapter: a list": _file("peft_type", write(CONFIG, "[]")),
    "adapter: empty config": _file("not valid JSON", write(CONFIG, "")),
    "adapter: empty weights": _file("cut off", write(WEIGHTS, "")),
    "adapter: config linked outside": _file(
        "leaves its folder", link(CONFIG, "OUTSIDE/secret.json")
    ),
    "adapter: weights linked outside": _file(
        "leaves its folder", link(WEIGHTS, "OUTSIDE/good.safetensors")
    ),
    "adapter: a pipe for the config": _file("no regular file", pipe(CONFIG)),
    "adapter: a pipe for the weights": _file("no regular file", pipe(WEIGHTS)),
    "adapter: a folder for the weights": _file("holds no", directory(WEIGHTS)),
    "adapter: pickled": _file(
        "holds no", both(remove(WEIGHTS), write("adapter_model.bin", b"\x80\x04."))
    ),
    "adapter: pickle by another name": _file("is broken", write(WEIGHTS, b"\x80\x04" + b"." * 99)),
    "adapter: NaN": _file("not finite", _fill(float("nan"))),
    "adapter: infinity": _file("not finite", _fill(float("-inf"))),
    "adapter: whole numbers": _file("expected 16 or 32 bits", _first(lambda f: f.int())),
    "adapter: a factor turned": _file("has shape", _first(lambda f: f.T.contiguous())),
    "adapter: a factor lost": _file("lacks", tensors(WEIGHTS, lambda t: t.pop(min(t)))),
    "adapter: the head itself": _file("no LoRA factor", _extra("lm_head.weight")),
    "adapter: a layer that is not there": _file("does not have", _extra("evil.lora_A.weight")),
    "adapter: a name that goes up": _file("no LoRA factor", header(
        WEIGHTS, {"../../x": entry([4], [0, 16])["a"]}, bytes(16))),
    "adapter: no factors": _file("no factors", header(WEIGHTS, {})),
    "adapter: a header that lies": _file("cut off", header(WEIGHTS, b"{}", length=10**12)),
    "adapter: a header of 100 MB": _file("larger than", header(WEIGHTS, b"[" * 100_000_000)),
    "adapter: README with script": Case(
        write("README.md", "<img src=x onerror=alert(1)>"), "adapter"
    ),
    "adapter: code beside it": Case(
        write("__init__.py", "open('OUTSIDE/pwned', 'w').write('1')"), "adapter"
    ),
}  # fmt: skip


def _checkpoint(spoil, says, error="DiskError"):
    return Case(spoil, "checkpoint", error, says)


CHECKPOINTS = {
    "checkpoint: state linked outside": _checkpoint(
        link(STATE, "OUTSIDE/good.safetensors"), "damaged"
    ),
    "checkpoint: manifest linked outside": _checkpoint(
        link(MANIFEST, "OUTSIDE/secret.json"), "damaged"
    ),
    "checkpoint: a pipe for the state": _checkpoint(pipe(STATE), "no regular file"),
    "checkpoint: a pipe for the manifest": _checkpoint(pipe(MANIFEST), "missing"),
    "checkpoint: a folder for the state": _checkpoint(directory(STATE), "no regular file"),
    "checkpoint: pickled random state": _checkpoint(
        write("step-00000001/rng_state.pth", b"\x80\x04."), "holds"
    ),
    "checkpoint: a pickle for the state": _checkpoint(write(STATE, b"\x80\x04."), "other bytes"),
    "checkpoint: the manifest is deep": _checkpoint(write(MANIFEST, "[" * 200_000), "damaged"),
    "checkpoint: a manifest of 2 MB": _checkpoint(write(MANIFEST, " " * 2_000_000), "too large"),
    "checkpoint: a manifest in UTF-16": _checkpoint(
        write(MANIFEST, "{}".encode("utf-16")), "cannot be read"
    ),
    "checkpoint: another step": _checkpoint(
        rename("step-00000001", "step-00000007"), "is of step 1"
    ),
    "checkpoint: a file for the folder": _checkpoint(
        both(rename("step-00000001", "x"), write("step-00000001", "x")), "damaged"
    ),
}

RUNS = {
    "run: a base with code": Case(
        both(
            write("evil.py", "open('OUTSIDE/pwned', 'w').write('1')"),
            edit("config.json", auto_map={"AutoModelForCausalLM": "evil.Evil"}),
            edit("tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", None]}),
        ),
        "run",
    ),
    "run: a base linked outside": Case(
        link("model.safetensors", "OUTSIDE/good.safetensors"), "run", "ModelError", "leaves"
    ),
    "run: a template that breaks out": Case(
        write("chat_template.jinja", "{{ cycler.__init__.__globals__.os.system('id') }}"),
        "run", "DataError", "template",
    ),
    "run: a template without end": Case(
        write("chat_template.jinja", "{% for a in range(99999) %}{% for b in range(99999) %}"
              "{% endfor %}{% endfor %}"),
        "run", "DataError", "template",
    ),
    "run: a template that fills memory": Case(
        write("chat_template.jinja", "{% set n = namespace(x=[]) %}{% for a in range(9999) %}"
              "{% set n.x = n.x + ['a' * 9000000 ~ a] %}{% endfor %}"),
        "run", "DataError", "template",
    ),
}  # fmt: skip

CASES = {**ADAPTERS, **CHECKPOINTS, **RUNS}
