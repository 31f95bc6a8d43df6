"""What a run has told so far, off its event log as it grows."""

from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

from nibble.events import EvalEnd, Event, RunEnd, RunStart, StepEnd, parse_event
from nibble.train import folder

# Steps whose mean time says when a run will end.
_PACE_STEPS = 20
_CHUNK_BYTES = 1 << 20


@dataclass
class Followed:
    """A run as its log tells it.

    Args:
        out: Its folder.

    Attributes:
        step: The last optimizer step.
        steps: All of them; 0 until the run has started.
        loss: Training loss of the last step.
        eval_losses: Held-out loss by step, as it was last measured.
        end: How it ended; None if it has not, or has begun again since.
    """

    out: Path
    step: int = 0
    steps: int = 0
    loss: float | None = None
    eval_losses: dict[int, float] = field(default_factory=dict)
    end: RunEnd | None = None
    _offset: int = 0
    _pace: deque[float] = field(default_factory=lambda: deque(maxlen=_PACE_STEPS))

    @property
    def eval_loss(self) -> float | None:
        """The last held-out loss."""
        return self.eval_losses[max(self.eval_losses)] if self.eval_losses else None

    @property
    def seconds_left(self) -> float | None:
        """Of the steps that are left, at the pace of the last ones; None where it is unknown."""
        if not self._pace or not self.steps:
            return None
        return max(0, self.steps - self.step) * sum(self._pace) / len(self._pace)

    def update(self) -> None:
        """Read what the log has got since; a line that is being written waits for its end."""
        path = self.out / folder.EVENTS_FILE
        if not path.is_file():
            return
        with path.open("rb") as file:
            file.seek(self._offset)
            while content := file.read(_CHUNK_BYTES):
                whole = content.rfind(b"\n") + 1
                if not whole:
                    return
                for line in content[:whole].splitlines():
                    self._take(parse_event(line.decode(errors="replace")))
                self._offset += whole
                file.seek(self._offset)

    def _take(self, event: Event | None) -> None:
        if isinstance(event, RunStart):
            self.steps, self.step, self.end = event.steps, event.steps_done, None
            self._pace.clear()
        elif isinstance(event, StepEnd):
            self.step, self.loss = event.step, event.loss
            self._pace.append(event.seconds)
        elif isinstance(event, EvalEnd):
            self.eval_losses[event.step] = event.loss
        elif isinstance(event, RunEnd):
            self.end = event
