"""What each server wants: the files, and the line that starts it.

gguf      adapter.gguf, and model.gguf of a merged folder     llama-server
ollama    the same with a Modelfile                           ollama create
vllm      an adapter folder                                   vllm serve
"""

import json
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from nibble.adapter.config import CONFIG_FILE, AdapterConfig, adapter_folder, read_adapter_config
from nibble.adapter.format import WEIGHTS_FILE, read_base_options, read_factors
from nibble.adapter.gguf import ADAPTER_FILE, MODEL_FILE, write_adapter_gguf, write_model_gguf
from nibble.adapter.layout import notes as layout_notes
from nibble.adapter.limits import Update, check_limits, vllm_rank
from nibble.adapter.ollama import find_wrapping, modelfile
from nibble.adapter.updates import with_experts
from nibble.adapter.vocabulary import Vocabulary, adds_bos, check_ids, portable_template
from nibble.disk import disk_errors, replace_file
from nibble.errors import AdapterError, ModelError, UnavailableError, UsageError
from nibble.model.adapt import linear_layers
from nibble.model.files import find_config, find_tokenizer, read_config
from nibble.model.skeleton import build_config, build_skeleton
from nibble.model.tokenizer import TEMPLATE_FILE, load_tokenizer

# What a merged model has in common with its base.
_SIZES = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")
_README = "README.md"
_MODELFILE = "Modelfile"


@dataclass
class Exported:
    """What was written, how to serve it, and what one should know.

    Args:
        files: Those of this export, in order.
        command: The line that serves it.
        notes: Sentences about what is not, or not quite, as in training.
    """

    folder: Path
    files: list[Path]
    command: str
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Source:
    """An adapter with the base that it names."""

    folder: Path
    config: AdapterConfig
    base: str
    values: Mapping[str, Any]
    tokenizer: Any
    update: Update


def export(
    target: str,
    adapter: Path,
    out: Path,
    *,
    merged: Path | None = None,
    model: str = "",
    dtype: str = "auto",
) -> Exported:
    """Write an adapter for one of the servers.

    Args:
        target: gguf, ollama or vllm.
        merged: Transformers folder with the adapter folded in, for model.gguf.
        model: The base; empty takes the one that the adapter names.
        dtype: Of the matrices in model.gguf: auto, f32, f16, bf16.

    Raises:
        UsageError: If the server would not load it.
        AdapterError: If the adapter folder is broken.
        UnavailableError: If the base is not there, or no right file can be written.
    """
    adapter = adapter_folder(adapter)
    if out.resolve() in (adapter.resolve(), merged and merged.resolve()):
        raise UsageError("--out is a folder that is read", fix="give another folder for --out")
    source = _read_source(adapter, model)
    told = check_limits(target, source.update, str(source.values["model_type"]))
    if target == "vllm":
        if merged is not None:
            raise UsageError(
                "vLLM reads a merged folder as it is", fix=f"vllm serve {shlex.quote(str(merged))}"
            )
        made = _export_vllm(source, out)
    else:
        made = _export_gguf(source, out, merged, dtype)
        if target == "ollama":
            _add_modelfile(source, made, merged)
            told = [] if merged else told
    if merged is None:
        told += _storage_notes(adapter)
    made.notes = [*told, *made.notes, *_template_notes(source.tokenizer)]
    return made


def llama_cpp_commands(adapter: Path, base: str, merged: Path | None, out: Path) -> list[str]:
    """llama.cpp's own scripts, for what nibble writes no file of."""
    lora = ["python", "convert_lora_to_gguf.py", str(adapter)]
    base_flag = ["--base", base] if Path(base).is_dir() else ["--base-model-id", base]
    commands = [[*lora, *base_flag, "--outfile", str(out / ADAPTER_FILE)]]
    if merged is not None:
        whole = ["python", "convert_hf_to_gguf.py", str(merged)]
        commands.append([*whole, "--outfile", str(out / MODEL_FILE)])
    return [shlex.join(command) for command in commands]


def _read_source(adapter: Path, model: str) -> _Source:
    config = read_adapter_config(adapter)
    base = model or config.base
    if not base:
        raise AdapterError(f"{adapter} names no base", fix="give it by --model")
    values = find_config(base, None if model else config.revision)
    try:
        tokenizer = load_tokenizer(adapter)
    except ModelError:
        tokenizer = load_tokenizer(find_tokenizer(base))
    model_of = build_skeleton(build_config(dict(values)), torch.bfloat16)
    layers = read_factors(adapter, linear_layers(with_experts(model_of))).layers
    has_experts = any(name.endswith(".experts") for name in layers)
    update = Update(config.rank, layers, has_experts)
    return _Source(adapter, config, base, values, tokenizer, update)


def _export_gguf(source: _Source, out: Path, merged: Path | None, dtype: str) -> Exported:
    try:
        write_adapter_gguf(source.folder, source.values, out / ADAPTER_FILE)
        files = [out / ADAPTER_FILE]
        if merged is None:
            vocabulary = None
        else:
            _check_same_model(source, read_config(merged), merged)
            vocabulary = write_model_gguf(merged, out / MODEL_FILE, dtype=dtype)
            check_ids(vocabulary, source.tokenizer)
            _check_template(vocabulary, source.tokenizer)
            files.append(out / MODEL_FILE)
    except UnavailableError as error:
        if "pip install" in error.fix:
            raise
        commands = llama_cpp_commands(source.folder, source.base, merged, out)
        lines = "\n       ".join(["llama.cpp's own scripts may know it:", *commands])
        raise UnavailableError(error.what, fix=lines) from None
    template = _write_template(source.tokenizer, out)
    model = MODEL_FILE if merged else "BASE.gguf"
    command = ["llama-server", "-m", str(out / model) if merged else model, "--jinja"]
    if merged is None:
        command += ["--lora", str(out / ADAPTER_FILE), "--chat-template-file", str(template)]
    notes = layout_notes(build_config(dict(source.values)))
    if merged is None:
        notes.append(
            "BASE.gguf is the base that the adapter was trained on, converted or quantised"
        )
    return Exported(out, [*files, template], shlex.join(command), notes)


def _check_same_model(source: _Source, values: Mapping[str, Any], merged: Path) -> None:
    for key in _SIZES:
        if values.get(key) != source.values.get(key):
            raise UsageError(
                f"{merged} is another model than {source.base}, which the adapter was trained on: "
                f"{key} is {values.get(key)}, not {source.values.get(key)}",
                fix="give the folder that `nibble merge` wrote of this adapter",
            )


def _check_template(vocabulary: Vocabulary, tokenizer: Any) -> None:
    if vocabulary.template != portable_template(tokenizer):
        raise UsageError(
            "the merged folder has another chat template than the adapter was trained with",
            fix="merge this adapter again, or copy its chat_template.jinja into the merged folder",
        )


def _add_modelfile(source: _Source, made: Exported, merged: Path | None) -> None:
    wrapping = find_wrapping(source.tokenizer, adds_bos=adds_bos(source.tokenizer))
    if wrapping is None:
        made.notes.append(
            "TEMPLATE is left out: the chat template does more than write texts around turns, so "
            "Ollama takes what it finds for it; compare answers, or use the chat template elsewhere"
        )
    elif "system" not in wrapping.around:
        made.notes.append("the chat template has no system turns, so Ollama leaves them out")
    lines = [f"FROM ./{MODEL_FILE}"] if merged else [f"FROM {source.base}"]
    lines += [] if merged else [f"ADAPTER ./{ADAPTER_FILE}"]
    length = build_config(dict(source.values)).max_position_embeddings
    text = modelfile(lines, source.tokenizer, wrapping, context_length=length)
    path = made.folder / _MODELFILE
    with disk_errors(f"cannot write {path}"):
        replace_file(path, text.encode())
    made.files.append(path)
    made.command = shlex.join(["ollama", "create", made.folder.resolve().name, "-f", str(path)])
    if merged is None:
        made.notes.append(
            f"FROM {source.base}: write Ollama's name of this base, or the path of its GGUF file"
        )


def _export_vllm(source: _Source, out: Path) -> Exported:
    files = []
    with disk_errors(f"cannot write {out}"):
        out.mkdir(parents=True, exist_ok=True)
        source.tokenizer.save_pretrained(out)
        for name in (CONFIG_FILE, WEIGHTS_FILE, _README):
            if (source.folder / name).is_file():
                shutil.copyfile(source.folder / name, out / name)
                files.append(out / name)
    if source.base != source.config.base:
        config = json.loads((out / CONFIG_FILE).read_text(encoding="utf-8"))
        config["base_model_name_or_path"] = source.base
        replace_file(out / CONFIG_FILE, (json.dumps(config, indent=2) + "\n").encode())
    template = _write_template(source.tokenizer, out)
    files += [out / name for name in ("tokenizer.json", "tokenizer_config.json")]
    _check_saved(out, source.tokenizer)
    command = ["vllm", "serve", source.base, "--enable-lora"]
    if source.config.revision and source.base == source.config.base:
        command += ["--revision", source.config.revision]
    command += ["--max-lora-rank", str(vllm_rank(source.config.rank))]
    command += ["--lora-modules", f"{out.resolve().name}={out}", "--chat-template", str(template)]
    return Exported(out, [*files, template], shlex.join(command))


def _check_saved(out: Path, tokenizer: Any) -> None:
    """The tokenizer as it was written gives the ids of training, its template the text."""
    saved = load_tokenizer(out)
    same = saved.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    if not same or portable_template(saved) != portable_template(tokenizer):
        raise ModelError(
            f"the tokenizer in {out} is not the one of the adapter", fix="empty the folder first"
        )


def _write_template(tokenizer: Any, out: Path) -> Path:
    path = out / TEMPLATE_FILE
    with disk_errors(f"cannot write {path}"):
        replace_file(path, portable_template(tokenizer).encode())
    return path


def _storage_notes(adapter: Path) -> list[str]:
    storage = read_base_options(adapter).get("storage", "")
    if storage not in ("nf4", "fp4"):
        return []
    return [
        f"it was trained on a base in {storage}, and learnt to make up for its rounding: on "
        "another base measure it, or serve what `nibble merge` wrote"
    ]


def _template_notes(tokenizer: Any) -> list[str]:
    if "strftime_now" in portable_template(tokenizer):
        return [
            "the chat template writes today's date; in training it was 26 July 2024, so prompts "
            "differ there"
        ]
    return []
