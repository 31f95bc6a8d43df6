"""Exit codes and messages."""

from nibble import errors


def test_exit_codes_are_those_of_the_contract():
    codes = {
        "NibbleError": 1,
        "UsageError": 2,
        "DataError": 65,
        "ModelError": 65,
        "AdapterError": 65,
        "UnavailableError": 69,
        "FolderInUseError": 73,
        "DiskError": 74,
        "StoppedError": 75,
        "NonFiniteError": 76,
        "OutOfMemoryError": 77,
        "DoesNotFitError": 78,
        "RunInterrupted": 130,
    }
    kinds = {
        name: kind
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and issubclass(kind, errors.NibbleError)
    }
    assert {name: kind.exit_code for name, kind in kinds.items()} == codes


def test_message_says_where_and_how_to_fix():
    error = errors.DataError("no text", path="a.jsonl", line=3, fix="fill it")
    assert str(error) == "a.jsonl:3: no text\n  fix: fill it"


def test_did_you_mean():
    assert errors.did_you_mean("qlor", ["lora", "qlora"]) == 'did you mean "qlora"?'
    assert errors.did_you_mean("zzz", ["lora"]) == ""
