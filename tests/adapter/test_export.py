"""What each server wants, written and checked; trained adapters answer alike in llama.cpp."""

import json
import shlex

import pytest
import torch
from transformers import AutoModelForCausalLM

from nibble.adapter.config import CONFIG_FILE
from nibble.adapter.export import export, llama_cpp_commands
from nibble.adapter.format import read_adapter
from nibble.adapter.vocabulary import build_tokenizer
from nibble.commands.main import main
from nibble.data.chat import prompt_ids, tokenize
from nibble.data.records import read_records
from nibble.errors import AdapterError, UnavailableError, UsageError
from nibble.model.load import load_base
from nibble.model.tokenizer import load_tokenizer

pytest.importorskip("gguf")
peft = pytest.importorskip("peft")
PROMPTS = ("How do I cancel my order?", "What is a list in Python?", "Tell me about the sea.")


@pytest.fixture(scope="module")
def trained(shared, tmp_path_factory):
    """The adapter folder of a few steps on base-16m, by method."""
    made = {}

    def of(method):
        if method not in made:
            made[method] = tmp_path_factory.mktemp("trained") / method
            words = ["train", "--model", str(shared / "models" / "base-16m"), "--method", method]
            words += ["--data", str(shared / "data" / "customer" / "eval.jsonl")]
            words += [
                "--out",
                str(made[method]),
                "--set",
                "train.steps=3",
                "--set",
                "optim.lr=2e-3",
            ]
            words += ["--set", "data.max_seq_len=128", "--set", "train.batch_size=4"]
            with pytest.raises(SystemExit) as stop:
                main(words)
            assert stop.value.code == 0
        return made[method] / "adapter"

    return of


@pytest.fixture(scope="module")
def merged(shared, trained, tmp_path_factory):
    """The transformers folder of the LoRA adapter on its 16-bit base, in float32."""
    folder = tmp_path_factory.mktemp("merged") / "model"
    base = AutoModelForCausalLM.from_pretrained(shared / "models" / "base-16m", dtype=torch.float32)
    peft.PeftModel.from_pretrained(base, trained("lora")).merge_and_unload().save_pretrained(folder)
    load_tokenizer(trained("lora")).save_pretrained(folder)
    return folder


def test_gguf_of_a_trained_adapter(trained, merged, read_gguf, tmp_path):
    made = export("gguf", trained("lora"), tmp_path / "out", merged=merged)
    assert [path.name for path in made.files] == [
        "adapter.gguf",
        "model.gguf",
        "chat_template.jinja",
    ]
    assert shlex.split(made.command)[:3] == ["llama-server", "-m", str(tmp_path / "out/model.gguf")]
    file = read_gguf(tmp_path / "out" / "model.gguf")
    assert file.types["blk.0.ffn_up.weight"] == "F32"
    template = (tmp_path / "out" / "chat_template.jinja").read_text()
    assert file.keys["tokenizer.chat_template"] == template


def test_exported_tokenizer_gives_the_ids_of_training(trained, merged, shared, read_gguf, tmp_path):
    """Every conversation of the held-out files of four domains, from the fields of the file."""
    export("gguf", trained("lora"), tmp_path, merged=merged)
    vocabulary = read_gguf(tmp_path / "model.gguf").vocabulary()
    rebuilt = build_tokenizer(vocabulary)
    tokenizer = load_tokenizer(trained("lora"))
    other = load_tokenizer(trained("lora"))
    other.chat_template = vocabulary.template
    count = 0
    for path in sorted((shared / "data").rglob("eval.jsonl")):
        for conversation in read_records(str(path)):
            expected = tokenize(conversation, tokenizer).input_ids
            turns = [{"role": m.role, "content": m.content} for m in conversation.messages]
            text = other.apply_chat_template(turns, tokenize=False)
            assert rebuilt.encode(text, add_special_tokens=False).ids == expected
            count += 1
    assert count > 500


def _llama_cpp_greedy(model, ids, *, adapter=None, count=24):
    llama_cpp = pytest.importorskip("llama_cpp")
    more = {} if adapter is None else {"lora_path": str(adapter)}
    loaded = llama_cpp.Llama(
        str(model), n_ctx=256, verbose=False, n_threads=1, type_k=0, type_v=0, **more
    )
    found = []
    for token in loaded.generate(ids, temp=0.0, repeat_penalty=1.0):
        found.append(token)
        if len(found) == count:
            break
    loaded.close()
    return found


@torch.no_grad()
def _nibble_greedy(model, ids, count=24):
    tokens = list(ids)
    for _ in range(count):
        tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(ids) :]


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_llama_cpp_says_the_same(trained, shared, tmp_path, method):
    """Greedy tokens of llama.cpp, base and adapter in two files, beside nibble's own."""
    llama_cpp = pytest.importorskip("llama_cpp")
    base = shared / "models" / "base-16m"
    export("gguf", trained(method), tmp_path, merged=base, dtype="f32")
    model, tokenizer = load_base(str(base), "float32")
    read_adapter(model, trained(method))
    for prompt in PROMPTS:
        ids = prompt_ids([{"role": "user", "content": prompt}], tokenizer)
        found = _llama_cpp_greedy(tmp_path / "model.gguf", ids, adapter=tmp_path / "adapter.gguf")
        assert found == _nibble_greedy(model, ids)
    loaded = llama_cpp.Llama(str(tmp_path / "model.gguf"), vocab_only=True, verbose=False)
    text = "<|im_start|>user\nIt's 2025,  naïve 🙂\n\n<|im_end|>"
    expected = tokenizer(text, add_special_tokens=False).input_ids
    assert loaded.tokenize(text.encode(), add_bos=True, special=True) == expected


def test_llama_cpp_says_the_same_of_the_merged_model(trained, merged, tmp_path):
    pytest.importorskip("llama_cpp")
    export("gguf", trained("lora"), tmp_path, merged=merged)
    model, tokenizer = load_base(str(merged), "float32")
    for prompt in PROMPTS:
        ids = prompt_ids([{"role": "user", "content": prompt}], tokenizer)
        assert _llama_cpp_greedy(tmp_path / "model.gguf", ids) == _nibble_greedy(model, ids)


def test_llama_cpp_tells_the_same_stories(shared, adapter_of, tmp_path):
    llama_cpp = pytest.importorskip("llama_cpp")
    base = shared / "models" / "stories260K"
    adapter = adapter_of(base)
    export("gguf", adapter, tmp_path, merged=base)
    model, tokenizer = load_base(str(base), "float32")
    starts = ("Once upon a time", "Lily was 3 years old.\nShe", "The dog said: “Ünder?”")
    loaded = llama_cpp.Llama(str(tmp_path / "model.gguf"), vocab_only=True, verbose=False)
    for text in starts:
        ids = tokenizer(text).input_ids
        assert loaded.tokenize(text.encode(), add_bos=True, special=True) == ids
        assert _llama_cpp_greedy(tmp_path / "model.gguf", ids) == _nibble_greedy(model, ids)
    read_adapter(model, adapter)
    ids = tokenizer(starts[0]).input_ids
    found = _llama_cpp_greedy(tmp_path / "model.gguf", ids, adapter=tmp_path / "adapter.gguf")
    assert found == _nibble_greedy(model, ids)


def test_vllm_folder_and_line(trained, shared, tmp_path):
    made = export("vllm", trained("qlora"), tmp_path / "support")
    folder = tmp_path / "support"
    assert shlex.split(made.command) == [
        "vllm", "serve", str(shared / "models" / "base-16m"), "--enable-lora",
        "--max-lora-rank", "16", "--lora-modules", f"support={folder}",
        "--chat-template", str(folder / "chat_template.jinja"),
    ]  # fmt: skip
    assert all(path.is_file() for path in made.files)
    assert "trained on a base in nf4" in made.notes[0]
    model, _ = load_base(str(shared / "models" / "base-16m"), "nf4")
    assert len(read_adapter(model, folder).names) == 56
    tokenizer, saved = load_tokenizer(trained("qlora")), load_tokenizer(folder)
    turns = [{"role": "user", "content": PROMPTS[0]}]
    assert prompt_ids(turns, saved) == prompt_ids(turns, tokenizer)


def test_ollama_with_and_without_a_merged_model(trained, merged, tmp_path):
    made = export("ollama", trained("lora"), tmp_path / "whole", merged=merged)
    text = (tmp_path / "whole" / "Modelfile").read_text()
    assert text.startswith('FROM ./model.gguf\nTEMPLATE """')
    assert 'PARAMETER stop "<|im_end|>"' in text
    assert made.command.startswith("ollama create whole -f ")
    assert made.notes == []
    made = export("ollama", trained("lora"), tmp_path / "part")
    text = (tmp_path / "part" / "Modelfile").read_text()
    assert "\nADAPTER ./adapter.gguf\n" in text
    assert "0.34.1" in made.notes[0]


def test_dora_is_refused_for_every_target(trained, tmp_path):
    import shutil

    adapter = tmp_path / "adapter"
    shutil.copytree(trained("lora"), adapter)
    config = json.loads((adapter / CONFIG_FILE).read_text())
    for key in ("use_dora", "modules_to_save"):
        (adapter / CONFIG_FILE).write_text(json.dumps({**config, key: ["x"]}))
        for target in ("gguf", "ollama", "vllm"):
            with pytest.raises(AdapterError, match=f"{key} = .* is not supported"):
                export(target, adapter, tmp_path / "out")


def test_another_template_in_the_merged_folder(trained, merged, tmp_path):
    import shutil

    other = tmp_path / "other"
    shutil.copytree(merged, other)
    path = other / "chat_template.jinja"
    path.write_text(path.read_text().replace("assistant", "bot"))
    with pytest.raises(UsageError, match="another chat template"):
        export("gguf", trained("lora"), tmp_path / "out", merged=other)


def test_another_model_in_the_merged_folder(trained, shared, tmp_path):
    with pytest.raises(UsageError, match=r"is another model than .*hidden_size is 64, not 384"):
        export("gguf", trained("lora"), tmp_path / "out", merged=shared / "models" / "stories260K")


def test_unknown_family_gets_the_commands(mergeable_folder, adapter_of, tmp_path):
    import shutil

    folder = tmp_path / "base"
    shutil.copytree(mergeable_folder("qwen3"), folder)
    adapter = adapter_of(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "olmo2"}))
    with pytest.raises(UnavailableError, match=r"convert_lora_to_gguf\.py") as error:
        export("gguf", adapter, tmp_path / "out", merged=folder)
    for command in llama_cpp_commands(adapter, str(folder), folder, tmp_path / "out"):
        assert command in error.value.fix
    assert not list((tmp_path / "out").glob("*")) if (tmp_path / "out").exists() else True


def test_out_is_not_what_is_read(trained):
    with pytest.raises(UsageError, match="a folder that is read"):
        export("vllm", trained("lora"), trained("lora"))


def test_no_package_no_file(trained, tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UnavailableError, match=r"pip install \"nibble\[gguf\]\""):
        export("gguf", trained("lora"), tmp_path / "out")
