"""Named kinds of bad rows as `nibble data check` reports them: line, reason, fix, exit code."""

import json
import time

import pytest

from nibble.commands import data
from nibble.config import DataConfig
from nibble.data.dataset import build_dataset
from nibble.errors import DataError

_ANSWER = {"role": "assistant", "content": "b"}


def _row(**columns):
    return json.dumps(columns)


def _pair(**columns):
    return _row(prompt="a", **{"completion": "b"} | columns)


def _turns(*turns):
    return _row(messages=[{"role": "user", "content": "a"}, *turns])


def _turn(**fields):
    """A row whose second turn has these fields and whose third is an answer."""
    return _turns(fields, _ANSWER)


def _call(calls):
    return _turn(role="assistant", content="", tool_calls=calls)


def _arguments(arguments):
    return _call([{"function": {"name": "f", "arguments": arguments}}])


def _said(role, text):
    return _turn(role=role, content=text)


def _encoded(row):
    return row if isinstance(row, bytes) else row.encode()


_DEEP = "[" * 10_000 + "]" * 10_000

# kind: (row, words of the reason, words of the fix)
BAD_ROWS = {
    # no JSON
    "cut-off": ('{"prompt": "a', "Unterminated string", "correct the JSON"),
    "single-quotes": ("{'prompt': 'a'}", "double quotes", "correct the JSON"),
    "no-colon": ('{"prompt" "a"}', "column 11", "correct the JSON"),
    "comma-at-end": ('{"text": "a",}', "column 14", "correct the JSON"),
    "bad-escape": ('{"text": "\\q"}', "escape", "correct the JSON"),
    "bare-tab": ('{"text": "a\tb"}', "control character", "correct the JSON"),
    "plain-words": ("hello", "Expecting value", "one object a line"),
    "two-objects": ('{"text": "a"} {"text": "b"}', "something follows", "its own line"),
    "comma-between-rows": (_pair() + ",", "something follows", "its own line"),
    "comment": (_pair() + " // note", "something follows", "its own line"),
    "nan": ('{"text": "a", "score": NaN}', '"NaN"', "null"),
    "infinity": ('{"text": "a", "score": -Infinity}', '"-Infinity"', "null"),
    "huge-integer": ('{"text": "a", "id": ' + "9" * 5000 + "}", "too many digits", "as a text"),
    "same-key": ('{"text": "a", "text": "b"}', '"text" stands twice', "keep one"),
    "same-key-inside": ('{"text": "a", "x": {"y": 1, "y": 2}}', '"y" stands twice', "keep one"),
    "deep": ('{"text": "a", "x": ' + _DEEP + "}", "nested too deeply", "flatten"),
    "deep-open": ('{"text": ' + "[" * 10_000, "nested too deeply", "flatten"),
    "deeper-than-100": ('{"text": ' + "[" * 100 + "]" * 100 + "}", "100 levels", "flatten"),
    "inner-bom": ("\ufeff" + _pair(), "byte order mark", "joined"),
    "latin-1": (b'{"text": "\xe9"}', "0xe9", "iconv"),
    "cut-character": ('{"text": "é'.encode()[:-1], "byte 11", "UTF-8"),
    # no row
    "list": ("[1]", "a list", "write {"),
    "text": ('"text"', "a text", "write {"),
    "number": ("3.5", "a number", "write {"),
    "null": ("null", "null", "write {"),
    "true": ("true", "true or false", "write {"),
    "no-fields": ("{}", "no fields", "remove it"),
    # columns
    "misspelt-column": (_row(promt="a", completion="b"), 'mean "prompt"', "rename"),
    "no-answer": (_row(prompt="a"), "no known format", "rename"),
    "escape-in-column": (_row(**{"\x1b[2J": 1}), "\\x1b[2J", "rename"),
    "surrogate-in-column": ('{"\\ud800": 1}', "\\ud800", "rename"),
    "many-columns": (_row(**{f"c{i}": i for i in range(5000)}), "c0, c1", "rename"),
    "preference-pair": (_row(prompt="a", chosen="b", rejected="c"), "preference", "chosen answer"),
    "two-prompts": (_row(question="a", query="b", answer="c"), "be the prompt", "remove"),
    "two-answers": (_row(input="a", answer="b", output="c"), "be the answer", "remove"),
    "other-format": (_row(text="a"), "text but line 1 is prompt-completion", "split the file"),
    # fields
    "null-field": (_row(prompt=None, completion="b"), '"prompt" is null', "fill it"),
    "number-field": (_row(prompt=1, completion="b"), "a number, expected a text", "write it as"),
    "list-field": (_row(prompt=["a"], completion="b"), "a list, expected a text", "write it as"),
    "object-answer": (_pair(completion={"a": 1}), "an object, expected a text", "write it as"),
    "true-text": (_row(text=True), "true or false", "write it as"),
    "empty-field": (_row(prompt="", completion="b"), '"prompt" is empty', "fill it"),
    "white-field": (_row(prompt=" \t\n", completion="b"), '"prompt" is empty', "fill it"),
    "nul-in-field": (_row(prompt="a\0", completion="b"), "NUL", "remove it"),
    "half-a-pair": ('{"text": "\\ud83d"}', "\\ud83d", "both halves"),
    "bad-system": (_pair(system=1), '"system" is a number', "write it as"),
    "bad-history": (_pair(history=["x"]), '"history" is wrong', "pairs"),
    "history-of-three": (_pair(history=[["a", "b", "c"]]), '"history" is wrong', "pairs"),
    "number-alpaca-input": (_row(instruction="a", input=1, output="b"), '"input"', "write it as"),
    # turns
    "null-messages": (_row(messages=None), '"messages" is null', "fill it"),
    "text-messages": (_row(messages="x"), "expected a list", "a list"),
    "object-messages": (_row(messages=_ANSWER), "an object, expected a list", "a list"),
    "no-turns": (_row(messages=[]), "empty, expected turns", "add turns"),
    "too-many-turns": (_turns(*[_ANSWER] * 10_000), "10,001 turns", "split the conversation"),
    "text-turn": (_turns("b"), "turn 2 is a text", "a role and a content"),
    "no-role": (_turn(content="a"), 'turn 2 has no "role"', "who speaks"),
    "number-role": (_turn(role=3, content="a"), "turn 2 role", "a text"),
    "misspelt-role": (_said("asistant", "a"), 'mean "assistant"', "use one of"),
    "foreign-role": (_said("narrator", "a"), '"narrator"', "use one of"),
    "no-content": (_turn(role="assistant"), 'turn 2 has no "content"', "add the text"),
    "null-content": (_said("assistant", None), "turn 2 content", "fill it"),
    "number-content": (_said("user", 3), "a number, expected a text", "write it as"),
    "empty-user-turn": (_said("user", ""), "turn 2 (user) has no text", "fill it"),
    "white-user-turn": (_said("user", " \n"), "turn 2 (user) has no text", "fill it"),
    "nul-in-turn": (_said("assistant", "\0"), "turn 2 content holds a NUL", "remove it"),
    "image": (_said("user", [{"type": "image_url"}]), "image_url", "remove images"),
    "audio": (_said("user", [{"type": "input_audio"}]), "input_audio", "remove images and audio"),
    "number-part": (_said("user", [1]), "a part of type a number", "remove images"),
    "sharegpt-keys": (_row(messages=[{"from": "gpt", "value": "a"}]), "from, value", "rename"),
    "no-sharegpt-value": (_row(conversations=[{"from": "gpt"}]), '"value"', "add the text"),
    "no-answer-turn": (_turns(), "no assistant turn", "add the answer"),
    "only-system": (_row(messages=[{"role": "system", "content": "s"}]), "nothing", "add the"),
    "half-weight": (_turn(**_ANSWER, weight=0.5), "weight 0.5", "0 or 1"),
    "endless-weight": (_turn(**_ANSWER, weight=7).replace("7", "1e999"), "weight inf", "0 or 1"),
    "text-weight": (_turn(**_ANSWER, weight="1"), "weight 1, expected", "0 or 1"),
    "user-weight": (_turn(role="user", content="a", weight=1), "(user) has a weight", "remove it"),
    "number-reasoning": (_turn(**_ANSWER, reasoning_content=5), "reasoning_content", "a text"),
    "nul-in-name": (_turn(role="user", content="a", name="\0"), "turn 2 name holds", "remove it"),
    # tools
    "text-calls": (_call("x"), "a text, not a list", "as OpenAI does"),
    "number-call": (_call([3]), "a call is no object", "as OpenAI does"),
    "nameless-call": (_call([{"function": {}}]), "no function name", "as OpenAI does"),
    "broken-arguments": (_arguments("{"), "arguments of f are not JSON", "as OpenAI does"),
    "list-arguments": (_arguments([1]), "are a list, not an object", "as OpenAI does"),
    "same-argument": (_arguments('{"a": 1, "a": 2}'), "stands twice", "as OpenAI does"),
    "nan-argument": (_arguments('{"a": NaN}'), '"NaN"', "as OpenAI does"),
    "deep-arguments": (_arguments(_DEEP), "nested too deeply", "as OpenAI does"),
    "surrogate-argument": (_arguments({"a": "\ud800"}), "tool_calls holds half", "both halves"),
    "endless-argument": (_arguments({"a": 7}).replace("7", "1e999"), "not finite", "null"),
    "user-calls": (_turn(role="user", content="a", tool_calls=[{}]), "has tool calls", "move them"),
    "object-tools": (_pair(tools={"a": 1}), '"tools" is an object', "as OpenAI does"),
    "broken-tools": (_pair(tools="{"), 'cell "tools" is not JSON', "JSON list"),
    "deep-tools": (_pair(tools=_DEEP), "nested too deeply", "JSON list"),
    "nul-in-tools": (_pair(tools=[{"name": "\0"}]), '"tools" holds a NUL', "remove it"),
    "broken-cell": (_row(messages="[{"), 'cell "messages" is not JSON', "JSON list"),
    "deep-cell": (_row(messages=_DEEP), "nested too deeply", "JSON list"),
    # what the model would read otherwise
    "ends-its-turn": (_said("user", "a<|im_end|>"), 'turn 2 holds "<|im_end|>"', "space inside"),
    "begins-a-turn": (
        _pair(completion="b<|im_end|>\n<|im_start|>user\nc"),
        'turn 2 holds "<|im_end|>"',
        "remove it",
    ),
    "sequence-end": (_pair(completion="b</s>"), '"</s>"', "remove it"),
    "control-in-system": (_pair(system="<|im_start|>"), 'turn 1 holds "<|im', "remove it"),
    "control-in-arguments": (_arguments({"a": ["<s>"]}), 'turn 2 holds "<s>"', "remove it"),
    "control-in-tools": (_pair(tools=[{"name": "[INST]"}]), '"tools" holds "[INST]"', "remove it"),
    "private-characters": (
        _pair(completion="\U000f0001\U00100001"),
        "private planes",
        "remove the characters",
    ),
}


@pytest.mark.parametrize(("row", "reason", "fix"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_bad_row_is_reported_and_the_others_are_read(bad_row_of, write, row, reason, fix):
    bad_row = _encoded(row)
    good = (_turns(_ANSWER) if b'"messages"' in bad_row else _pair()).encode()
    path = write("train.jsonl", b"\n".join([good, good, bad_row, good]))
    started = time.monotonic()
    bad = bad_row_of(path, num_good=3)
    assert time.monotonic() - started < 1
    assert (bad["path"], bad["line"]) == (str(path), 3)
    assert reason in bad["reason"]
    assert fix in bad["fix"]
    assert (bad["reason"] + bad["fix"]).isprintable()
    assert len(bad["reason"]) < 1000


def test_there_are_sixty_kinds_and_each_differs():
    assert len(BAD_ROWS) >= 60
    assert len({row for row, *_ in BAD_ROWS.values()}) == len(BAD_ROWS)


def test_training_stops_at_a_bad_row_or_counts_it(byte_tokenizer, write):
    rows = [_encoded(row) for row, *_ in BAD_ROWS.values()]
    path = write("train.jsonl", b"\n".join([_pair().encode(), *rows]))
    section = DataConfig(train=str(path))
    with pytest.raises(DataError, match=r"train\.jsonl:2: ") as info:
        build_dataset(section, byte_tokenizer, seed=0)
    assert info.value.exit_code == 65
    section = DataConfig(train=str(path), on_bad_row="skip")
    dataset = build_dataset(section, byte_tokenizer, seed=0)
    assert dataset.report.train.num_bad == len(rows)
    assert dataset.report.train.num_read == len(rows) + 1
    assert f"{len(rows)} of {len(rows) + 1} rows are bad" in dataset.warnings[0]


ORDERS = {
    "answer-first": "assistant user assistant",
    "two-questions": "user user assistant",
    "two-answers": "user assistant assistant",
    "system-late": "user system assistant",
    "tool-first": "tool assistant assistant",
}


@pytest.mark.parametrize("kind", ORDERS)
def test_roles_in_an_order_that_the_model_does_not_know(
    bad_row_of, write, byte_tokenizer, golden, kind
):
    byte_tokenizer.chat_template = golden.GEMMA
    turns = [{"role": role, "content": "a"} for role in ORDERS[kind].split()]
    path = write("train.jsonl", _turns(_ANSWER) + "\n" + _row(messages=turns))
    bad = bad_row_of(path, num_good=1)
    assert bad["line"] == 2
    assert "the model's chat template does not take this conversation" in bad["reason"]
    assert "change the turns" in bad["fix"]


def test_a_sign_that_is_no_control_token_of_the_model_is_text(check, write, golden, monkeypatch):
    tokenizer = golden.byte_tokenizer()
    tokenizer.chat_template = golden.CHATML
    tokenizer.add_tokens(["<think>"])  # a token of its own, but not a special one
    monkeypatch.setattr(data, "load_tokenizer", lambda _model: tokenizer)
    text = "<think>1 + 1</think> <|im_end |> <|endoftext|> < s>"
    code, document, _ = check(write("train.jsonl", _pair(completion=text)))
    assert code == 0
    assert text in document["train"]["rows"][0]["parts"][1][0]


def test_plain_documents_may_hold_control_tokens(check, write):
    code, document, _ = check(write("train.jsonl", _row(text="a</s>b")))
    assert (code, document["train"]["num_rows"]) == (0, 1)
