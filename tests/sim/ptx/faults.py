"""What a kernel did wrong. Every fault names the PTX line, the source line and the lane."""

from __future__ import annotations


class Fault(AssertionError):  # noqa: N818 - the name that other rungs match on
    """Of a launch, or (Unsupported) of loading."""


class OutOfBounds(Fault):
    """An access outside of every region, or a store into one that is read-only."""


class Misaligned(Fault):
    """An address that its access size does not divide."""


class UnwrittenRead(Fault):
    """A read of bytes that nobody wrote."""


class Diverged(Fault):
    """A warp-wide instruction that not all of the lanes it needs will execute."""


class Deadlock(Fault):
    """Nobody can run, or all that run only wait."""


class Race(Fault):
    """Two accesses to the same bytes, one a write, that nothing orders."""


class Trap(Fault):
    """The kernel executed trap or brkpt (a failed assertion)."""


class BadLaunch(Fault):
    """Grid, block, parameters or shared memory that the driver would refuse."""


class Unsupported(Fault):
    """PTX that this simulator does not know: never skipped, never guessed."""
