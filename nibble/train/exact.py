"""train.exactness=exact: the same bits again, or an error.

Deterministic operations only; what has no deterministic way is refused by torch, and never replaced
in silence. Sums depend on the number of threads: a run that is continued takes the number it began
with. The same inputs, seeds, versions, number of threads and kind of processor give the same bits.
"""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from nibble.errors import UnavailableError
from nibble.train.manifest import MANIFEST_FILE, differences, listed

# Source: https://docs.nvidia.com/cuda/cublas, section "Results reproducibility".
_CUBLAS_WORKSPACE = ":4096:8"
_TORCH_SAYS = "deterministic"
LEVELS = {
    "exact": "exact: the same inputs, versions, threads and processor give the same bits",
    "default": "default: fast; on a CPU with the same threads the same bits, on a GPU nearly",
}


@contextmanager
def exactness(level: str) -> Iterator[None]:
    """Within the block, torch takes deterministic ways only if the level is "exact".

    Raises:
        UnavailableError: If an operation has none.
    """
    if level != "exact":
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", _CUBLAS_WORKSPACE)
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    benchmark = torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    except RuntimeError as error:
        if _TORCH_SAYS not in str(error):
            raise
        raise UnavailableError(
            f"train.exactness=exact: {str(error).splitlines()[0]}",
            fix="use train.exactness=default, or a device whose operations are deterministic",
        ) from None
    finally:
        torch.use_deterministic_algorithms(was_deterministic)
        torch.backends.cudnn.benchmark = benchmark


@contextmanager
def threads_of(environment: Mapping[str, str]) -> Iterator[None]:
    """Within the block torch computes with as many threads as in an environment of a run."""
    before, threads = torch.get_num_threads(), environment.get("threads", "")
    if re.fullmatch("[1-9][0-9]{0,3}", threads):
        torch.set_num_threads(int(threads))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def check_environment(level: str, began_with: dict[str, str], now: dict[str, str]) -> str:
    """A sentence on what is not as it was when the run began, or nothing.

    Raises:
        UnavailableError: If there is such a thing, or nobody knows, and the level is "exact".
    """
    if level == "exact" and not began_with:
        raise UnavailableError(
            "train.exactness=exact: the environment in which the run began is not known",
            fix=f"bring {MANIFEST_FILE} of its folder back, or start a run in another folder",
        )
    changed = differences(began_with, now) if began_with else {}
    if not changed:
        return ""
    if level == "exact":
        raise UnavailableError(
            f"train.exactness=exact: the environment is not that of the run ({listed(changed)})",
            fix="bring it back, or start a run with train.exactness=default in another folder",
        )
    return (
        f"the environment is not that in which the run began ({listed(changed)}): what follows "
        "may differ in bits from an uninterrupted run"
    )
