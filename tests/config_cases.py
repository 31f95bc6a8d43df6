"""Every way to write a config wrongly: where, which key, what it takes, what was found."""

import json

BOOL = "input should be true or false"
INTEGER = "input should be a valid integer"
NUMBER = "input should be a valid number"
FINITE = "input should be a finite number"
TEXT = "input should be a valid string"
TIME = "a time such as 30s, 10min or 2h"
NOT_BOOL = ["1", "0", "yes", "no", "on", '"true"', "null", "[true]", "TrUe"]
NOT_INTEGER = ["true", '"8"', "8.5", "1e3", "010", "0x10", "0o17", "1_000", "1:30", "null", "[8]"]
NOT_NUMBER = ["false", '"0.5"', "half", "1,5", "1/3", "50%", "null"]
NOT_FINITE = [".nan", ".inf", "-.inf", "1e999"]
NOT_TEXT = ["7", "1.5", "true", '["a"]', '{"a": "b"}']


def above(bound):
    return f"input should be greater than {bound}"


def at_least(bound):
    return f"input should be greater than or equal to {bound}"


def below(bound):
    return f"input should be less than {bound}"


def at_most(bound):
    return f"input should be less than or equal to {bound}"


# key, what it takes, wrong values; a value of another type is followed by one out of range.
VALUES = [
    ("method", "input should be 'auto', 'lora', 'qlora' or 'full'", ["3", "null", "dora", "[1]"]),
    ("out", TEXT, NOT_TEXT),
    ("model.name", TEXT, ["null", *NOT_TEXT]),
    ("model.revision", TEXT, NOT_TEXT),
    ("model.dtype", "input should be 'bfloat16' or 'float32'", ["int8", "16", "null"]),
    ("model.embeddings", "input should be 'auto', 'device' or 'host'", ["gpu", "true"]),
    ("quant.type", "input should be 'nf4' or 'fp4'", ["int4", "4"]),
    (
        "quant.block_size",
        "input should be 64, 128, 256, 512, 1024, 2048 or 4096",
        ["63", "0", '"64"', "8192", "64.5", "null"],
    ),
    ("quant.double", BOOL, NOT_BOOL),
    ("quant.search", BOOL, ["1", '"false"']),
    ("lora.rank", INTEGER, NOT_INTEGER),
    ("lora.rank", at_least(1), ["0", "-8"]),
    ("lora.rank", at_most(4096), ["4097", "99999999999999999999"]),
    ("lora.alpha", NUMBER, NOT_NUMBER),
    ("lora.alpha", FINITE, NOT_FINITE),
    ("lora.alpha", above(0), ["0", "-1"]),
    ("lora.dropout", NUMBER, ["true", '"0.1"']),
    ("lora.dropout", below(1), ["1", "1.5"]),
    ("lora.dropout", at_least(0), ["-0.1"]),
    ("lora.target", "input should be 'all-linear' or a valid list", ["q_proj", "3", "null"]),
    ("lora.target", "input should be 'all-linear' or a list of at least one name", ["[]"]),
    (
        "lora.target",
        "input should be 'all-linear' or item 2 should be a valid string",
        ['["q", 1]'],
    ),
    ("lora.dtype", "input should be 'float32' or 'bfloat16'", ["float64", "32"]),
    ("lora.rslora", BOOL, ["yes", "2"]),
    ("data.train", f"{TEXT} or a valid list", ["null", "5", "true"]),
    ("data.train", f"{TEXT} or a list of at least one name", ["[]"]),
    ("data.eval", f"{TEXT} or a valid number", ["true", '["a"]']),
    ("data.eval", f"{TEXT} or less than 1", ["1.0", "20"]),
    ("data.eval", f"{TEXT} or greater than 0", ["0", "-0.1"]),
    (
        "data.format",
        "input should be 'auto', 'messages', 'alpaca', 'sharegpt', 'prompt-completion' or 'text'",
        ["csv", "no", "1"],
    ),
    ("data.max_seq_len", INTEGER, ["2k", "2048.5", "null"]),
    ("data.max_seq_len", at_least(8), ["7", "-2048"]),
    ("data.max_seq_len", at_most(1048576), ["1048577"]),
    ("data.packing", BOOL, ["off", "1"]),
    ("data.train_on", "input should be 'assistant', 'last' or 'all'", ["user", "true"]),
    ("data.on_bad_row", "input should be 'stop' or 'skip'", ["drop", "false"]),
    ("data.on_long_row", "input should be 'truncate', 'drop' or 'stop'", ["split", "0"]),
    ("train.epochs", NUMBER, ["three", "null", "true"]),
    ("train.epochs", above(0), ["0", "-1"]),
    ("train.epochs", at_most(10000), ["10001"]),
    ("train.epochs", FINITE, [".inf"]),
    ("train.steps", INTEGER, ["10.5", '"10"', "true"]),
    ("train.steps", at_least(1), ["0", "-1"]),
    ("train.steps", at_most(100000000), ["100000001"]),
    ("train.batch_size", INTEGER, ["true", "16.5", "auto", "null"]),
    ("train.batch_size", at_least(1), ["0"]),
    ("train.batch_size", at_most(1000000), ["1000001"]),
    ("train.micro_batch_size", f"{INTEGER} or 'auto'", ["1.5", "true", "all", "null"]),
    ("train.micro_batch_size", f"{at_least(1)} or 'auto'", ["0", "-1"]),
    (
        "train.recompute",
        "input should be 'auto', 'none', 'selective', 'full', 'offload' or 'tiled'",
        ["null", "true", "all"],
    ),
    ("train.exactness", "input should be 'default' or 'exact'", ["true", "high"]),
    ("train.seed", INTEGER, ["1.5", "x", "null", "2024-01-01"]),
    ("train.seed", at_least(0), ["-1"]),
    ("train.seed", below(2**63), ["9223372036854775808"]),
    ("train.eval_every", INTEGER, ["10min", "0.5"]),
    ("train.eval_every", at_least(1), ["0"]),
    ("train.save_every", f"{INTEGER} or {TIME}", ["10x", "10 min", "0s", "1.5h", "h", "1:30"]),
    ("train.save_every", f"{INTEGER} or {TIME}", ["null", "true", "2.5", "[1]"]),
    ("train.save_every", f"{at_least(1)} or {TIME}", ["0", "-5"]),
    ("train.shard", BOOL, ["off", "1"]),
    ("train.stop_within", f"input should be {TIME}", ["25", "25sec", "-1s", "null", "9999999h"]),
    ("optim.name", "input should be 'adamw' or 'adamw8bit'", ["sgd", "null"]),
    ("optim.paged", f"{BOOL} or 'auto'", ["yes", "1", "null"]),
    ("optim.lr", NUMBER, NOT_NUMBER),
    ("optim.lr", FINITE, NOT_FINITE),
    ("optim.lr", above(0), ["0", "-1e-4"]),
    ("optim.lr", at_most(10), ["11"]),
    ("optim.schedule", "input should be 'cosine', 'linear' or 'constant'", ["step", "null"]),
    ("optim.warmup", at_least(0), ["-0.5"]),
    ("optim.warmup", at_most(1), ["100"]),
    ("optim.warmup", NUMBER, ["3%"]),
    ("optim.weight_decay", at_least(0), ["-0.01"]),
    ("optim.weight_decay", at_most(10), ["11"]),
    ("optim.weight_decay", NUMBER, ["none"]),
    ("optim.max_grad_norm", above(0), ["0", "-1"]),
    ("optim.max_grad_norm", FINITE, [".inf"]),
    ("optim.lora_plus_ratio", above(0), ["0"]),
    ("optim.lora_plus_ratio", at_most(1000), ["1001"]),
    ("optim.lora_plus_ratio", NUMBER, ["16x"]),
]
# file, line, message
KEYS = [
    ("optm: {}", 1, "unknown config key 'optm': did you mean \"optim\"?"),
    ("methd: lora", 1, "unknown config key 'methd': did you mean \"method\"?"),
    ("output: a", 1, "unknown config key 'output': did you mean \"out\"?"),
    ("Model:\n  name: x", 1, "unknown config key 'Model': did you mean \"model\"?"),
    ("rank: 8", 1, "unknown config key 'rank': did you mean \"lora.rank\"?"),
    ("dtype: x", 1, 'did you mean "model.dtype" or "lora.dtype"?'),
    ("optim:\n  lr: 1\n  lrr: 1", 3, "unknown config key 'optim.lrr': did you mean \"optim.lr\"?"),
    ("lora:\n  rnk: 8", 2, "unknown config key 'lora.rnk': did you mean \"lora.rank\"?"),
    ("lora:\n  lr: 1", 2, "unknown config key 'lora.lr': did you mean \"optim.lr\"?"),
    (
        "lora: {layers: 8}",
        1,
        "unknown config key 'lora.layers': expected rank, alpha, dropout, target, ",
    ),
    ("data:\n  max_seq_length: 8", 2, 'did you mean "data.max_seq_len"?'),
    ("train:\n  batchsize: 8", 2, 'did you mean "train.batch_size"?'),
    ("train:\n  save-every: 8", 2, 'did you mean "train.save_every"?'),
    ("optim.lr: 1", 1, "unknown config key 'optim.lr': write `optim:` and, indented below it, "),
    ("foo: 1", 1, "unknown config key 'foo': expected method, out, model, quant, lora, data, "),
    ("a.b: 1", 1, "unknown config key 'a.b': expected method, out, model, quant, "),
    ("lora.rank.x: 1", 1, "unknown config key 'lora.rank.x': did you mean \"lora.rank\"?"),
    ("null: 1", 1, "unknown config key 'null'"),
    ("1: 2", 1, "unknown config key '1'"),
    ("'': 2", 1, "unknown config key ''"),
    ("true: 2", 1, "unknown config key 'true'"),
    ("optim:\n  <<: {}", 2, "unknown config key 'optim.<<'"),
    ("x" * 500 + ": 1", 1, "unknown config key 'xxxxx"),
    ("lora:\n  rank:\n    x: 1", 2, "lora.rank: input should be a valid integer, got {"),
    ("optim:", 1, "optim: input should be a section with keys such as optim.name, got null"),
    ("model: llama", 1, "model: input should be a section with keys such as model.name, got"),
    ("data: [a.jsonl]", 1, "data: input should be a section with keys such as data.train, got"),
    ("method: qlor", 1, 'did you mean "qlora"?'),
    ("method: QLoRA", 1, 'did you mean "qlora"?'),
    ("optim:\n  schedule: cosin", 2, 'did you mean "cosine"?'),
    ("lora:\n  target: all_linear", 2, 'did you mean "all-linear"?'),
    ("train:\n  micro_batch_size: aut", 2, 'did you mean "auto"?'),
    ("quant:\n  type: fn4", 2, 'did you mean "nf4"?'),
    ("".join(f"k{i}: 1\n" for i in range(2000)), 1, "unknown config key 'k0'"),
]
SYNTAX = [
    ("lora:\n  rank: 8\n  rank: 4", 3, "key 'lora.rank' stands twice (first in line 2)"),
    ("lora:\n  rank: 8\nlora:\n  alpha: 4", 3, "key 'lora' stands twice (first in line 1)"),
    ("lora: {rank: 8, rank: 4}", 1, "key 'lora.rank' stands twice"),
    ('lora:\n  rank: 8\n  "rank": 4', 3, "key 'lora.rank' stands twice"),
    ("lora:\n\trank: 8", 2, "not valid YAML: found character '\\t'"),
    ("lora:\n  rank: 8\n   alpha: 4", 3, "not valid YAML: mapping values are not allowed here"),
    ("lora:\n    rank: 8\n  alpha: 4", 3, "not valid YAML: expected <block end>"),
    ("lora:\n  rank 8\n  alpha: 4", 3, "not valid YAML: mapping values are not allowed here"),
    ("lora: [", 1, "not valid YAML"),
    ("lora: {rank: 8", 1, "not valid YAML"),
    ("lora: ]", 1, "not valid YAML"),
    ("out: 'x", 1, "not valid YAML: found unexpected end of stream"),
    ('out: "\\q"', 1, "not valid YAML: found unknown escape character 'q'"),
    ("out: @x", 1, "not valid YAML: found character '@'"),
    ("out: `x`", 1, "not valid YAML: found character '`'"),
    ("out: %x", 1, "not valid YAML: found character '%'"),
    ("out: a: b", 1, "not valid YAML: mapping values are not allowed here"),
    ("out: x\n---\nout: y", 2, "a second document begins here"),
    ("%YAML 3.0\n---\nout: y", 1, "not valid YAML: found incompatible YAML document"),
    ("? [a]\n: b", 1, "a key has structure or a tag, expected a name"),
    ("lora: &a {rank: 8}\nquant: *a", 2, "an alias stands here, *a"),
    ("lora: &a\n  rank: *a", 2, "an alias stands here, *a"),
    ("out: *a", 1, "an alias stands here, *a"),
    ("a: &a [x, x]\n" + "b: &b [*a, *a]\n" * 9, 2, "an alias stands here, *a"),
    ("out: !!python/object/apply:os.system [ls]", 1, "the tag tag:yaml.org,2002:python/object"),
    ("out: !!binary aGk=", 1, "the tag tag:yaml.org,2002:binary is not allowed"),
    ("lora:\n  rank: !!int '8'", 2, "the tag tag:yaml.org,2002:int is not allowed"),
    ("out: !mine x", 1, "the tag !mine is not allowed"),
    ("out: !!str 8", 1, "the tag tag:yaml.org,2002:str is not allowed"),
    ("!!str out: x", 1, "a key has structure or a tag, expected a name"),
    ("- lora", 1, "holds list, expected sections and keys"),
    ("lora", 1, "holds str, expected sections and keys"),
    ("3", 1, "holds int, expected sections and keys"),
    ("{a: " * 10000, 1, "values are nested too deeply"),
    ("out: a\nx: " + "[" * 30000, 2, "values are nested too deeply"),
    ("- " * 30000, 1, "values are nested too deeply"),
    ("? " * 30000, 1, "a key has structure or a tag, expected a name"),
    ("".join(" " * i + "a:\n" for i in range(300)), 12, "values are nested too deeply"),
    ("out: a\0b", 1, "character 0x0000 is not allowed"),
    ("lora:\n  rank: 8\n\x1b", 3, "character 0x001b is not allowed"),
    ('out: "a\\0b"', 1, "an escape stands for the character NUL"),
    ('lora:\n  dtype: "\\ud800"', 2, "an escape stands for half a character"),
    (b"out: a\nmodel:\n  name: \xe9", 3, "byte 0xe9 is not UTF-8"),
    ("out: a".encode("utf-16"), 1, "byte 0xff is not UTF-8"),
    (b"\x1f\x8b\x08", 1, "byte 0x8b is not UTF-8"),
    ("\ufeffoptm: 1", 1, "unknown config key 'optm'"),
    ("out: a\r\noptm: 1\r\n", 2, "unknown config key 'optm'"),
]
# overrides, message
OVERRIDES = [
    *[
        ([text], "is not of the form section.key=value")
        for text in ("", "lr", "=1", "optim lr", "=", ".lr=1", "optim.=1", "a..b=1")
    ],
    (["lora.rank:8"], '--set "lora.rank:8" is not of the form section.key=value'),
    (["optim={lr: 1}"], "optim is a section, not a key"),
    (["lora="], "lora is a section, not a key"),
    (["optm.lr=1"], "unknown config key 'optm': did you mean \"optim\"?"),
    (["--lora.rank=1"], "unknown config key '--lora'"),
    (["LORA.RANK=1"], "unknown config key 'LORA'"),
    (["lora.rank.x=1"], "lora.rank: input should be a valid integer"),
    (["lora.rank=1", "lora.rank.x=1"], '--set "lora.rank.x": rank is 1, not a section'),
    (["lora.rank="], f"lora.rank: {INTEGER}, got null"),
    *[
        ([f"lora.rank={text}"], f'lora.rank: {INTEGER}, got "{text}"')
        for text in ("[8", "*x", "!!int 8")
    ],
    (["out=a\0b"], "character 0x0000 is not allowed"),
    (["out=\udcff"], "character 0xdcff is not allowed"),
    (["data.train=a"], "model.name is not set"),
    (["model.name=a"], "data.train is not set"),
    (["model.name=", "data.train=a"], "model.name: input should be a valid string, got null"),
    (["model.name=a", "data.train=''"], "data.train is not set"),
    (["model.name=a", "data.train=a", "train.eval_every=3"], "train.eval_every=3 needs data.eval"),
    (
        ["model.name=a", "data.train=a", "train.micro_batch_size=17"],
        "more than train.batch_size=16",
    ),
]


def _content(key, value):
    section, _, name = key.rpartition(".")
    return f"# a comment\n{section}:\n  {name}: {value}\n" if section else f"\n\n{name}: {value}\n"


def _shown(value):
    """How a message shows a YAML value: as JSON."""
    if value in NOT_FINITE:
        return {".nan": "NaN", "-.inf": "-Infinity"}.get(value, "Infinity")
    try:
        return json.dumps(json.loads(value))
    except ValueError:
        return json.dumps(value)


FILES = [
    *KEYS,
    *SYNTAX,
    *[
        (_content(key, value), 3, f"{key}: {rule}, got {_shown(value)}")
        for key, rule, values in VALUES
        for value in values
    ],
]
