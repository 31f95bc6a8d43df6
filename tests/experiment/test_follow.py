"""A log as it grows."""

import json
from contextlib import closing

from nibble.events import EvalEnd, EventLog, RunEnd, RunStart, StepEnd
from nibble.experiment.follow import Followed


def _step(number):
    return StepEnd(number, 9.0 - number, 1, 1, 1e-3, 1.0, 2.0, 1.0, 1)


def test_it_follows_through_torn_lines_and_new_starts(tmp_path):
    followed = Followed(tmp_path)
    followed.update()
    assert (followed.steps, followed.seconds_left) == (0, None)
    path = tmp_path / "events.jsonl"
    with closing(EventLog(path)) as log:
        log(RunStart("lora", "m", "cpu", 4, 0, 1, 1, {}, 1))
        log(EvalEnd(0, 9.5, 1.0, 0.0, 1))
        log(_step(1))
    with path.open("a") as file:
        file.write('{"event": "step", "st')
    followed.update()
    assert (followed.step, followed.loss, followed.eval_loss) == (1, 8.0, 9.5)
    assert followed.seconds_left == 6.0
    with closing(EventLog(path)) as log:  # ends the torn line
        log(RunStart("lora", "m", "cpu", 4, 1, 1, 1, {}, 1))
        log(_step(2))
        log(EvalEnd(2, 7.5, 1.0, 0.0, 1))
        followed.update()
        followed.update()
        assert (followed.step, followed.eval_losses) == (2, {0: 9.5, 2: 7.5})
        log(RunEnd("finished", 1.0, 4, 1))
        followed.update()
        assert followed.end is not None
        assert followed.end.reason == "finished"
        log(RunStart("lora", "m", "cpu", 8, 4, 1, 1, {}, 1))
        followed.update()
        assert followed.end is None


def test_a_log_longer_than_a_piece_is_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("nibble.experiment.follow._CHUNK_BYTES", 600)
    with closing(EventLog(tmp_path / "events.jsonl")) as log:
        log(RunStart("lora", "m", "cpu", 50, 0, 1, 1, {}, 1))
        for number in range(1, 51):
            log(_step(number))
    followed = Followed(tmp_path)
    followed.update()
    assert followed.step == 50
    lines = (tmp_path / "events.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] == 50
