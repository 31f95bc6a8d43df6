"""Does nibble reach the held-out loss of PEFT, PEFT with bitsandbytes, and a plain full fine-tune?

    python benchmarks/quality_vs_peers.py --shared ../shared --out runs/quality [--write]

For five sets, three methods and some seeds both sides train `base-16m` on the same work: the same
conversations as the same tokens in the same order, 16 a step, loss on the answers divided by the
target tokens of the step, AdamW without decay, clipping at 1.0, the same schedule, rank 16 on all
linear layers, from the same first factors, in bfloat16 with float32 adapters (full: float32 weights
under autocast). The peers' loop is plain torch on transformers' model, with PEFT's layers and
bitsandbytes' weights, rows padded to the longest. Held-out loss of both is measured by one function
of ours, on one base.

A ratio is ours over theirs, and its interval is over the seeds: t of 95 % times the standard error
of its logarithm. Beside it stands by how much the training losses of single steps differ at most,
in the first steps and in all. In bfloat16 two orders of the same sums part after some steps; with
`--dtype float32` they show whether more than rounding is different.

Each run is a process of its own; finished ones are read, not repeated. Install the peers with
`pip install -r benchmarks/peers-requirements.txt`.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from recording import machine, write_results

from nibble.experiment.statistics import estimate

SETS = ("biomedical", "legal", "customer", "code", "maths")
PEERS = {"lora": "PEFT", "qlora": "PEFT + bitsandbytes", "full": "torch + transformers"}
RATES = {"lora": 4e-3, "qlora": 4e-3, "full": 3e-4}
RANK, ALPHA, WARMUP, MAX_GRAD_NORM = 16, 32, 0.03, 1.0
MOST_RATIO = 1.005
NUM_FIRST_STEPS = 3


@dataclass(frozen=True)
class Work:
    """One run of one side."""

    side: str
    method: str
    model: str
    data: str
    held_out: str
    out: str
    seed: int
    steps: int
    batch_size: int
    max_length: int
    dtype: str


def run_work(work: Work) -> None:
    """Train, measure, and leave the loss in `loss.json`."""
    train = train_nibble if work.side == "nibble" else train_peer
    trained, step_losses = train(work)
    result = {"loss": held_out_loss(work, trained), "step_losses": step_losses}
    (Path(work.out) / "loss.json").write_text(json.dumps({**asdict(work), **result}))


def config(work: Work) -> Any:
    """What both sides are to do, as nibble's config."""
    import nibble

    return nibble.load_config(
        None,
        [
            f"model.name={work.model}", f"model.dtype={work.dtype}", f"method={work.method}",
            f"data.train={work.data}", f"out={work.out}", f"train.seed={work.seed}",
            f"train.steps={work.steps}",
            f"train.batch_size={work.batch_size}", f"data.max_seq_len={work.max_length}",
            "data.packing=false", f"optim.lr={RATES[work.method]}", f"optim.warmup={WARMUP}",
            f"optim.max_grad_norm={MAX_GRAD_NORM}", f"lora.rank={RANK}", f"lora.alpha={ALPHA}",
        ],
    )  # fmt: skip


def train_nibble(work: Work) -> tuple[Path, list[float]]:
    """Our run; the folder of the adapter or of the whole model, and the loss of each step."""
    import nibble
    from nibble.events import StepEnd, read_events

    result = nibble.train(config(work))
    events = read_events(result.out / "events.jsonl")
    return result.adapter, [event.loss for event in events if isinstance(event, StepEnd)]


def train_peer(work: Work) -> tuple[Path, list[float]]:
    """The peers' run; the folder of the adapter or of the whole model, and each step's loss."""
    import torch
    from torch.nn.functional import cross_entropy
    from transformers import AutoTokenizer

    from nibble.data.dataset import build_dataset
    from nibble.data.loader import Loader
    from nibble.train.optimizer import learning_rate

    torch.manual_seed(work.seed)
    tokenizer = AutoTokenizer.from_pretrained(work.model)
    rows = build_dataset(config(work).data, tokenizer, seed=work.seed).train
    order = Loader(rows, batch_size=work.batch_size, micro_batch_size=1, seed=work.seed)
    model = peer_model(work)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.0)
    step_losses = []
    for step in range(work.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(
                step, steps=work.steps, peak=RATES[work.method], warmup=WARMUP
            )
        ids, mask, labels = padded([rows[i] for i in order.row_ids(step)])
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=work.dtype == "bfloat16"):
            logits = model(input_ids=ids, attention_mask=mask).logits
        # The mean over the target tokens of the step.
        loss = cross_entropy(logits[:, :-1].float().flatten(0, 1), labels.flatten())
        loss.backward()
        step_losses.append(loss.item())
        torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
    out = Path(work.out) / "peer"
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out, step_losses


def peer_model(work: Work) -> Any:
    """Their model, in training mode; an adapter starts from the factors that ours starts from."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    import nibble

    quantization = None
    if work.method == "qlora":
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, work.dtype),
        )
    is_full = work.method == "full"
    dtype = torch.float32 if is_full else getattr(torch, work.dtype)
    model = AutoModelForCausalLM.from_pretrained(
        work.model, dtype=dtype, quantization_config=quantization
    )
    model.config.use_cache = False
    if not is_full:
        ours, _ = nibble.load_base(work.model)
        generator = torch.Generator().manual_seed(work.seed)
        nibble.adapt(ours, rank=RANK, alpha=ALPHA, generator=generator)
        first = Path(work.out) / "first"
        nibble.write_adapter(ours, str(first))
        model = PeftModel.from_pretrained(model, str(first), is_trainable=True)
    # bitsandbytes on a CPU gives wrong gradients after a model was in eval mode.
    return model.train()


def padded(rows: list[Any]) -> tuple[Any, Any, Any]:
    """Token ids, attention mask and shifted labels of rows, (B, S) each."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    ids = pad_sequence([torch.tensor(row.input_ids) for row in rows], batch_first=True)
    labels = pad_sequence(
        [torch.tensor(row.labels)[1:] for row in rows], batch_first=True, padding_value=-100
    )
    lengths = torch.tensor([len(row) for row in rows])
    return ids, (torch.arange(ids.shape[1]) < lengths[:, None]).long(), labels


def held_out_loss(work: Work, trained: Path) -> float:
    """The loss of either side's adapter or model, on our base."""
    import torch

    import nibble
    from nibble.adapter.format import read_adapter
    from nibble.data.dataset import build_dataset
    from nibble.data.loader import eval_batches
    from nibble.train.evaluate import EVAL_TOKENS, evaluate

    is_full = work.method == "full"
    is_16bit = work.dtype == "bfloat16"
    storage = "nf4" if work.method == "qlora" else "bf16" if is_16bit else "float32"
    model, tokenizer = nibble.load_base(
        str(trained) if is_full else work.model, storage, dtype=getattr(torch, work.dtype)
    )
    if not is_full:
        read_adapter(model, trained)
    section = config(work).data.model_copy(update={"train": work.held_out})
    rows = build_dataset(section, tokenizer, seed=0).train
    return evaluate(model, eval_batches(rows, max_tokens=EVAL_TOKENS)).loss


def result_of(
    options: argparse.Namespace, name: str, method: str, side: str, seed: int
) -> dict[str, Any]:
    """What one run left, which is made now if it is not there."""
    out = options.out / f"{name}-{method}-{side}-{options.steps}-{seed}"
    data = options.shared / "data" / name
    work = Work(
        side=side,
        method=method,
        model=str(options.shared / "models" / "base-16m"),
        data=str(data / "train.jsonl"),
        held_out=str(data / "eval.jsonl"),
        out=str(out),
        seed=seed,
        steps=options.steps,
        batch_size=options.batch_size,
        max_length=options.max_length,
        dtype=options.dtype,
    )
    found = out / "loss.json"
    if not found.exists():
        out.mkdir(parents=True, exist_ok=True)
        words = [sys.executable, __file__, "--work", json.dumps(asdict(work))]
        with out.with_name(f"{out.name}.log").open("w") as log:
            subprocess.run(words, check=True, stdout=log, stderr=subprocess.STDOUT)
    result = json.loads(found.read_text())
    if {key: result[key] for key in asdict(work)} != asdict(work):
        raise SystemExit(f"{found} is of other work; give another --out")
    return result


def ratio_of(ours: list[float], theirs: list[float]) -> tuple[float, float, float]:
    """The geometric mean of ratios of the same seeds, and its interval of 95 %."""
    found = estimate([math.log(a / b) for a, b in zip(ours, theirs, strict=True)])
    assert found is not None
    if found.low is None or found.high is None:
        return math.exp(found.value), 0.0, math.inf
    return math.exp(found.value), math.exp(found.low), math.exp(found.high)


def most_apart(ours: list[dict[str, Any]], theirs: list[dict[str, Any]], steps: int) -> float:
    """The largest relative difference of a training loss in the first `steps` steps."""
    pairs = [
        pair
        for a, b in zip(ours, theirs, strict=True)
        for pair in zip(a["step_losses"][:steps], b["step_losses"][:steps], strict=True)
    ]
    return max(abs(a / b - 1) for a, b in pairs)


def compare(options: argparse.Namespace) -> list[str]:
    """The table, and below it the verdict of each method."""
    lines = [
        "| set | method | peer | ours, per seed | theirs, per seed | ratio | interval "
        f"| steps 1-{NUM_FIRST_STEPS} apart | all steps |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    verdicts = []
    for method in options.methods:
        ratios, lost = [], []
        for name in options.sets:
            ours, theirs = (
                [result_of(options, name, method, side, seed) for seed in options.seeds]
                for side in ("nibble", "peer")
            )
            losses = [[result["loss"] for result in results] for results in (ours, theirs)]
            ratio, least, most = ratio_of(*losses)
            ratios.append(ratio)
            lost += [name] if least > 1 else []
            listed = (", ".join(f"{loss:.4f}" for loss in side) for side in losses)
            apart = (most_apart(ours, theirs, n) for n in (NUM_FIRST_STEPS, options.steps))
            lines.append(
                f"| {name} | {method} | {PEERS[method]} | {' | '.join(listed)} "
                f"| {ratio:.4f} | {f'{least:.4f} to {most:.4f}' if len(ours) > 1 else 'one seed'} "
                f"| {' | '.join(f'{part:.1e}' for part in apart)} |"
            )
            print(lines[-1], flush=True)
        mean = statistics.mean(ratios)
        verdicts.append(
            f"{method}: mean ratio of {len(ratios)} sets {mean:.4f}, at most {MOST_RATIO}: "
            f"{'met' if mean <= MOST_RATIO else 'not met'}; sets lost beyond the interval: "
            f"{', '.join(lost) or 'none'}."
        )
    return [*lines, "", *verdicts]


def main() -> None:
    """Measure, print, and write with --write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--out", type=Path, default=Path("runs/quality"))
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=SETS)
    parser.add_argument("--methods", nargs="+", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--write", action="store_true", help="Put the table into results/.")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        run_work(Work(**json.loads(options.work)))
        return
    import torch

    lines = [
        "# Held-out loss against PEFT, PEFT with bitsandbytes and a plain full fine-tune",
        "",
        f"Device: {machine()}, {torch.get_num_threads()} thread(s). torch {torch.__version__}, "
        + ", ".join(f"{p} {version(p)}" for p in ("transformers", "peft", "bitsandbytes"))
        + f". Model base-16m; {options.steps} steps of {options.batch_size} rows cut at "
        f"{options.max_length} tokens, {options.dtype}, seeds {options.seeds}.",
        "",
        *compare(options),
    ]
    print("\n".join(lines))
    if options.write:
        in_float32 = "_float32" if options.dtype == "float32" else ""
        write_results(f"quality_vs_peers{in_float32}", lines)


if __name__ == "__main__":
    main()
