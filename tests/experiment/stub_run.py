"""Stands for `nibble train CONFIG` without torch: the same folder, lock, events and exit codes.

Its steps take a moment each. It says in USED, a file beside the folders of the runs, when it held a
place and when no more.
"""

import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path

from nibble.config import load_config
from nibble.errors import NibbleError
from nibble.events import EvalEnd, EventLog, RunEnd, RunStart, StepEnd
from nibble.train import folder

STEP_SECONDS = 0.05
asked = []


def loss_at(run, step):
    """The same for the same config: it falls, the faster the higher the learning rate."""
    return 8.0 - min(step, 40) * run.optim.lr


def use(out, what):
    line = {"run": out.name, "place": os.environ["NIBBLE_PLACE"], "what": what, "at": time.time()}
    with (out.parent / "used").open("a") as file:
        file.write(json.dumps(line) + "\n")


def train(run, out):
    if folder.is_finished(out):
        return 0
    fails = "fails" in str(run.data.train)
    saved = out / "checkpoints" / "saved"
    done = int(saved.read_text()) if saved.is_file() else 0
    saved.parent.mkdir(exist_ok=True)
    folder.write_run(run)
    log, steps = EventLog(out / "events.jsonl"), run.train.steps
    log(RunStart("lora", "m", "cpu", steps, done, 1, 1, {}, 1))
    if not done:
        log(EvalEnd(0, loss_at(run, 0), 1.0, 0.0, 1))
    for step in range(done + 1, steps + 1):
        time.sleep(STEP_SECONDS)
        if fails and step == 2:
            print("nibble: the rows are bad", file=sys.stderr)
            return 65
        log(StepEnd(step, loss_at(run, step), 1, 1, 1e-3, 1.0, STEP_SECONDS, 1.0, 1))
        if step == steps or (run.train.eval_every and step % run.train.eval_every == 0):
            log(EvalEnd(step, loss_at(run, step), 1.0, 0.0, 1))
        saved.write_text(str(step))
        if asked:
            return 75
    adapter = out / "adapter"
    adapter.mkdir(exist_ok=True)
    (adapter / "a.safetensors").touch()
    digest = hashlib.sha256(folder.run_text(run).split("model:")[1].encode()).hexdigest()
    log(RunEnd("finished", 1.0, steps, 1, 1, str(adapter), 1, {"a.safetensors": digest}))
    return 0


def main():
    signal.signal(signal.SIGTERM, lambda *given: asked.append(True))
    run = load_config(sys.argv[-1])
    out = Path(run.out)
    try:
        with folder.hold(out):
            use(out, "begins")
            code = train(run, out)
            use(out, "ends")
    except NibbleError as error:
        print(f"nibble: {error}", file=sys.stderr)
        return error.exit_code
    return code


if __name__ == "__main__":
    sys.exit(main())
