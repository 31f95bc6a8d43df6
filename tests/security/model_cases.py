"""Model folders that lie, are broken, or want to run code."""

import pickle

from spoil import (
    INDEX,
    WEIGHTS,
    Case,
    both,
    directory,
    edit,
    entry,
    header,
    index,
    link,
    pipe,
    remove,
    rename,
    replace,
    tensors,
    write,
)

CONFIG, TOKENIZER, TOKENS = "config.json", "tokenizer.json", "tokenizer_config.json"
NORM = "model.norm.weight"
EVIL = "import os\nopen('OUTSIDE/pwned', 'w').write('1')\nclass Evil: pass\n"
REMOTE = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}


class _Bomb:
    def __reduce__(self):
        return exec, ("open('pwned', 'w')",)


def _config(error, says, **values):
    return Case(edit(CONFIG, **values), "model", error, says)


def _file(error, says, spoil):
    return Case(spoil, "model", error, says)


_evil = write("evil.py", EVIL)
_PICKLED = pickle.dumps(_Bomb())

CODE = {
    "auto_map in the config": Case(both(_evil, edit(CONFIG, auto_map=REMOTE)), "model"),
    "auto_map of a hub id": _config("", "", auto_map={"AutoConfig": "evil/repo--evil.Evil"}),
    "architectures of the folder": Case(
        both(_evil, edit(CONFIG, architectures=["evil.Evil"])), "model"
    ),
    "attention from the hub, public key": _config("", "", attn_implementation="evil/kernels"),
    "attention from the hub, private key": _config("", "", _attn_implementation="evil/kernels"),
    "attention from the hub, inner key": _config(
        "", "", _attn_implementation_internal="evil/kernels:run"
    ),
    "experts from the hub": _config("", "", experts_implementation="evil/kernels"),
    "inner key without a line below": _config("", "", attn_implementation_internal="evil/kernels"),
    "trust in the config": Case(
        both(_evil, edit(CONFIG, trust_remote_code=True, auto_map=REMOTE)), "model"
    ),
    "a nested config with code": _config(
        "", "", draft_config={"model_type": "x", "auto_map": REMOTE, "_attn_implementation": "e/k"}
    ),
    "a list of configs with code": _config("", "", parts=[{"auto_map": REMOTE, "_x": "e/k"}]),
    "a newline in model_type": _config(
        "ModelError", "expected a word", model_type="llama\nimport os"
    ),
    "a path for model_type": _config("ModelError", "expected a word", model_type="../../evil"),
    "a hidden model_type": _config("ModelError", "unknown architecture", model_type="__init__"),
    "model_type of other code": _config(
        "ModelError", "unknown architecture", model_type="evil", auto_map=REMOTE
    ),
    "a method's name as a key": _config("", "", to_dict=1, get_text_config=2, validate=[3]),
    "dunder keys": _config("", "", __class__="x", __dict__={"a": 1}, __init__=None),
    "plans of transformers as keys": _config("", "", base_model_tp_plan={"a": "b"}),
    "pickled weights only": Case(
        both(remove(WEIGHTS), write("pytorch_model.bin", _PICKLED)),
        "model", "ModelError", "pickled weights only",
    ),
    "pickle under the name of safetensors": _file(
        "ModelError", "no safetensors file", write(WEIGHTS, _PICKLED)
    ),
    "an index of pickles": _file(
        "ModelError", "no safetensors", both(
            index({NORM: "a.bin"}), write("a.bin", _PICKLED)
        ),
    ),
    "pickle beside good weights": Case(write("pytorch_model.bin", _PICKLED), "model"),
    "pickled training arguments": Case(write("training_args.bin", _PICKLED), "model"),
    "a generation config with code": Case(
        edit("generation_config.json", custom_generate="evil/repo", trust_remote_code=True,
             _x="e/k", cache_config={"auto_map": REMOTE}),
        "model",
    ),
    "README with script": Case(write("README.md", "<script>alert(1)</script>" * 9), "model"),
}  # fmt: skip

TOKENIZERS = {
    "tokenizer of its own code": Case(
        both(_evil, edit(TOKENS, tokenizer_class="Evil",
                         auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]})),
        "model", "ModelError", "which is never run",
    ),
    "auto_map beside a known tokenizer": Case(
        both(_evil, edit(TOKENS, tokenizer_class="LlamaTokenizer",
                         auto_map={"AutoTokenizer": ["evil.Evil", None]})), "model",
    ),
    "a model class as the tokenizer": Case(
        edit(TOKENS, tokenizer_class="AutoModelForCausalLM"), "model"
    ),
    "a function as the tokenizer": Case(edit(TOKENS, tokenizer_class="pipeline"), "model"),
    "a number as the tokenizer": Case(edit(TOKENS, tokenizer_class=3), "model"),
    "tokenizer class in config.json": Case(
        both(remove(TOKENS), edit(CONFIG, tokenizer_class="AutoModelForCausalLM")), "model"
    ),
    "tokenizer_file outside": Case(edit(TOKENS, tokenizer_file="OUTSIDE/tokenizer.json"), "model"),
    "vocab outside": Case(
        edit(TOKENS, vocab="OUTSIDE/vocab.json", vocab_file="OUTSIDE/vocab.json"), "model"
    ),
    "arguments by place": Case(edit(TOKENS, init_inputs=["OUTSIDE/vocab.json"]), "model"),
    "versioned file outside": Case(
        edit(TOKENS, fast_tokenizer_files=["../outside/tokenizer.4.0.json"]), "model"
    ),
    "tokenizer_kwargs with a path": Case(
        edit(TOKENS, tokenizer_kwargs={"tokenizer_file": "OUTSIDE/tokenizer.json"}), "model"
    ),
    "trust in the tokenizer": Case(edit(TOKENS, trust_remote_code=True), "model"),
    "tokenizer linked outside": _file(
        "ModelError", "leaves its folder", link(TOKENIZER, "OUTSIDE/tokenizer.json")
    ),
    "tokenizer config linked outside": _file(
        "ModelError", "leaves its folder", link(TOKENS, "OUTSIDE/secret.json")
    ),
    "template linked outside": _file(
        "ModelError", "leaves its folder", link("chat_template.jinja", "OUTSIDE/secret.json")
    ),
    "a pipe for the tokenizer": _file("ModelError", "no regular file", pipe(TOKENIZER)),
    "a folder for the tokenizer": _file("ModelError", "no tokenizer", directory(TOKENIZER)),
    "a folder for its config": Case(directory(TOKENS), "model"),
    "an empty tokenizer": _file("ModelError", "cannot be read", write(TOKENIZER, "")),
    "a tokenizer of another kind": _file("ModelError", "cannot be read", write(TOKENIZER, "[1]")),
    "tokenizer config is a list": _file("ModelError", "is no object", write(TOKENS, "[]")),
    "tokenizer config in UTF-16": _file(
        "ModelError", "not valid JSON", write(TOKENS, "{}".encode("utf-16"))
    ),
    "an added token beyond all ids": _file(
        "ModelError", "cannot be read",
        edit(TOKENS, added_tokens_decoder={"1" * 30: {"content": "x", "special": "maybe"}}),
    ),
    "a token that is an object of files": _file(
        "ModelError", "cannot be read", edit(TOKENS, bos_token={"file": "OUTSIDE/secret.json"})
    ),
    "a huge template": _file(
        "ModelError", "larger than", write("chat_template.jinja", "a" * 1_000_001)
    ),
    "a huge template in the config": _file(
        "ModelError", "too large", edit(TOKENS, chat_template="a" * 1_000_001)
    ),
}  # fmt: skip

WHERE = {
    "weights linked outside": _file(
        "ModelError", "leaves its folder", link(WEIGHTS, "OUTSIDE/good.safetensors")
    ),
    "config linked outside": _file(
        "ModelError", "leaves its folder", link(CONFIG, "OUTSIDE/secret.json")
    ),
    "config linked to a device": _file(
        "ModelError", "leaves its folder", link(CONFIG, "/dev/zero")
    ),
    "generation config linked outside": _file(
        "ModelError", "leaves its folder", link("generation_config.json", "OUTSIDE/secret.json")
    ),
    "index linked outside": _file(
        "ModelError", "leaves its folder", link(INDEX, "OUTSIDE/secret.json")
    ),
    "a link to nothing": _file("ModelError", "link to nothing", link(WEIGHTS, "nowhere")),
    "a link to itself": _file("ModelError", "link to nothing", link(WEIGHTS, WEIGHTS)),
    "a link within the folder": Case(
        both(rename(WEIGHTS, "kept"), link(WEIGHTS, "kept")), "model"
    ),
    "the index goes up": _file(
        "ModelError", "shard good.safetensors is missing",
        index({NORM: "../outside/good.safetensors"}),
    ),
    "the index is absolute": _file(
        "ModelError", "shard good.safetensors is missing",
        index({NORM: "OUTSIDE/good.safetensors"}),
    ),
    "the index names the folder above": _file("ModelError", "is missing", index({NORM: ".."})),
    "the index names nothing": _file("ModelError", "is missing", index({NORM: ""})),
    "the index has a zero byte": _file("ModelError", "is missing", index({NORM: "a\0b"})),
    "the index is of numbers": _file("ModelError", "is broken", index({NORM: 3})),
    "the index is a list": _file("ModelError", "is broken", index([NORM])),
    "the index is empty": _file("ModelError", "tensors", index({})),
    "a pipe for the config": _file("ModelError", "no regular file", pipe(CONFIG)),
    "a pipe for the weights": _file("ModelError", "no regular file", pipe(WEIGHTS)),
    "a pipe for the index": _file("ModelError", "no regular file", pipe(INDEX)),
    "a folder for the config": _file("ModelError", "holds no config.json", directory(CONFIG)),
    "a folder for the weights": _file("ModelError", "holds model.safet", directory(WEIGHTS)),
    "an empty config": _file("ModelError", "not valid JSON", write(CONFIG, "")),
    "empty weights": _file("ModelError", "cut off", write(WEIGHTS, "")),
    "an empty index": _file("ModelError", "is broken", write(INDEX, "")),
}  # fmt: skip

JSON = {
    "a key twice": _file(
        "ModelError", "twice", replace(CONFIG, '"model_type"', '"model_type": "gpt2", "model_type"')
    ),
    "a key twice below": _file(
        "ModelError", "twice", replace(CONFIG, "{", '{"x": {"a": 1, "a": 2},')
    ),
    "nested without end": _file("ModelError", "too deep", write(CONFIG, "[" * 200_000)),
    "objects without end": _file("ModelError", "too deep", write(CONFIG, '{"a":' * 200_000)),
    "deep, but not for the parser": _file(
        "ModelError", "nested too deeply",
        replace(CONFIG, "{", '{"x": ' + "[" * 700 + "]" * 700 + ","),
    ),
    "UTF-16": _file("ModelError", "not valid JSON", write(CONFIG, '{"a": 1}'.encode("utf-16"))),
    "no UTF-8": _file("ModelError", "not valid JSON", write(CONFIG, b'{"model_type": "\xff"}')),
    "a mark of byte order": _file("ModelError", "not valid JSON", write(CONFIG, "\ufeff{}")),
    "NaN": _file("ModelError", "NaN", replace(CONFIG, "{", '{"rms_norm_eps2": NaN,')),
    "infinity by its digits": _file(
        "ModelError", "is no number", replace(CONFIG, "{", '{"rope_factor": 1e999,')
    ),
    "a number of 5,000 digits": _file(
        "ModelError", "not valid JSON", replace(CONFIG, "{", '{"x": ' + "9" * 5000 + ",")
    ),
    "17 MB of objects": _file(
        "ModelError", "larger than 16,000,000 bytes", write(CONFIG, '[' + '{"":1},' * 2_430_000)
    ),
    "15 MB of objects": _file(
        "ModelError", "names no model_type",
        write(CONFIG, '[{"":1}' + ',{"":1}' * 2_200_000 + "]"),
    ),
    "an index of 15 MB": _file(
        "ModelError", "is missing",
        write(INDEX, '{"weight_map": {' + ",".join(f'"{i:x}":""' for i in range(1_400_000)) + "}}"),
    ),
}  # fmt: skip

SIZES = {
    **{
        f"{key} is {value!r}": _config("ModelError", says, **{key: value})
        for key, value, says in (
            ("vocab_size", 10**12, "vocab_size"),
            ("vocab_size", -1, "vocab_size"),
            ("vocab_size", 0, "vocab_size"),
            ("vocab_size", 9_999_999, "shape"),
            ("vocab_size", "320", "fit"),
            ("hidden_size", 10**9, "hidden_size"),
            ("hidden_size", 63, "llama"),
            ("hidden_size", 64.5, "fit"),
            ("hidden_size", [64], "fit"),
            ("hidden_size", {"a": 1}, "fit"),
            ("hidden_size", None, "llama"),
            ("hidden_size", True, "hidden_size"),
            ("num_hidden_layers", 10**9, "num_hidden_layers"),
            ("num_hidden_layers", -3, "num_hidden_layers"),
            ("num_hidden_layers", 2.5, "fit"),
            ("num_attention_heads", 0, "llama"),
            ("num_attention_heads", 7, "llama"),
            ("num_key_value_heads", 3, "shape"),
            ("num_key_value_heads", -1, "llama"),
            ("num_key_value_heads", 10**8, "llama"),
            ("head_dim", 10**9, "llama"),
            ("head_dim", -16, "llama"),
            ("intermediate_size", 10**15, "intermediate_size"),
            ("hidden_act", "evil", "llama"),
            ("hidden_act", "../evil", "expected a word"),
            ("rope_parameters", "evil", "fit"),
            ("rope_parameters", {"rope_type": "evil"}, "llama"),
            ("quantization_config", "evil", "quantised by"),
            ("quantization_config", [1], "quantised by"),
            ("pad_token_id", 10**15, "llama"),
            ("layer_types", ["evil"], "fit"),
        )
    },
    "a mixture of 10**9 experts": _config(
        "ModelError", "mixtral", model_type="mixtral", num_local_experts=10**9
    ),
    "positions without end": _config(
        "ModelError",
        "its tables take",
        model_type="openai-gpt",
        max_position_embeddings=20_000,
    ),
}

SAFETENSORS = {
    "NaN in the weights": _file(
        "ModelError", "NaN", tensors(WEIGHTS, lambda t: t[NORM].fill_(float("nan")))
    ),
    "infinity in the weights": _file(
        "ModelError", "NaN", tensors(WEIGHTS, lambda t: t[NORM].fill_(float("inf")))
    ),
    "a wrong shape": _file(
        "ModelError", "shape", tensors(WEIGHTS, lambda t: t.update({NORM: t[NORM][:9].clone()}))
    ),
    "a header longer than the file": _file(
        "ModelError", "cut off", header(WEIGHTS, b"{}", length=2**63)
    ),
    "a header of 100 MB": _file(
        "ModelError", "larger than 16,000,000", header(WEIGHTS, b'{"a":[' + b"{}," * 33_333_333)
    ),
    "a header of 100 MB of blanks": _file(
        "ModelError", "larger than 16,000,000", header(WEIGHTS, b" " * 100_000_000)
    ),
    "offsets that overlap": _file("ModelError", "overlap or leave gaps", header(
        WEIGHTS, {**entry([2], [0, 8]), **entry([2], [4, 12], name="b"),
                  **entry([1], [12, 16], name="c")}, bytes(16))),
    "offsets that overflow": _file("ModelError", "do not agree", header(
        WEIGHTS, entry([4], [2**64 - 8, 2**64 + 7]), bytes(16))),
    "negative offsets": _file("ModelError", "do not agree", header(
        WEIGHTS, entry([4], [-16, 0]), bytes(16))),
    "offsets the wrong way round": _file("ModelError", "do not agree", header(
        WEIGHTS, entry([4], [16, 0]), bytes(16))),
    "a product that overflows": _file("ModelError", "do not agree", header(
        WEIGHTS, entry([2**33, 2**33], [0, 16]), bytes(16))),
    "100,000 dimensions": _file("ModelError", "is broken", header(
        WEIGHTS, entry([9] * 100_000, [0, 16]), bytes(16))),
    "a shape without values": _file("ModelError", "is broken", header(
        WEIGHTS, entry([0, 10**30], [0, 0]))),
    "a type that is unknown": _file("ModelError", "is broken", header(
        WEIGHTS, entry([4], [0, 16], dtype="PICKLE"), bytes(16))),
    "a type that is an object": _file("ModelError", "is broken", header(
        WEIGHTS, entry([4], [0, 16], dtype={}), bytes(16))),
    "a header that is a list": _file("ModelError", "expected an object", header(WEIGHTS, [])),
    "a name twice in the header": _file("ModelError", "twice", header(
        WEIGHTS, b'{"a": 1, "a": 2}')),
    "no tensors at all": _file("ModelError", "0 tensors", header(WEIGHTS, {})),
    "truncated at every byte of the header": Case(None, "truncations", "ModelError"),
}  # fmt: skip

CASES = {**CODE, **TOKENIZERS, **WHERE, **JSON, **SIZES, **SAFETENSORS}
