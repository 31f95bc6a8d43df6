"""Loss, optimizer, checkpoint, loop; called, it trains a run."""

from nibble.room import make_callable

make_callable(__name__, "nibble.api")
