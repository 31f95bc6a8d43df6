"""What `nibble demo` needs offline: a tiny base model and a data set for it to learn."""

from pathlib import Path

BASE_FOLDER = Path(__file__).parent / "base"
