"""Use every spoilt folder in this process under an audit hook: python audited.py MODEL WORK.

Prints, as JSON by case: the error, and what was done that must not be.
"""

import json
import os
import shutil
import signal
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import adapter_base
import model_cases
import other_cases
import torch
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerFast

import nibble
from nibble.adapter.format import read_adapter
from nibble.data.chat import prompt_ids
from nibble.errors import NibbleError
from nibble.model.load import load_base
from nibble.model.tensors import read_entries
from nibble.train.checkpoint import latest, restore

_FORBIDDEN = (
    "socket.", "subprocess.", "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn",
    "pickle.find_class", "ftplib.", "urllib.", "http.client",
)  # fmt: skip
_LONGEST_S = 20
_CASES = {**model_cases.CASES, **other_cases.CASES}
_watched: list[Path] = []
_seen: list[str] = []


def _hook(event, arguments):
    if not _watched:
        return
    if event == "open":
        _check_open(arguments[0])
    elif event == "exec":
        _check_inside(event, getattr(arguments[0], "co_filename", ""))
    elif event == "import":
        _check_inside(event, arguments[1])
    elif event.startswith(_FORBIDDEN) and event != "socket.gethostname":
        _seen.append(f"{event} {str(arguments)[:200]}")
        raise PermissionError(f"{event} is not for a folder to ask for")


def _check_open(path):
    if isinstance(path, int):
        return
    real = os.path.realpath(os.fsdecode(path))
    allowed = [str(path) for path in _watched]
    if not real.startswith((*allowed, *_LIBRARIES)):
        _seen.append(f"open {real}")


def _check_inside(event, path):
    """Code of the folder or of the one beside it."""
    if isinstance(path, str) and str(_watched[0].parent) in path:
        _seen.append(f"{event} {path}")


_LIBRARIES = (
    *{os.path.realpath(path) for path in (*sysconfig.get_paths().values(), sys.prefix)},
    os.path.realpath(Path(nibble.__file__).parent),
    os.path.realpath(sys.base_prefix),
    os.path.realpath(os.environ["XDG_CACHE_HOME"]),
    os.path.join(os.path.realpath(tempfile.gettempdir()), "nibble-tokenizer-"),
    "/proc/", "/sys/", "/dev/null", "/dev/urandom", "/etc/localtime", "/usr/share/zoneinfo",
)  # fmt: skip


def _use_model(folder, _):
    model, tokenizer = load_base(str(folder), "nf4")
    if "CANARY" in tokenizer.get_vocab():
        _seen.append("the tokenizer of another folder")
    prompt_ids([{"role": "user", "content": "a"}], tokenizer)
    if model.config._attn_implementation != "nibble":
        _seen.append("attention of others")


def _use_adapter(folder, base):
    read_adapter(base, folder)


def _use_checkpoint(folder, base):
    found, damages = latest(folder)
    if found is None:
        raise SystemExit(f"no checkpoint: {damages}")
    restore(found, adapter_base.optimizer())


def _use_truncations(folder, _):
    """Every shorter file than the whole one, up to the end of the header."""
    path = folder / "model.safetensors"
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    for size in range(end + 1):
        path.write_bytes(content[:size])
        start = time.monotonic()
        try:
            read_entries(path)
        except NibbleError as error:
            kept = error
        else:
            raise SystemExit(f"{size} bytes of {len(content)} are a whole file")
        if time.monotonic() - start > 1:
            raise SystemExit(f"{size} bytes take more than a second")
    raise kept


def _use_run(folder, _):
    data, out = folder / "rows.jsonl", folder / "out"
    data.write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    settings = {
        "model.name": folder, "data.train": data, "out": out, "method": "lora", "train.steps": 1,
        "train.batch_size": 1, "train.micro_batch_size": 1, "data.max_seq_len": 64,
    }  # fmt: skip
    nibble.train(nibble.load_config(None, [f"{key}={value}" for key, value in settings.items()]))


_USES = {
    "model": _use_model,
    "adapter": _use_adapter,
    "checkpoint": _use_checkpoint,
    "truncations": _use_truncations,
    "run": _use_run,
}


def _stop(number, frame):
    raise TimeoutError(f"longer than {_LONGEST_S} s")


def _try_case(case, folder, base):
    """What came of it: the class of the error, its text, and what was seen."""
    # Else the peak is that of the process, and of whatever case came before.
    Path("/proc/self/clear_refs").write_text("5")
    before, start = _memory("VmRSS"), time.monotonic()
    _seen.clear()
    _watched.append(folder)
    signal.alarm(_LONGEST_S)
    result = {"error": "", "text": "", "fix": "", "exit_code": 0}
    try:
        _USES[case.use](folder, base)
    except NibbleError as error:
        names = {"error": type(error).__name__, "text": error.what, "fix": error.fix}
        result |= {**names, "exit_code": error.exit_code}
    except BaseException as error:
        result |= {"error": f"untyped {type(error).__name__}", "text": str(error)[:500]}
    finally:
        signal.alarm(0)
        _watched.clear()
    result |= {"seconds": time.monotonic() - start, "grown_bytes": _memory("VmHWM") - before}
    return {**result, "seen": list(_seen)}


def _memory(name):
    """Bytes of this process: VmRSS now, VmHWM at most since that was reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024


def _fill_outside(outside, model):
    """What a spoilt folder would like to read: a secret, good weights, other vocabularies."""
    outside.mkdir()
    (outside / "secret.json").write_text('{"model_type": "llama"}')
    shutil.copy(model / "model.safetensors", outside / "good.safetensors")
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(model / "tokenizer.json"))
    tokenizer.add_tokens(["CANARY"])
    for name in ("tokenizer.json", "tokenizer.4.0.json"):
        tokenizer.backend_tokenizer.save(str(outside / name))
    (outside / "vocab.json").write_text(json.dumps({"CANARY": 0}))
    save_file({"a": torch.ones(1)}, outside / "other.safetensors")


def main(model, work):
    good = {
        "model": model,
        "truncations": model,
        "run": model,
        "adapter": adapter_base.write_adapter_folder(model, work / "good-adapter"),
        "checkpoint": adapter_base.write_checkpoint(work / "good-checkpoint"),
    }
    # What is compiled or imported at the first use is none of a folder's doing.
    for number, use in enumerate(("model", "run")):
        _USES[use](shutil.copytree(model, work / f"first-{number}"), None)
    sys.addaudithook(_hook)
    results = {}
    for number, (name, case) in enumerate(_CASES.items()):
        place = work / str(number)
        _fill_outside(place / "outside" if place.mkdir() is None else place, model)
        folder = shutil.copytree(good[case.use], place / "folder")
        if case.spoil is not None:
            case.spoil(folder, place / "outside")
        base = load_base(str(model), "float32")[0] if case.use == "adapter" else None
        results[name] = _try_case(case, folder, base)
        results[name]["pwned"] = any(work.rglob("pwned")) or Path("pwned").exists()
        shutil.rmtree(place)
    print(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
