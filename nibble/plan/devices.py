"""Accelerators: memory, rates and price; and the one that is here.

    find_device("RTX 4090")         one card of the table; "4090" and "rtx-4090" do as well
    find_device("8x A100 80GB")     eight of them
    find_device("24GiB")            a GPU of that memory; rates 0.0: times stay unknown
    find_device("cpu")              the CPU of this machine; rates 0.0 until measured
    find_device("here")             the CUDA devices of this machine, else its CPU

A rate of 0.0 means unknown: nothing is guessed.

Memory is the total that nvidia-smi shows with ECC in its usual state (ECC on GDDR6 takes part
of it: 23,028 MiB of the A10's 24 GB). A program gets up to 2.5 % less, which the driver keeps;
`here` gives what is left, as torch.cuda.mem_get_info has it. A vendor's GB are GiB in practice.

Rates are peaks of the vendor: bf16 on tensor cores, dense, with float32 accumulation, for which
GeForce cards run at half of what they do with float16 accumulation. Turing and Volta have no
bf16: theirs is the float16 rate, and `source` says so. The host link is one direction of PCIe
(15.75 GB/s for 16 lanes of 3.0, doubling with each version), or of NVLink-C2C.

Prices are examples of on-demand list prices per GPU in 2026, for orientation only: RunPod
where it lists the card, mostly its community cloud, else AWS (T4, A10G), Lambda (V100, GH200) or
Oracle (A10). Other clouds ask up to five times as much, and prices change every month.
"""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from decimal import Decimal
from functools import cache
from itertools import product

import psutil

from nibble.errors import UsageError, closest

MIB = 2**20
_UNITS = {
    **{f"{letter}iB": 2 ** (10 * power) for power, letter in enumerate("KMGT", start=1)},
    **{f"{letter}B": 10 ** (3 * power) for power, letter in enumerate("KMGT", start=1)},
}


@dataclass(frozen=True)
class Device:
    """One kind of accelerator, and how many of it.

    Args:
        name: What people call it.
        type: "cuda" or "cpu".
        memory_bytes: Memory of one device.
        flops: Dense bf16 rate in FLOP/s, 0.0 if unknown.
        bandwidth: Of its memory, in bytes per second, 0.0 if unknown.
        host_link: One direction between host and device, in bytes per second; 0.0 if unknown.
        capability: CUDA compute capability, such as "8.9"; "" for a CPU or if unknown.
        year: When it came out; 0 if unknown.
        price_per_hour: An example in USD per device; None if no cloud is known to rent it.
        source: Where the figures come from.
        count: Number of devices.
        host_memory_bytes: Of the machine around it; None if unknown.
    """

    name: str
    type: str
    memory_bytes: int
    flops: float
    bandwidth: float
    host_link: float
    capability: str = ""
    year: int = 0
    price_per_hour: float | None = None
    source: str = ""
    count: int = 1
    host_memory_bytes: int | None = None


# name | MiB | TFLOP/s | GB/s | host link in GB/s | capability | year | USD per hour | source
# by SM: the whitepaper's rate per multiprocessor and clock, times their number and boost clock.
_TABLE = """
RTX 2080 Ti              11264    53.8   616  15.75   7.5  2018      -  Turing whitepaper; float16
RTX 3060 12GB            12288    25.5   360   31.5   8.6  2021      -  GA102 whitepaper, by SM
RTX 3070                  8192    40.6   448   31.5   8.6  2020   0.13  GA102 whitepaper
RTX 3080 10GB            10240    59.5   760   31.5   8.6  2020   0.17  GA102 whitepaper
RTX 3090                 24576    71.0   936   31.5   8.6  2020   0.22  GA102 whitepaper
RTX 4060                  8188    30.2   272  15.75   8.9  2023      -  Ada whitepaper, by SM
RTX 4060 Ti 16GB         16380    44.1   288  15.75   8.9  2023      -  Ada whitepaper, by SM
RTX 4070                 12282    58.3   504   31.5   8.9  2023      -  Ada whitepaper, by SM
RTX 4070 Ti Super 16GB   16376    88.2   672   31.5   8.9  2024      -  Ada whitepaper, by SM
RTX 4080                 16376    97.5   717   31.5   8.9  2022   0.27  Ada whitepaper
RTX 4090                 24564   165.2  1008   31.5   8.9  2022   0.34  Ada whitepaper
RTX 5060 Ti 16GB         16311    47.4   448   31.5  12.0  2025      -  Blackwell whitepaper, by SM
RTX 5070                 12227    61.7   672   63.0  12.0  2025      -  Blackwell whitepaper
RTX 5080                 16303   112.6   960   63.0  12.0  2025      -  Blackwell whitepaper
RTX 5090                 32607   209.5  1792   63.0  12.0  2025   0.69  Blackwell whitepaper
T4                       15360    65.0   320  15.75   7.5  2018  0.526  T4 datasheet; float16
V100 16GB                16384   125.0   900  15.75   7.0  2017   0.79  V100 SXM2 datasheet; float16
V100 32GB                32768   125.0   900  15.75   7.0  2018      -  V100 SXM2 datasheet; float16
A10                      23028   125.0   600   31.5   8.6  2021   2.00  A10 datasheet
A10G                     23028    70.0   600   31.5   8.6  2021  1.006  A10G datasheet
A30                      24576   165.0   933   31.5   8.0  2021   0.22  A30 datasheet
A40                      46068   149.7   696   31.5   8.6  2020   0.44  A40 datasheet
RTX A6000                49140   154.8   768   31.5   8.6  2020   0.33  GA102 whitepaper
RTX 6000 Ada             49140   364.2   960   31.5   8.9  2022   0.74  RTX 6000 Ada datasheet
RTX PRO 6000 Blackwell   97887   503.8  1792   63.0  12.0  2025   1.69  RTX PRO Blackwell whitepaper
L4                       23034   121.0   300   31.5   8.9  2023   0.44  L4 datasheet
L40                      46068   181.0   864   31.5   8.9  2022   0.69  L40 datasheet
L40S                     46068   362.0   864   31.5   8.9  2023   0.79  L40S datasheet
A100 40GB                40960   312.0  1555   31.5   8.0  2020   1.00  A100 SXM4 datasheet
A100 80GB                81920   312.0  2039   31.5   8.0  2020   1.39  A100 SXM4 datasheet
H100 PCIe                81559   756.0  2000   63.0   9.0  2022   1.99  H100 datasheet
H100 SXM 80GB            81559   989.4  3350   63.0   9.0  2022   2.69  H100 datasheet
H100 NVL                 95830   835.0  3900   63.0   9.0  2023   2.59  H100 NVL datasheet
H200                    143771   989.4  4800   63.0   9.0  2024   3.59  H200 SXM datasheet
B200                    183359  2250.0  7700   63.0  10.0  2024   5.98  HGX B200 datasheet
GH200 96GB               97871   989.4  4000  450.0   9.0  2023   1.99  GH200 datasheet
"""

# Names that nvidia-smi and clouds use, and one habit: "H100" is the SXM module.
_ALIASES = {
    "H100": "H100 SXM 80GB",
    "H100 94GB": "H100 NVL",
    "A100 SXM 40GB": "A100 40GB",
    "A100 PCIe 40GB": "A100 40GB",
    "A100 SXM 80GB": "A100 80GB",
    "A100 PCIe 80GB": "A100 80GB",
    "A100 80GB PCIe": "A100 80GB",
    "V100 SXM 16GB": "V100 16GB",
    "V100 SXM 32GB": "V100 32GB",
    "GH200 480GB": "GH200 96GB",
}
# Words of a name that may be left out while it stays unambiguous.
_OPTIONAL = re.compile(r"rtx|blackwell|sxm|pcie|nvl|\d+gb")
_VENDOR_WORDS = re.compile(
    r"\b(?:nvidia|geforce|tesla|gpu|generation|workstation|server|edition|hbm\w*)\b"
)
_COUNT = re.compile(r"([0-9]{1,4})\s*[x×*]\s*(.*)", re.IGNORECASE)
# A short bare number is an amount without its unit; a long one is a name, such as 4090.
_AMOUNT = re.compile(r"[-+]?[0-9.,]+\s*(?:[kmgt](?:i?b\w*)?|bytes?)|[-+]?[0-9]{1,3}", re.IGNORECASE)
# Cards of one name with other memory differ by more than this; what a driver keeps is less.
_SAME_MEMORY = 0.08


def find_device(text: str) -> Device:
    """The device that a person means: a name, an amount of memory, "cpu" or "here".

    Case, spaces and punctuation do not matter. "RTX", the form (SXM, PCIe) and the memory may be
    left out while only one device fits. A count goes in front: "2x A100 80GB".

    Raises:
        UsageError: If the name is unknown or fits several devices, or the amount is malformed.
    """
    counted = _COUNT.fullmatch(text.strip())
    name = (counted[2] if counted else text).strip()
    count = int(counted[1]) if counted else 1
    if name.lower() in ("", "here", "cpu"):
        if counted:
            raise UsageError(
                f'device "{text}": a count goes with an accelerator or an amount of memory',
                fix='for example "2x A100 80GB" or "2x 24GiB"',
            )
        return _cpu() if name.lower() == "cpu" else _this_machine()
    if count < 1:
        raise UsageError(f'device "{text}": the count is 0', fix=f'write "1x {name}" or "{name}"')
    if _AMOUNT.fullmatch(name):
        number, unit = _number_and_unit(name)
        return _unknown_gpu(f"a GPU of {number} {unit}", parse_memory(name), count)
    return replace(_one_named(name), count=count)


def parse_memory(text: str) -> int:
    """Bytes of an amount with a unit; GB is 10**9 bytes and GiB is 2**30, exactly.

    Units: KiB, MiB, GiB, TiB; KB, MB, GB, TB; and K, M, G, T for the binary ones. Case does not
    matter, except that a small b after a capital letter means bits, which are refused.

    >>> parse_memory("24GiB"), parse_memory("1.5 GB"), parse_memory("900M")
    (25769803776, 1500000000, 943718400)

    Raises:
        UsageError: If the amount has no unit, an unknown one, is in bits, or is not above zero.
    """
    number, unit = _number_and_unit(text)
    num_bytes = int(Decimal(number) * _UNITS[unit])
    if num_bytes < 1:
        raise UsageError(
            f'memory "{text}" is less than one byte; expected an amount above zero',
            fix='for example "24GiB"',
        )
    return num_bytes


def with_measured_rates(device: Device) -> Device:
    """`device` with its rates measured if it is this machine's CPU and they are unknown."""
    if device.type != "cpu" or device.flops:
        return device
    flops, bandwidth = measure_cpu()
    return replace(
        device, flops=flops, bandwidth=bandwidth, host_link=bandwidth, source="measured here"
    )


def measure_cpu(seconds: float = 0.1) -> tuple[float, float]:
    """FLOP/s of a product as training takes it and bytes per second of a copy on this CPU.

    Each is the best of as many runs as fit in half of `seconds`, at least one after a warm-up.
    """
    import torch

    from nibble.kernels.products import cpu_product_dtype

    left, right = torch.full((2, 1024, 1024), 0.5, dtype=cpu_product_dtype())
    product_s = _best_time(lambda: left @ right, seconds / 2)
    source = torch.zeros(64 * MIB, dtype=torch.uint8)
    target = torch.zeros_like(source)
    copy_s = _best_time(lambda: target.copy_(source), seconds / 2)
    return 2 * 1024**3 / product_s, 2 * source.numel() / copy_s


def _best_time(run: Callable[[], object], seconds: float) -> float:
    run()
    best, end = float("inf"), time.perf_counter() + seconds
    while best == float("inf") or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best


def _number_and_unit(text: str) -> tuple[str, str]:
    """The number of an amount as written, and its unit as in `_UNITS`."""
    example = 'for example "24GiB" (2**30 bytes each) or "24GB" (10**9 bytes each)'
    split = re.fullmatch(r"\s*([0-9]{1,12}(?:\.[0-9]{1,12})?)\s*([A-Za-z]*)\s*", text)
    if not split:
        raise UsageError(
            f'memory "{text}" is not an amount; expected a number above zero and a unit',
            fix=example,
        )
    number, unit = split.groups()
    if Decimal(number) == 0:
        raise UsageError(f'memory "{text}" is nothing; expected an amount above zero', fix=example)
    if not unit:
        raise UsageError(f'memory "{text}" has no unit; expected one such as GiB', fix=example)
    if re.fullmatch(r"[KMGT]i?b|[KMGTkmgt]i?bits?", unit):
        raise UsageError(
            f'memory "{text}" is in bits; expected bytes, with a capital B', fix=example
        )
    parts = re.fullmatch(r"([kmgt])(i?b|)", unit.lower())
    if not parts:
        raise UsageError(
            f'memory "{text}": unknown unit "{unit}"; expected one of {", ".join(_UNITS)}',
            fix=example,
        )
    return number, parts[1].upper() + ("B" if parts[2] == "b" else "iB")


def _one_named(name: str) -> Device:
    found = _named(name)
    if len(found) == 1:
        return found[0]
    if found:
        names = [f'"{device.name}"' for device in found]
        raise UsageError(
            f'device "{name}" could be {" or ".join(names)}', fix=f"say which, such as {names[0]}"
        )
    known = {device.name.lower(): device.name for device in DEVICES}
    short = {word.removeprefix("rtx "): full for word, full in known.items()}
    close = closest(name.lower(), known | short)
    raise UsageError(
        f'unknown device "{name}"; expected an accelerator such as "RTX 4090" or "2x A100 80GB", '
        'an amount of memory such as "24GiB", "cpu" or "here"',
        fix=(f'did you mean "{close}"? ' if close else "")
        + "--memory takes an amount, such as --memory 24GiB",
    )


def _named(name: str) -> list[Device]:
    """The devices that a name fits; a memory at its end is checked if it is not in the table."""
    words = _VENDOR_WORDS.sub(" ", name.lower())
    words = re.sub(r"\bsxm\d\b", "sxm", words)
    words = re.sub(r"(?<![a-z0-9])(\d+)\s*g(?:i?b)?(?![a-z0-9])", r"\1gb", words)
    found = _spellings().get(_squeeze(words), [])
    stated = re.fullmatch(r"(.+)[^a-z0-9](\d+)gb\W*", words)
    if found or not stated:
        return found
    return _of_memory(_spellings().get(_squeeze(stated[1]), []), int(stated[2]) * 1024 * MIB)


def _of_memory(devices: list[Device], memory_bytes: int) -> list[Device]:
    return [
        device
        for device in devices
        if abs(device.memory_bytes - memory_bytes) <= _SAME_MEMORY * device.memory_bytes
    ]


def _squeeze(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


@cache
def _spellings() -> dict[str, list[Device]]:
    """Squeezed names with every choice of optional words left out, to the devices they fit."""
    index: dict[str, list[Device]] = {}
    for device in DEVICES:
        words = device.name.lower().split()
        choices = [(word, "") if _OPTIONAL.fullmatch(word) else (word,) for word in words]
        for spelling in {"".join(kept) for kept in product(*choices)} - {""}:
            index.setdefault(spelling, []).append(device)
    by_name = {device.name: device for device in DEVICES}
    exact = {**by_name, **{alias: by_name[name] for alias, name in _ALIASES.items()}}
    return index | {_squeeze(name): [device] for name, device in exact.items()}


def _this_machine() -> Device:
    """All CUDA devices like the first one, or the CPU."""
    import torch

    if not torch.cuda.is_available():
        return _cpu()
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    memory = torch.cuda.mem_get_info(0)[1]
    major, minor = torch.cuda.get_device_capability(0)
    return replace(
        card(names[0], memory, f"{major}.{minor}"),
        count=names.count(names[0]),
        host_memory_bytes=psutil.virtual_memory().total,
    )


def card(name: str, memory_bytes: int, capability: str) -> Device:
    """A card as CUDA names it, with the rates of the table where it is in there."""
    alike = _of_memory(_named(name), memory_bytes)
    unknown = replace(_unknown_gpu(name, memory_bytes, 1), capability=capability)
    return replace(alike[0] if len(alike) == 1 else unknown, memory_bytes=memory_bytes)


def _cpu() -> Device:
    memory = psutil.virtual_memory().total
    return Device(
        "CPU", "cpu", memory, 0.0, 0.0, 0.0, source="this machine", host_memory_bytes=memory
    )


def _unknown_gpu(name: str, memory_bytes: int, count: int) -> Device:
    return Device(name, "cuda", memory_bytes, 0.0, 0.0, 0.0, count=count, source="rates unknown")


def _read_table() -> tuple[Device, ...]:
    devices = []
    for line in _TABLE.strip().splitlines():
        name, figures = re.split(r"\s{2,}", line, maxsplit=1)
        mib, tera, giga, link, capability, year, price, source = figures.split(maxsplit=7)
        devices.append(
            Device(
                name,
                "cuda",
                int(mib) * MIB,
                flops=float(tera) * 1e12,
                bandwidth=float(giga) * 1e9,
                host_link=float(link) * 1e9,
                capability=capability,
                year=int(year),
                price_per_hour=None if price == "-" else float(price),
                source=f"NVIDIA {source}",
            )
        )
    return tuple(devices)


DEVICES = _read_table()
"""The accelerators that can be named, oldest series first within each kind."""
