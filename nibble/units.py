"""Amounts as a person reads them."""

_BINARY = ("B", "KiB", "MiB", "GiB")


def size(num_bytes: float, beside: float | None = None) -> str:
    """Bytes in powers of two; in the unit of another amount where it stands beside that.

    >>> size(1536), size(1536, beside=3 * 2**20)
    ('1.5 KiB', '0.0 MiB')
    """
    measure = num_bytes if beside is None else beside
    power = next((n for n in range(3) if measure < 1024 ** (n + 1)), 3)
    return f"{num_bytes / 1024**power:.{min(power, 1)}f} {_BINARY[power]}"


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
