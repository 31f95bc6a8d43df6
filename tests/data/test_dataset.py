"""From the data section to rows: every example is accounted for."""

import json

import pytest

from nibble.config import DataConfig
from nibble.data.chat import NOT_TARGET
from nibble.data.dataset import build_dataset, fingerprint
from nibble.errors import DataError, UsageError

SETS = {
    "biomedical": "alpaca",
    "legal": "messages",
    "customer": "sharegpt",
    "code": "prompt-completion",
    "maths": "prompt-completion",
}


def lines(*pairs):
    rows = [json.dumps({"prompt": prompt, "completion": answer}) for prompt, answer in pairs]
    return "\n".join(rows) + "\n"


def numbered(count, start=0):
    return lines(*((f"What is {n}?", f"It is {n}.") for n in range(start, start + count)))


def config(train, **changes):
    sources = [str(path) for path in train] if isinstance(train, list) else str(train)
    return DataConfig(**{"train": sources, "max_seq_len": 128} | changes)


def texts(rows, tokenizer):
    """The decoded documents of rows."""
    found = []
    for row in rows:
        ids, start = row.input_ids.tolist(), 0
        for size in row.doc_lens:
            found.append(tokenizer.decode(ids[start : start + size]))
            start += size
    return found


def test_packs_train_and_keeps_eval_apart(write, byte_tokenizer):
    train, held = write("a.jsonl", numbered(10)), write("b.jsonl", numbered(3, start=50))
    found = build_dataset(config(train, eval=str(held)), byte_tokenizer, seed=0)

    assert len(found.train) < 10
    assert [len(row.doc_lens) for row in found.eval] == [1, 1, 1]
    assert sorted(texts(found.train, byte_tokenizer)) == [
        f"<|im_start|>user\nWhat is {n}?<|im_end|>\n<|im_start|>assistant\nIt is {n}.<|im_end|>\n"
        for n in range(10)
    ]
    report = found.report
    assert (report.train.num_read, report.train.num_documents) == (10, 10)
    assert report.train.num_rows == len(found.train)
    assert report.train.num_tokens == sum(len(row) for row in found.train)
    assert report.train.num_target_tokens == sum(row.num_target_tokens for row in found.train)
    efficiency = report.train.num_tokens / (128 * len(found.train))
    assert report.train.packing_efficiency == pytest.approx(efficiency)
    assert report.eval.num_documents == 3
    assert report.formats == ("prompt-completion",)
    assert found.warnings == []
    assert json.dumps(report.to_dict())


def test_packing_changes_no_token(write, byte_tokenizer):
    train = write("a.jsonl", numbered(9))
    packed = build_dataset(config(train), byte_tokenizer, seed=0)
    apart = build_dataset(config(train, packing=False), byte_tokenizer, seed=0)
    assert len(apart.train) == 9
    assert texts(apart.train, byte_tokenizer) == sorted(texts(packed.train, byte_tokenizer))
    assert packed.report.train.num_target_tokens == apart.report.train.num_target_tokens


def test_several_files_may_have_several_formats(write, byte_tokenizer):
    first = write("a.jsonl", numbered(2))
    second = write("b.txt", "Some text.")
    found = build_dataset(config([first, second]), byte_tokenizer, seed=0)
    assert found.report.formats == ("prompt-completion", "text")
    assert "Some text.</s>" in texts(found.train, byte_tokenizer)


def test_a_fraction_is_a_seeded_split_that_keeps_equals_together(write, byte_tokenizer):
    train = write("a.jsonl", numbered(40) + lines(*[("Same?", "Same.")] * 10))

    def halves(seed):
        found = build_dataset(config(train, eval=0.2), byte_tokenizer, seed=seed)
        return texts(found.train, byte_tokenizer), texts(found.eval, byte_tokenizer)

    kept, held = halves(0)
    assert len(kept) + len(held) == 50
    assert 10 <= len(held) < 20
    assert not set(kept) & set(held)
    assert halves(0) == (kept, held)
    assert halves(1)[1] != held


def test_a_fraction_of_one_text_file_holds_out_pieces(write, byte_tokenizer):
    words = " ".join(str(n) for n in range(1000))
    found = build_dataset(config(write("a.txt", words), eval=0.1), byte_tokenizer, seed=0)
    pieces = texts(found.train, byte_tokenizer) + texts(found.eval, byte_tokenizer)
    assert sum(len(piece) for piece in pieces) == len(words + "</s>")
    assert found.report.eval.num_rows == round(0.1 * len(pieces))


def test_a_fraction_needs_two_examples(write, byte_tokenizer):
    train = write("a.jsonl", lines(("Same?", "Same."), ("Same?", "Same.")))
    with pytest.raises(DataError, match="a part of 1 different examples, expected two"):
        build_dataset(config(train, eval=0.5), byte_tokenizer, seed=0)


def test_bad_rows_stop_or_are_listed(write, byte_tokenizer):
    train = write("a.jsonl", numbered(2) + "{broken\n" + '{"prompt": 1, "completion": ""}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:3: column 2"):
        build_dataset(config(train), byte_tokenizer, seed=0)

    found = build_dataset(config(train, on_bad_row="skip"), byte_tokenizer, seed=0)
    assert (found.report.train.num_read, found.report.train.num_bad) == (4, 2)
    assert len(found.warnings) == 1
    assert "2 of 4 rows are bad and were skipped" in found.warnings[0]
    assert "a.jsonl:3" in found.warnings[0]
    assert "a.jsonl:4" in found.warnings[0]


def test_rows_that_the_template_refuses_are_bad_rows(write, byte_tokenizer):
    byte_tokenizer.chat_template = (
        "{% for m in messages %}{% if 'no' in m['content'] %}{{ raise_exception('no') }}{% endif %}"
        "{{ m['role'] + ':' + m['content'] + eos_token }}{% endfor %}"
    )
    train = write("a.jsonl", lines(("yes", "yes"), ("no", "yes"), ("yes", "so")))
    with pytest.raises(DataError, match=r"a\.jsonl:2: the model's chat template"):
        build_dataset(config(train), byte_tokenizer, seed=0)
    found = build_dataset(config(train, on_bad_row="skip"), byte_tokenizer, seed=0)
    assert (found.report.train.num_read, found.report.train.num_bad) == (3, 1)
    assert len(texts(found.train, byte_tokenizer)) == 2


@pytest.mark.parametrize(
    "content", ["{broken\n", '{"messages": [{"role": "user", "content": "a"}]}\n']
)
def test_nothing_usable_is_an_error_even_with_skip(write, byte_tokenizer, content):
    train = write("a.jsonl", content)
    with pytest.raises(DataError, match="train has no usable row of 1") as info:
        build_dataset(config(train, on_bad_row="skip"), byte_tokenizer, seed=0)
    assert info.value.exit_code == 65


def test_weights_of_zero_leave_no_target(write, byte_tokenizer):
    turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "weight": 0},
    ]
    train = write("a.jsonl", json.dumps({"messages": turns}))
    with pytest.raises(DataError, match=r"a\.jsonl: no token of the data is a target"):
        build_dataset(config(train), byte_tokenizer, seed=0)


@pytest.mark.parametrize(
    ("on_long_row", "num_documents", "word"),
    [("truncate", 2, "cut at"), ("drop", 1, "dropped: longer")],
)
def test_long_rows_are_told(write, byte_tokenizer, on_long_row, num_documents, word):
    train = write("a.jsonl", lines(("Short?", "Yes."), ("Long?", "x" * 300)))
    found = build_dataset(config(train, on_long_row=on_long_row), byte_tokenizer, seed=0)
    assert found.report.train.num_documents == num_documents
    assert len(found.warnings) == 1
    assert found.warnings[0].startswith("train: 1 of 2 rows")
    assert word in found.warnings[0]
    assert "a.jsonl:2 " in found.warnings[0]


@pytest.mark.parametrize(("size", "is_told"), [(300, False), (3000, True)])
def test_few_targets_are_told(write, byte_tokenizer, size, is_told):
    path = write("a.jsonl", lines(("a" * size, "b" * 9)))
    found = build_dataset(config(path, max_seq_len=4096), byte_tokenizer, seed=0)
    assert any("of the tokens are targets" in warning for warning in found.warnings) == is_told
    assert len(found.warnings) == is_told


def test_train_on_decides_the_targets(write, byte_tokenizer):
    turns = [("user", "Hi."), ("assistant", "One."), ("user", "More."), ("assistant", "Two.")]
    row = {"messages": [{"role": role, "content": text} for role, text in turns]}
    train = write("a.jsonl", json.dumps(row))

    def trained(train_on):
        rows = build_dataset(config(train, train_on=train_on), byte_tokenizer, seed=0).train
        return byte_tokenizer.decode([i for i in rows[0].labels.tolist() if i != NOT_TARGET])

    assert trained("assistant") == "One.<|im_end|>Two.<|im_end|>"
    assert trained("last") == "Two.<|im_end|>"
    # all but the very first token, which nothing stands before
    assert trained("all").startswith("user\nHi.<|im_end|>\n<|im_start|>assistant\nOne.")


def test_eval_rows_that_stand_in_train_are_told(write, byte_tokenizer):
    train = write("a.jsonl", lines(("What  IS it?", "A cat."), ("b", "c")))
    held = write("b.jsonl", lines(("what is it?", "A CAT."), ("other", "row")))
    found = build_dataset(config(train, eval=str(held)), byte_tokenizer, seed=0)
    assert found.report.num_duplicates == 1
    assert found.warnings == [
        "1 of 2 eval examples are in train too: the held-out loss flatters the model"
    ]


def test_no_source_is_a_usage_error(byte_tokenizer):
    with pytest.raises(UsageError, match="no training data is named"):
        build_dataset(DataConfig(), byte_tokenizer, seed=0)


def test_fingerprint_knows_who_speaks(talk):
    assert fingerprint(talk("user: A  b")) == fingerprint(talk("user: a B"))
    assert fingerprint(talk("user: a b")) != fingerprint(talk("assistant: a b"))
    assert fingerprint(talk("user: a", "assistant: b")) != fingerprint(talk("user: ab"))


@pytest.mark.parametrize("name", SETS)
def test_real_sets(shared, name):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / "base-16m")
    held = shared / "data" / name / "eval.jsonl"
    data = config(held, eval=str(held), max_seq_len=512)
    found = build_dataset(data, tokenizer, seed=0)
    assert found.report.formats == (SETS[name],)
    assert found.report.train.num_read == found.report.num_duplicates > 100
    assert found.report.train.num_bad == found.report.eval.num_bad == 0
    assert found.report.train.packing_efficiency > 0.9
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    for row in found.eval:
        targets = row.labels[row.labels != NOT_TARGET].tolist()
        assert targets
        assert targets.count(end) == 1 or len(row) == 512
