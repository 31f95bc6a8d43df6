"""What a run needs, and what to choose; called, it plans a run."""

from nibble.room import make_callable

make_callable(__name__, "nibble.api")
