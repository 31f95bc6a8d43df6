"""What a merge is worth: how much of the update was written, and how the merged model predicts.

    rounding     figures of the weights, always there
    measured     figures on held-out text, or None where there is none
    problems     sentences, one for each bound that is not kept; a certificate without any is passed

Onto what the adapter was trained on, the merged model has to predict as the live one: the only
difference is one rounding. Onto another base it cannot, and the loss decides.
"""

from dataclasses import asdict, dataclass, field
from typing import Any

from nibble.adapter.agreement import Agreement
from nibble.adapter.rounding import LEAST_KEPT, MOST_ERROR, Rounding

CERTIFICATE_FILE = "certificate.json"
# Onto the base of training: nats a target token, and the rise of the loss as a share of it.
MOST_KL = 1e-3
MOST_RISE = 0.002
# Onto another base: the rise, and the share of what the adapter gained on its base.
MOST_RISE_ELSEWHERE = 0.02
LEAST_GAIN_KEPT = 0.9


@dataclass(frozen=True)
class Measured:
    """Losses in nats a target token: of the base, of base and adapter, and of the merged model."""

    base_loss: float
    live_loss: float
    merged: Agreement

    @property
    def rise(self) -> float:
        """How much higher the merged loss is than the live one, as a share of it."""
        return self.merged.loss / self.live_loss - 1

    @property
    def gain_kept(self) -> float:
        """The share of the adapter's gain that the merged model has; 1 where there is none."""
        gain = self.base_loss - self.live_loss
        return (self.base_loss - self.merged.loss) / gain if gain > 0 else 1.0

    def to_dict(self) -> dict[str, Any]:
        """The figures for a certificate."""
        return {
            "base_loss": self.base_loss,
            "live_loss": self.live_loss,
            "merged_loss": self.merged.loss,
            **{k: v for k, v in asdict(self.merged).items() if k != "loss"},
            "loss_rise": self.rise,
            "gain_kept": self.gain_kept,
        }


@dataclass(frozen=True)
class Certificate:
    """The figures of one merge.

    Args:
        onto: The target, one of `merged_weights.TARGETS`.
        trained_on: The storage of the base in training.
        is_same_base: Whether the target's base is the one of training.
        candidates: With `auto`, the merged loss of every target that was tried.
    """

    adapter: str
    base: str
    onto: str
    trained_on: str
    is_same_base: bool
    rounding: Rounding
    measured: Measured | None = None
    candidates: dict[str, float] = field(default_factory=dict)

    @property
    def problems(self) -> list[str]:
        """What is wrong, in sentences; empty if all bounds are kept."""
        found = [_lost(self.onto, self.rounding)] if self.rounding.is_lost else []
        if self.measured is not None:
            found += _outside(self.measured, self.is_same_base)
        return found

    def to_dict(self) -> dict[str, Any]:
        """certificate.json."""
        same = {"mean_kl": MOST_KL, "loss_rise": MOST_RISE}
        other = {"loss_rise": MOST_RISE_ELSEWHERE, "gain_kept": LEAST_GAIN_KEPT}
        return {
            "version": 1,
            "adapter": self.adapter,
            "base": self.base,
            "onto": self.onto,
            "trained_on": self.trained_on,
            "rounding": self.rounding.to_dict(),
            "measured": None if self.measured is None else self.measured.to_dict(),
            "bounds": same if self.is_same_base else other,
            "candidates": self.candidates,
            "passed": not self.problems,
            "problems": self.problems,
        }

    def sentence(self) -> str:
        """One line for the model card."""
        kept = f"{100 * self.rounding.kept:.1f} % of the update is in the weights"
        if self.measured is None:
            return f"Merged onto {self.onto}; {kept}; not measured on held-out text."
        m = self.measured
        return (
            f"Merged onto {self.onto}; {kept}; held-out loss {m.merged.loss:.4f} "
            f"(adapter {m.live_loss:.4f}, base {m.base_loss:.4f}), mean KL {m.merged.mean_kl:.1e}, "
            f"top-1 agreement {100 * m.merged.top1_agreement:.1f} %."
        )


def _lost(onto: str, rounding: Rounding) -> str:
    update, step, error = (rounding.rms(name) for name in ("update", "step", "error"))
    return (
        f"rounding to {onto} loses the update: its rms is {update:.2e}, that of the rounding step "
        f"{step:.2e} and that of the rounding error {error:.2e}, of which at most "
        f"{MOST_ERROR:g} times the update is allowed; {100 * rounding.kept:.1f} % of it is kept, "
        f"at least {100 * LEAST_KEPT:.0f} % is asked for"
    )


def _outside(measured: Measured, is_same_base: bool) -> list[str]:
    merged, rise = measured.merged, MOST_RISE if is_same_base else MOST_RISE_ELSEWHERE
    found = []
    if not measured.rise <= rise:
        found.append(
            f"the held-out loss rises by {100 * measured.rise:.2f} %, from "
            f"{measured.live_loss:.4f} to {merged.loss:.4f}; at most {100 * rise:g} % is allowed"
        )
    if is_same_base and not merged.mean_kl <= MOST_KL:
        found.append(f"the mean KL is {merged.mean_kl:.1e} nats a token; at most {MOST_KL:g}")
    if not is_same_base and not measured.gain_kept >= LEAST_GAIN_KEPT:
        found.append(
            f"{100 * measured.gain_kept:.0f} % of what the adapter gained is kept; "
            f"at least {100 * LEAST_GAIN_KEPT:.0f} % is asked for"
        )
    return found
