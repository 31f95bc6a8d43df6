"""How long a step takes, from counted operations and the rates of a device.

    seconds(operation) = max(flops / (efficiency * rate), bytes / (efficiency * bandwidth))

The sum over a pass, or the time that Python needs to launch its kernels, whichever is longer.
"""

import math
from collections import Counter
from dataclasses import dataclass

from nibble.config import interval_seconds
from nibble.plan.devices import Device
from nibble.plan.tracker import Operation

# Shares of the peak that products, attention and copies reach. Source: cuBLAS on an H200 gives 0.80
# of its 989 TFLOP/s at training sizes, flash attention 0.45, copies 0.88 of its 4.8 TB/s; cards
# that were not measured are taken to be as good.
PRODUCT_EFFICIENCY = 0.75
ATTENTION_EFFICIENCY = 0.40
COPY_EFFICIENCY = 0.80
# Python, the autograd engine and the launch of one kernel. Source: 225 launches a layer take
# 1.1 ms and more in eager mode.
SECONDS_PER_KERNEL = 6e-6
# Where the rates are unknown, options are ranked with this many FLOPs per byte: the median of the
# cards in the table.
TYPICAL_FLOPS_PER_BYTE = 150.0


@dataclass(frozen=True)
class Rates:
    """What a device does in a second; `is_known` is False where only ratios mean anything."""

    flops: float
    bandwidth: float
    host_link: float
    seconds_per_kernel: float = SECONDS_PER_KERNEL
    is_known: bool = True


def rates_of(device: Device) -> Rates:
    """The rates of a device; relative ones where its own are unknown."""
    if device.flops and device.bandwidth:
        return Rates(device.flops, device.bandwidth, device.host_link or device.bandwidth / 30)
    bandwidth = 1e12
    flops = TYPICAL_FLOPS_PER_BYTE * bandwidth
    return Rates(flops, bandwidth, bandwidth / 30, seconds_per_kernel=0.0, is_known=False)


def work_seconds(work: Counter[Operation], rates: Rates, *, scale: float = 1.0) -> float:
    """Seconds of some operations; `scale` multiplies the tokens they were counted for."""
    device_seconds = sum(
        count * _seconds(operation, rates, scale) for operation, count in work.items()
    )
    return max(device_seconds, sum(work.values()) * rates.seconds_per_kernel)


def _seconds(operation: Operation, rates: Rates, scale: float) -> float:
    copy_rate = COPY_EFFICIENCY * rates.bandwidth
    if operation.kind == "decode":
        return operation.bytes / copy_rate
    if operation.kind == "other":
        return scale * operation.bytes / copy_rate
    is_product = operation.kind == "product"
    efficiency = PRODUCT_EFFICIENCY if is_product else ATTENTION_EFFICIENCY
    return max(scale * operation.flops / (efficiency * rates.flops), operation.bytes / copy_rate)


def cost(seconds: float, price_per_hour: float, billing: str) -> float:
    """What a run costs when time is charged in whole units of `billing`, such as "15min".

    >>> cost(3601, 2.0, "1h")
    4.0

    Raises:
        UsageError: If `billing` is no time.
    """
    unit = interval_seconds(billing, "--billing")
    return math.ceil(seconds / unit) * unit / 3600 * price_per_hour
