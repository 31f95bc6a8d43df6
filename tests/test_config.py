"""What a run is, and every way to say it wrongly."""

import pytest

from nibble.config import RunConfig, keys, load_config
from nibble.errors import UsageError


def test_origin_of_every_value(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("optim:\n  lr: 1e-4\nlora:\n  rank: 8\n")
    run = load_config(recipe, ["lora.rank=4"])
    assert (run.optim.lr, run.lora.rank) == (1e-4, 4)
    assert [run.origin(k) for k in ("optim.lr", "lora.rank", "lora.alpha")] == [
        "file",
        "flag",
        "default",
    ]


def test_with_values_keeps_and_adds_origins():
    run = load_config(None, ["lora.rank=4"]).with_values({"method": "qlora"}, "planner")
    assert (run.method, run.origin("method"), run.origin("lora.rank")) == (
        "qlora",
        "planner",
        "flag",
    )


@pytest.mark.parametrize("key", keys())
def test_every_field_has_a_sentence_and_a_memory_effect(key):
    field = keys()[key]
    assert field.description
    assert field.description.endswith(".")
    assert field.json_schema_extra["memory"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optm.lr=1", "unknown config key 'optm': did you mean \"optim\"?"),
        ("optim.lrr=1", 'did you mean "optim.lr"?'),
        ("optim.lr=-1", "optim.lr: input should be greater than 0, got -1"),
        ("optim.lr=.nan", "optim.lr: input should be a finite number"),
        ("lora.rank=0", "lora.rank: input should be greater than or equal to 1, got 0"),
        ("lora.dropout=1", "lora.dropout: input should be less than 1"),
        ("method=qlor", "method: input should be 'auto', 'lora', 'qlora' or 'full'"),
        ("train.micro_batch_size=x", "train.micro_batch_size"),
        ("train.save_every=3x", "train.save_every"),
        ("data.eval=1.5", "data.eval"),
        ("quant.block_size=63", "quant.block_size"),
        ("nonsense", "is not of the form section.key=value"),
        ("lora.rank.x=1", "lora.rank"),
        ("model=3", "model"),
    ],
)
def test_bad_override(override, message):
    with pytest.raises(UsageError) as error:
        load_config(None, [override])
    assert message in str(error.value)
    assert error.value.exit_code == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1\n", "holds list"),
        ("optim: [\n", "not valid YAML"),
        ("optim:\n  lr: 1\n  lr: 2\n", "stands twice"),
        ("optim:\n  lrr: 1\n", "recipe.yaml:2: unknown config key"),
    ],
)
def test_bad_file(tmp_path, text, message):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    with pytest.raises(UsageError) as error:
        load_config(recipe)
    assert message in str(error.value)


def test_missing_file(tmp_path):
    with pytest.raises(UsageError, match="does not exist"):
        load_config(tmp_path / "none.yaml")


def test_schema_is_complete():
    schema = RunConfig.model_json_schema()
    described = {name for part in schema["$defs"].values() for name in part["properties"]}
    assert {key.rpartition(".")[2] for key in keys()} <= described | set(schema["properties"])
