"""Every fault of the table happens, at its line, with a reason and a fix."""

import json
import string

import pytest

from nibble.data.chat import tokenize
from nibble.data.faults import FAULTS, fault
from nibble.data.packing import fit
from nibble.data.records import read_records

GOOD = '{"prompt": "a", "completion": "b"}\n'
TURNS = '{"messages": [{"role": "user", "content": "a"}, %s]}\n'
ANSWER = '{"role": "assistant", "content": "b"}'


def turn(**fields):
    """A row whose second turn has these fields and whose third is an answer."""
    return TURNS % f"{json.dumps(fields)}, {ANSWER}"


def call(calls):
    return turn(role="assistant", content="", tool_calls=calls)


# fault, file name, content, line (0: the file as a whole), words of the reason
CASES = [
    ("empty-file", "a.jsonl", "", 0, "at least one row"),
    ("empty-file", "bom.jsonl", b"\xef\xbb\xbf", 0, "empty"),
    ("empty-file", "a.txt", " \n\n", 0, "empty"),
    ("no-rows", "a.jsonl", "\n\r\n  \n", 0, "no rows"),
    ("no-rows", "a.json", "[]", 0, "no rows"),
    ("no-rows", "a.csv", "prompt,completion\n", 0, "no rows"),
    ("unknown-suffix", "a.docx", "x", 0, '".docx"'),
    ("utf16", "a.jsonl", GOOD.encode("utf-16"), 1, "UTF-16"),
    ("bad-utf8", "a.jsonl", GOOD.encode() + b'{"text": "\xe9"}\n', 2, "byte 11"),
    ("bad-utf8", "a.json", b'[\n{"text": "\xe9"}]', 2, "0xe9"),
    ("bad-utf8", "a.csv", b"prompt,completion\n\xff,b\n", 2, "byte 1"),
    ("bad-utf8", "a.txt", b"one\ntwo\xff\n", 2, "byte 4"),
    ("nul", "a.jsonl", GOOD + '{"prompt": "a\\u0000", "completion": "b"}', 2, '"prompt"'),
    ("nul", "b.jsonl", turn(role="assistant", content="\0"), 1, "turn 2"),
    ("nul", "a.txt", "one\ntwo\0\n", 2, "the line"),
    ("lone-surrogate", "a.jsonl", '{"text": "\\ud83d"}', 1, "\\ud83d"),
    ("bad-json", "a.jsonl", GOOD + '{"prompt": "a" "x"}\n', 2, "column 16"),
    ("bad-json", "cut.jsonl", GOOD + '{"prompt": "a', 2, "Unterminated"),
    ("bad-json", "quote.jsonl", "{'prompt': 'a'}", 1, "double quotes"),
    ("bad-json", "comma.json", '[\n{"text": "a"},\n]', 2, "comma before ]"),
    ("bad-json", "array.json", '[{"text": "a"},\n{"text" "b"}]', 2, "column 9"),
    ("several-values", "a.jsonl", GOOD.strip() + GOOD, 1, "column 35"),
    ("json-too-deep", "a.jsonl", '{"text": ' + "[" * 100_000, 1, "too deep"),
    ("json-number", "a.jsonl", '{"text": "a", "score": NaN}', 1, '"NaN"'),
    ("huge-number", "a.jsonl", '{"id": ' + "9" * 5000 + "}", 1, "digits"),
    ("duplicate-key", "a.jsonl", GOOD + '{"text": "a", "text": "b"}', 2, '"text"'),
    ("duplicate-key", "a.json", '[{"text": "a"},\n{"text": "a", "text": "b"}]', 2, '"text"'),
    ("not-array", "a.json", '{\n"rows": []}', 1, "an object"),
    ("array-not-closed", "a.json", '[{"text": "a"}', 1, "not closed"),
    ("array-not-closed", "b.json", '[{"text": "a"},\n', 2, "not closed"),
    ("array-comma", "a.json", '[{"text": "a"}\n{"text": "b"}]', 2, "column 1"),
    ("trailing-text", "a.json", '[{"text": "a"}]\nx', 2, "column 1"),
    ("bad-csv", "a.csv", 'prompt,completion\n"a,b\n', 2, "unexpected end"),
    ("bad-csv", "b.csv", 'prompt,completion\n"a"x,b\n', 2, "expected after"),
    ("csv-no-name", "a.csv", "prompt,,completion\na,b,c\n", 1, "column 2"),
    ("csv-same-name", "a.csv", "prompt,prompt\na,b\n", 1, '"prompt"'),
    ("csv-fields", "a.csv", "prompt,completion\na,b\na,b,c\n", 3, "3 fields"),
    ("csv-fields", "b.csv", 'prompt,completion\n"a\nb",c\nd\n', 4, "1 fields"),
    ("csv-delimiter", "a.csv", "prompt;completion\na;b\n", 1, "one column"),
    ("bad-parquet", "a.parquet", "no parquet", 0, "Parquet"),
    ("not-object", "a.jsonl", GOOD + '"text"', 2, "a text"),
    ("not-object", "b.jsonl", "[1]\nnull", 1, "a number"),
    ("not-object", "c.jsonl", GOOD + "null", 2, "null"),
    ("empty-row", "a.jsonl", GOOD + "{}", 2, "no fields"),
    ("unknown-columns", "a.jsonl", '{"promt": "a", "completion": "b"}', 1, '"prompt"'),
    ("unknown-columns", "b.jsonl", '{"prompt": "a"}', 1, "prompt"),
    ("preference-row", "a.jsonl", '{"prompt": "a", "chosen": "b", "rejected": "c"}', 1, "pair"),
    ("ambiguous-columns", "a.jsonl", '{"question": "a", "input": "b", "answer": "c"}', 1, "input"),
    ("ambiguous-columns", "b.jsonl", '{"input": "a", "answer": "b", "output": "c"}', 1, "output"),
    ("mixed-formats", "a.jsonl", GOOD + '\n{"text": "a"}', 3, "text but line 1 is prompt"),
    ("null-field", "a.jsonl", '{"prompt": "a", "completion": null}', 1, '"completion"'),
    ("null-field", "b.jsonl", '{"messages": null}', 1, '"messages"'),
    ("null-field", "c.jsonl", turn(role="assistant", content=None), 1, "turn 2"),
    ("wrong-type", "a.jsonl", '{"prompt": 1, "completion": "b"}', 1, "a number"),
    ("wrong-type", "b.jsonl", '{"messages": "x"}', 1, "a list"),
    ("wrong-type", "c.jsonl", '{"messages": {"role": "user"}}', 1, "an object"),
    ("wrong-type", "d.jsonl", turn(role=3, content="a"), 1, "turn 2 role"),
    ("wrong-type", "e.jsonl", turn(role="user", content=3), 1, "turn 2 content"),
    ("wrong-type", "f.jsonl", '{"instruction": "a", "input": [], "output": "b"}', 1, '"input"'),
    ("wrong-type", "g.jsonl", '{"text": true}', 1, "true or false"),
    ("empty-field", "a.jsonl", '{"prompt": " ", "completion": "b"}', 1, '"prompt"'),
    ("empty-field", "b.jsonl", '{"text": ""}', 1, '"text"'),
    ("no-messages", "a.jsonl", '{"messages": []}', 1, "empty"),
    ("no-messages", "b.jsonl", '{"conversations": []}', 1, "conversations"),
    ("turn-not-object", "a.jsonl", TURNS % '"b"', 1, "turn 2 is a text"),
    ("missing-role", "a.jsonl", turn(content="a"), 1, '"role"'),
    ("missing-role", "b.jsonl", '{"conversations": [{"value": "a"}]}', 1, '"from"'),
    ("unknown-role", "a.jsonl", turn(role="asistant", content="a"), 1, '"assistant"?'),
    ("unknown-role", "b.jsonl", '{"conversations": [{"from": "x", "value": "a"}]}', 1, '"x"'),
    ("missing-content", "a.jsonl", turn(role="assistant"), 1, '"content"'),
    ("missing-content", "b.jsonl", '{"conversations": [{"from": "gpt"}]}', 1, '"value"'),
    ("foreign-keys", "a.jsonl", '{"messages": [{"from": "gpt", "value": "a"}]}', 1, "from"),
    ("empty-turn", "a.jsonl", turn(role="user", content="  "), 1, "turn 2 (user)"),
    ("bad-part", "a.jsonl", turn(role="user", content=[{"type": "image_url"}]), 1, "image_url"),
    ("bad-part", "b.jsonl", turn(role="user", content=[1]), 1, "a number"),
    ("bad-weight", "a.jsonl", turn(role="assistant", content="a", weight=0.5), 1, "0.5"),
    ("bad-weight", "b.jsonl", turn(role="assistant", content="a", weight="1"), 1, "weight"),
    ("weight-not-assistant", "a.jsonl", turn(role="user", content="a", weight=1), 1, "user"),
    ("bad-tool-calls", "a.jsonl", call("x"), 1, "a text"),
    ("bad-tool-calls", "b.jsonl", call([3]), 1, "no object"),
    ("bad-tool-calls", "c.jsonl", call([{"function": {}}]), 1, "no function name"),
    ("bad-tool-calls", "d.jsonl", call([{"name": "f", "arguments": "{"}]), 1, "not JSON"),
    ("calls-not-assistant", "a.jsonl", turn(role="user", content="a", tool_calls=[{}]), 1, "user"),
    ("no-assistant", "a.jsonl", '{"messages": [{"role": "user", "content": "a"}]}', 1, "nothing"),
    ("bad-tools", "a.jsonl", '{"prompt": "a", "completion": "b", "tools": {"a": 1}}', 1, "tools"),
    ("bad-history", "a.jsonl", '{"prompt": "a", "completion": "b", "history": ["x"]}', 1, "pairs"),
    ("bad-cell", "a.csv", 'messages\n"[{]"\n', 2, "not JSON"),
    ("bad-cell", "b.jsonl", '{"prompt": "a", "completion": "b", "tools": "{"}', 1, "tools"),
]
ELSEWHERE = {
    "missing-file",
    "is-folder",
    "unreadable-file",
    "unknown-format",
    "wrong-format",
    "template-refuses",
    "template-hides",
    "private-characters",
    "too-long",
    "no-target",
    "cannot-split",  # tests/data/test_dataset.py
    "no-choices",  # tests/data/test_choice.py
    "few-choices",
    "label-count",
    "wrong-choice",
    "no-question",  # tests/serve/test_answers.py
    "no-number",
}
BY_COMMAND = {  # tests/data/test_bad_rows.py and test_bad_files.py
    "not-regular",
    "packed-file",
    "inner-bom",
    "long-line",
    "too-many-turns",
    "not-finite",
    "foreign-value",
    "control-token",
    "bad-parquet-row",
    "parquet-same-name",
}


def caught(error):
    """Fault name, after the checks that hold for every fault."""
    assert error.exit_code == 65
    assert error.reason
    assert error.fix
    assert "{" not in error.reason.replace("{[", "").replace('{"', "")
    return error.__notes__[0]


@pytest.mark.parametrize(
    ("name", "file", "content", "line", "words"), CASES, ids=[f"{c[0]}-{c[1]}" for c in CASES]
)
def test_a_bad_file_is_one_clear_error(write, name, file, content, line, words):
    path = write(file, content)
    with pytest.raises(Exception) as info:  # noqa: PT011 - the type is checked in caught()
        list(read_records(path))
    error = info.value
    assert caught(error) == name
    assert error.line == line
    assert error.path == str(path)
    assert words in error.reason
    assert str(error).startswith(f"{path}:{line}: " if line else f"{path}: ")


def test_every_fault_of_the_table_is_tested():
    assert {case[0] for case in CASES} | ELSEWHERE | BY_COMMAND == set(FAULTS)


def test_there_are_many_named_cases():
    assert len(CASES) + len(ELSEWHERE) >= 60


def test_fills_in_every_particular():
    for name, sentences in FAULTS.items():
        names = {f for s in sentences for _, f, _, _ in string.Formatter().parse(s) if f}
        given = {field.split(":")[0]: 1 for field in names}
        assert str(fault(name, path="p", line=2, **given)).startswith("p:2: ")


def test_missing_file_names_the_closest(write):
    path = write("train.jsonl", GOOD)
    with pytest.raises(Exception, match=r'did you mean "train.jsonl"') as info:
        list(read_records(path.with_name("trian.jsonl")))
    assert caught(info.value) == "missing-file"


def test_folder(write, tmp_path):
    write("train.jsonl", GOOD)
    with pytest.raises(Exception, match=r"train\.jsonl") as info:
        list(read_records(tmp_path))
    assert caught(info.value) == "is-folder"


def test_unreadable_file(write, monkeypatch):
    path = write("train.jsonl", GOOD)

    def refuse(*_args, **_kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(path), "open", refuse)
    with pytest.raises(Exception, match="Permission denied") as info:
        list(read_records(path))
    assert caught(info.value) == "unreadable-file"


def test_unknown_format_name(write):
    with pytest.raises(Exception, match='did you mean "alpaca"') as info:
        list(read_records(write("a.jsonl", GOOD), format="alpacca"))
    assert caught(info.value) == "unknown-format"


@pytest.mark.parametrize("format", ["messages", "sharegpt", "alpaca", "text"])
def test_columns_of_another_format(write, format):
    with pytest.raises(Exception, match="expected") as info:
        list(read_records(write("a.jsonl", GOOD), format=format))
    assert caught(info.value) == "wrong-format"


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% for m in messages %}", "line 1"),
        ("{{ raise_exception('roles must alternate') }}", 'it says "roles must alternate"'),
        ("{{ messages[9].content.x }}", "UndefinedError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
    ],
)
def test_template_refuses(byte_tokenizer, talk, template, words):
    byte_tokenizer.chat_template = template
    with pytest.raises(Exception, match=r"talk\.jsonl:7") as info:
        tokenize(talk("user: a", "assistant: b"), byte_tokenizer)
    assert caught(info.value) == "template-refuses"
    assert words in info.value.reason


def test_template_hides(byte_tokenizer, talk):
    byte_tokenizer.chat_template = "{{ messages[0].content }}"
    with pytest.raises(Exception, match="turn 2") as info:
        tokenize(talk("user: a", "assistant: b"), byte_tokenizer)
    assert caught(info.value) == "template-hides"


def test_private_characters(byte_tokenizer, talk):
    with pytest.raises(Exception, match="private planes") as info:
        tokenize(talk("user: \U000f0001\U00100001", "assistant: b"), byte_tokenizer)
    assert caught(info.value) == "private-characters"


def test_too_long_and_no_target(byte_tokenizer, talk):
    example = tokenize(talk("user: " + "a" * 50, "assistant: b"), byte_tokenizer)
    with pytest.raises(Exception, match=r"talk\.jsonl:7") as info:
        fit([example], 32, "stop")
    assert caught(info.value) == "too-long"
    with pytest.raises(Exception, match="no token") as info:
        fit([example], 32)
    assert caught(info.value) == "no-target"
    with pytest.raises(Exception, match="no token") as info:
        fit([], 32)
    assert caught(info.value) == "no-target"
