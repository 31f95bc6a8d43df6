"""The data report: counts, marks, cut-offs, duplicates and bad rows."""

import json

import pytest

from nibble.data.check import Bin, CheckSettings, check_data

SETTINGS = CheckSettings("auto", 40, "assistant", num_rows_shown=2)


def rows(*pairs):
    return "\n".join(json.dumps({"prompt": p, "completion": c}) for p, c in pairs)


def check(write, tokenizer, train, eval=None):
    paths = [
        write(f"{name}.jsonl", text) for name, text in (("train", train), ("eval", eval or ""))
    ]
    return check_data(str(paths[0]), str(paths[1]) if eval else None, tokenizer, SETTINGS)


def test_counts_and_marks(byte_tokenizer, write):
    report = check(write, byte_tokenizer, rows(("a", "bb"), ("c", "")))
    assert report.is_good
    assert report.train.format == "prompt-completion"
    # <|im_start|> user \n a <|im_end|> \n <|im_start|> assistant \n bb <|im_end|> \n
    assert report.train.num_tokens == 2 * (1 + 4 + 1 + 1 + 1 + 1 + 1 + 9 + 1 + 1 + 1) + 2
    assert report.train.num_target_tokens == 3 + 1
    assert report.train.num_empty_answers == 1
    assert (report.train.median_len, report.train.longest_len) == (23, 24)
    assert report.train.histogram == [Bin(16, 32, 2)]
    assert [row.marked() for row in report.train.rows] == [
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n[[bb<|im_end|>]]\n",
        "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n[[<|im_end|>]]\n",
    ]


def test_histogram_covers_every_row_once(byte_tokenizer, write):
    texts = [("a", "b" * size) for size in (1, 9, 30, 100, 100, 400)]
    part = check(write, byte_tokenizer, rows(*texts)).train
    assert sum(b.num_rows for b in part.histogram) == len(texts)
    assert all(b.high == 2 * b.low for b in part.histogram)
    edges = [b.low for b in part.histogram]
    assert edges == [16 * 2**i for i in range(len(edges))]
    assert part.histogram[0] == Bin(16, 32, 2)


def test_cut_offs(byte_tokenizer, write):
    # 19 tokens and the prompt, then the answer, its end and a newline: the first loses 10 of 30
    part = check(write, byte_tokenizer, rows(("a", "b" * 29), ("a" * 30, "b"), ("a", "b"))).train
    cuts = {cut.max_seq_len: cut for cut in part.cut_offs}
    assert sorted(cuts) == [40, 256, 512, 1024, 2048, 4096, 8192]
    cut = cuts[40]
    assert cut.num_rows_cut == 2
    assert cut.share_of_rows == pytest.approx(2 / 3)
    assert cut.num_rows_without_target == 1
    assert cut.share_of_target_tokens_lost == pytest.approx((10 + 2) / (30 + 2 + 2))
    assert cuts[256].num_rows_cut == 0


def test_duplicates_are_counted_exactly(byte_tokenizer, write):
    train = rows(("a", "b"), ("A ", " b"), ("a", "b"), ("c", "d"))
    held = rows(("a", "B"), ("c", "other"), ("e", "f"), ("e", "f"))
    found = check(write, byte_tokenizer, train, held).duplicates
    assert found.num_within_train == 2
    assert found.num_within_eval == 1
    assert found.num_eval_in_train == 1
    assert found.num_eval_prompts_in_train == 2


def test_bad_rows_are_listed_with_line_reason_and_fix(byte_tokenizer, golden, write):
    byte_tokenizer.chat_template = golden.GEMMA.replace("System role not supported", "no")
    text = rows(("a", "b")) + '\n{"prompt": 1, "completion": "b"}\n{\n' + rows(("c", "d"))
    report = check(write, byte_tokenizer, text)
    assert not report.is_good
    assert [(bad.line, bad.reason.split(",")[0]) for bad in report.train.bad_rows] == [
        (2, 'the field "prompt" is a number'),
        (3, "column 2: Expecting property name enclosed in double quotes"),
    ]
    assert all(bad.fix and bad.path.endswith("train.jsonl") for bad in report.train.bad_rows)
    assert report.train.num_rows == 2


def test_only_bad_rows_or_no_target_is_not_good(byte_tokenizer, write):
    report = check(write, byte_tokenizer, "{\n{")
    assert (report.is_good, report.train.num_rows) == (False, 0)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]
    report = check(write, byte_tokenizer, json.dumps({"messages": turns}))
    assert (report.is_good, report.train.num_rows_without_target) == (False, 1)


def test_to_dict_is_json_with_a_version(byte_tokenizer, write):
    report = check(write, byte_tokenizer, rows(("a", "b")), rows(("c", "d")))
    document = json.loads(json.dumps(report.to_dict()))
    assert document["version"] == 1
    assert document["is_good"] is True
    assert set(document) == {"version", "is_good", "train", "eval", "duplicates", "settings"}
    assert document["train"]["rows"][0]["parts"][1] == ["b<|im_end|>", True]


def test_text_is_never_truncated(byte_tokenizer, write):
    path = write("a.txt", "word " * 100)
    part = check_data(str(path), None, byte_tokenizer, SETTINGS).train
    assert part.num_target_tokens == part.num_tokens - 1
    assert all(cut.num_rows_cut == 0 for cut in part.cut_offs)
