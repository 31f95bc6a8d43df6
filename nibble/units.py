"""Amounts as a person reads them."""


def size(num_bytes: float) -> str:
    """Bytes in powers of two.

    >>> size(1536)
    '1.5 KiB'
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024 or unit == "GiB":
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    raise AssertionError


def gigabytes(num_bytes: float) -> str:
    """Bytes in powers of ten, as a plan shows them.

    >>> gigabytes(3_341_000_000), gigabytes(-12_300_000)
    ('3.3 GB', '-12.3 MB')
    """
    if abs(num_bytes) >= 1e8:
        return f"{num_bytes / 1e9:.1f} GB"
    return f"{num_bytes / 1e6:.1f} MB"


def counted(number: int, noun: str) -> str:
    """A number with its noun.

    >>> counted(1, "row"), counted(1200, "row")
    ('1 row', '1,200 rows')
    """
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
