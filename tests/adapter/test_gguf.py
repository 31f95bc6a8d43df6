"""GGUF files hold the tensors of the folders, every value, and llama.cpp answers alike."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from nibble.adapter.config import CONFIG_FILE
from nibble.adapter.format import WEIGHTS_FILE
from nibble.adapter.gguf import write_adapter_gguf, write_model_gguf
from nibble.adapter.layout import Place, place
from nibble.adapter.vocabulary import check_ids
from nibble.errors import AdapterError, ModelError, UnavailableError
from nibble.model.files import read_config
from nibble.model.skeleton import build_config
from nibble.model.tokenizer import load_tokenizer

pytest.importorskip("gguf")

FAMILIES = ("llama", "mistral", "falcon-7b", "falcon-40b", "qwen2", "qwen3", "gemma", "gemma2",
            "gemma3", "phi3", "mixtral", "qwen3_moe")  # fmt: skip
REAL = ("base-16m", "stories260K")
IDS = list(range(6, 30))


def _undone(tensor, where):
    """The rows and values as transformers has them."""
    tensor = tensor - where.shift if where.shift else tensor
    if where.rows is None:
        return tensor
    back = torch.empty_like(tensor)
    back[where.rows] = tensor
    return back


def _check_model(file, folder):
    config = build_config(read_config(folder))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    left = set(file.tensors)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            assert "output.weight" not in file.tensors
            continue
        for found, expected in _parts(file, config, name, weight):
            left.remove(found)
            is_stacked = ".experts." in name
            where = Place(found) if is_stacked else place(config, _module(name))
            back = _undone(file.tensors[found], where)
            torch.testing.assert_close(back, expected, rtol=0, atol=2e-7 if "norm" in name else 0)
    assert not left


def _module(name):
    return name.removesuffix(".weight").removesuffix(".bias")


def _parts(file, config, name, weight):
    """The tensors of the file that hold a parameter, and what each has to be."""
    if ".experts." not in name:
        yield f"{place(config, _module(name)).name}.{name.rpartition('.')[2]}", weight
        return
    experts, _, part = _module(name).rpartition(".")
    if part == "down_proj":
        yield f"{place(config, f'{experts}.down_proj').name}.weight", weight
        return
    for half, value in zip(("gate_proj", "up_proj"), weight.chunk(2, dim=1), strict=True):
        yield f"{place(config, f'{experts}.{half}').name}.weight", value


@pytest.mark.parametrize("family", FAMILIES)
def test_model_file_holds_every_tensor(mergeable_folder, read_gguf, tmp_path, family):
    folder = mergeable_folder(family)
    write_model_gguf(folder, tmp_path / "model.gguf", dtype="f32")
    _check_model(read_gguf(tmp_path / "model.gguf"), folder)


@pytest.mark.parametrize("name", REAL)
def test_model_file_of_real_models(shared, read_gguf, tmp_path, name):
    folder = shared / "models" / name
    write_model_gguf(folder, tmp_path / "model.gguf")
    file = read_gguf(tmp_path / "model.gguf")
    is_16bit = name == "base-16m"
    assert file.types["blk.0.ffn_up.weight"] == ("BF16" if is_16bit else "F32")
    assert file.types["blk.0.attn_norm.weight"] == "F32"
    file.tensors = {key: tensor.float() for key, tensor in file.tensors.items()}
    _check_model(file, folder)
    tokenizer = load_tokenizer(folder)
    check_ids(file.vocabulary(), tokenizer)
    assert file.keys["general.architecture"] == "llama"
    assert file.keys["general.file_type"] == (32 if is_16bit else 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_adapter_file_holds_every_factor(mergeable_folder, adapter_of, read_gguf, tmp_path, family):
    folder = mergeable_folder(family)
    adapter = adapter_of(folder)
    count = write_adapter_gguf(adapter, read_config(folder), tmp_path / "adapter.gguf")
    file = read_gguf(tmp_path / "adapter.gguf")
    assert len(file.tensors) == count
    assert file.keys["general.type"] == "adapter"
    assert file.keys["adapter.type"] == "lora"
    assert file.keys["adapter.lora.alpha"] == 6.0
    config = build_config(read_config(folder))
    factors = load_file(adapter / WEIGHTS_FILE)
    for key, factor in factors.items():
        module = key.removeprefix("base_model.model.").rpartition(".lora_")[0]
        if ".experts" in module:
            continue
        where = place(config, module)
        if key.endswith("lora_A.weight"):
            assert torch.equal(file.tensors[f"{where.name}.weight.lora_a"], factor)
        else:
            assert torch.equal(_undone(file.tensors[f"{where.name}.weight.lora_b"], where), factor)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_factors_of_experts(mergeable_folder, adapter_of, read_gguf, tmp_path, family):
    folder = mergeable_folder(family)
    adapter = adapter_of(folder)
    write_adapter_gguf(adapter, read_config(folder), tmp_path / "adapter.gguf")
    tensors = read_gguf(tmp_path / "adapter.gguf").tensors
    factors = load_file(adapter / WEIGHTS_FILE)
    for part, nested in {"ffn_down_exps": "", "ffn_up_exps": "base_layer."}.items():
        key = f"base_model.model.model.layers.1.mlp.experts.{nested}lora_"
        lora_A, lora_B = factors[f"{key}A.weight"], factors[f"{key}B.weight"]
        for expert in range(4):
            # PEFT: experts one after the other in A, in turn in B.
            expected = lora_B[:, expert::4] @ lora_A[expert * 3 : expert * 3 + 3]
            if nested:
                expected = expected.chunk(2)[1]
            down = tensors[f"blk.1.{part}.weight.lora_a"][expert]
            up = tensors[f"blk.1.{part}.weight.lora_b"][expert]
            torch.testing.assert_close(up @ down, expected)


def test_a_name_that_llama_cpp_would_act_upon(mergeable_folder, read_gguf, tmp_path):
    write_model_gguf(mergeable_folder("phi3"), tmp_path / "my-Phi-3" / "model.gguf")
    assert read_gguf(tmp_path / "my-Phi-3" / "model.gguf").keys["general.name"] == "model"


def _phi3_tokens(folder, *, missing=""):
    """Special tokens as Phi-3 has them: all but three take the white space after them."""
    parts = json.loads((folder / "tokenizer.json").read_text())
    names = ("<unk>", "<|endoftext|>", "<|user|>", "<|end|>", "<|assistant|>")
    ids = {"<s>": 0, "</s>": 1} | {name: 262 + number for number, name in enumerate(names)}
    parts["added_tokens"] = [
        {"id": number, "content": name, "special": True, "normalized": False,
         "single_word": False, "lstrip": False,
         "rstrip": name not in ("<unk>", "<s>", "<|endoftext|>", missing)}
        for name, number in ids.items()
    ]  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(parts))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>"}
    config |= {"eos_token": "<|endoftext|>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    )


def test_tokens_that_take_white_space(mergeable_folder, read_gguf, tmp_path):
    folder = _changed(mergeable_folder("phi3"), tmp_path, _phi3_tokens)
    write_model_gguf(folder, tmp_path / "model.gguf")
    tokenizer = load_tokenizer(folder)
    text = "<|user|>\n  the cat <|end|>\n<|assistant|>\n"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert ids[1] == tokenizer("the", add_special_tokens=False).input_ids[0]
    check_ids(read_gguf(tmp_path / "model.gguf").vocabulary(), tokenizer, [text])
    llama_cpp = pytest.importorskip("llama_cpp")
    loaded = llama_cpp.Llama(str(tmp_path / "model.gguf"), vocab_only=True, verbose=False)
    assert loaded.tokenize(text.encode(), add_bos=False, special=True) == ids


def test_tokens_of_which_one_takes_no_white_space(mergeable_folder, tmp_path):
    folder = _changed(
        mergeable_folder("phi3"), tmp_path, lambda f: _phi3_tokens(f, missing="<|user|>")
    )
    with pytest.raises(UnavailableError, match="takes the white space after it"):
        write_model_gguf(folder, tmp_path / "model.gguf")


def test_rslora_keeps_its_scale(mergeable_folder, adapter_of, read_gguf, tmp_path):
    folder = mergeable_folder("llama")
    adapter = adapter_of(folder, rslora=True)
    write_adapter_gguf(adapter, read_config(folder), tmp_path / "adapter.gguf")
    alpha = read_gguf(tmp_path / "adapter.gguf").keys["adapter.lora.alpha"]
    assert alpha / 3 == pytest.approx(6 / 3**0.5)


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_sixteen_bits(mergeable_folder, read_gguf, tmp_path, dtype):
    folder = mergeable_folder("qwen3")
    write_model_gguf(folder, tmp_path / "model.gguf", dtype=dtype)
    file = read_gguf(tmp_path / "model.gguf")
    stored = load_file(folder / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    kind = torch.float16 if dtype == "f16" else torch.bfloat16
    assert torch.equal(file.tensors["blk.0.ffn_up.weight"], stored.to(kind))
    assert file.types["blk.0.attn_q_norm.weight"] == "F32"


def _changed(folder, tmp_path, edit):
    copy = tmp_path / "changed"
    shutil.copytree(folder, copy)
    edit(copy)
    return copy


def _config(**values):
    def edit(folder):
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return edit


def _weights(edit):
    def change(folder):
        tensors = load_file(folder / "model.safetensors")
        edit(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return change


SPOILT = {
    "unknown family": (_config(model_type="stablelm"), UnavailableError, "does not know"),
    "other activation": (_config(hidden_act="relu"), UnavailableError, "activation is relu"),
    "missing": (_weights(lambda t: t.pop("model.norm.weight")), ModelError, "lacks tensors"),
    "too large": (_weights(lambda t: t["lm_head.weight"].fill_(1e9)), ModelError, "beyond"),
    "nan": (_weights(lambda t: t["lm_head.weight"].fill_(float("nan"))), ModelError, "NaN"),
    "4 bits": (_config(quantization_config={"load_in_4bit": True}), UnavailableError, "4 bits"),
}


@pytest.mark.parametrize("case", SPOILT)
def test_spoilt_model(mergeable_folder, tmp_path, case):
    edit, kind, message = SPOILT[case]
    folder = _changed(mergeable_folder("llama"), tmp_path, edit)
    with pytest.raises(kind, match=message):
        write_model_gguf(folder, tmp_path / "out" / "model.gguf", dtype="f16")
    assert not list(tmp_path.glob("out/*"))


def test_spoilt_adapter(mergeable_folder, adapter_of, tmp_path):
    folder = mergeable_folder("llama")
    adapter = _changed(adapter_of(folder), tmp_path, lambda f: None)
    path = adapter / CONFIG_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), "r": 2}))
    with pytest.raises(AdapterError, match="has shape"):
        write_adapter_gguf(adapter, read_config(folder), tmp_path / "adapter.gguf")


def _llama_cpp_logits(model, ids, adapter=None):
    llama_cpp = pytest.importorskip("llama_cpp")
    more = {} if adapter is None else {"lora_path": str(adapter)}
    # 0 is float32: the default cache of 16 bits would round.
    loaded = llama_cpp.Llama(
        str(model),
        n_ctx=64,
        logits_all=True,
        verbose=False,
        n_threads=1,
        type_k=0,
        type_v=0,
        **more,
    )
    loaded.eval(ids)
    logits = torch.tensor(np.array(loaded.scores[: len(ids)]))
    loaded.close()
    return logits


@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_agrees(mergeable_folder, adapter_of, tmp_path, family):
    """Logits of llama.cpp itself, base and base with adapter, beside transformers and PEFT."""
    pytest.importorskip("llama_cpp")
    peft = pytest.importorskip("peft")
    folder = mergeable_folder(family)
    adapter = adapter_of(folder)
    write_model_gguf(folder, tmp_path / "model.gguf", dtype="f32")
    write_adapter_gguf(adapter, read_config(folder), tmp_path / "adapter.gguf")
    # llama.cpp has no window for these two; that of the tiny models is 4 tokens.
    ids = IDS[:4] if family in ("mistral", "phi3") else IDS
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        plain = model(torch.tensor([ids])).logits[0]
        adapted = peft.PeftModel.from_pretrained(model, adapter).eval()(torch.tensor([ids]))
    for expected, file in ((plain, None), (adapted.logits[0], tmp_path / "adapter.gguf")):
        found = _llama_cpp_logits(tmp_path / "model.gguf", ids, file)
        assert (found - expected).abs().max() <= 5e-3 * expected.abs().max()
        assert torch.equal(found.argmax(-1), expected.argmax(-1))
    assert (adapted.logits[0] - plain).abs().max() > 0.5
