"""PTX executed on the CPU, every thread of every block a numpy lane.

    module = ptx.load(text)
    memory = ptx.Memory()
    memory.add_array(x, name="x")
    module.launch("kernel", (blocks,), (threads,), module.kernels["kernel"].pack([x, n]),
                  memory=memory)

A launch ends in a Report or in a Fault that names the PTX line, the source line and the lane.
What is judged: bounds, alignment, reads of what nobody wrote, warp-wide instructions without their
warp, dead-lock, and races by the happens-before of PTX's memory model (order.py). What is not:
ptxas and the machine code, timing, and the order of a real memory system beyond what that model
allows.
"""

from .faults import (
    BadLaunch,
    Deadlock,
    Diverged,
    Fault,
    Misaligned,
    OutOfBounds,
    Race,
    Trap,
    Unsupported,
    UnwrittenRead,
)
from .launch import Kernel, Module, Param, load
from .machine import Report, Schedule
from .memory import Memory, Region
from .traffic import Traffic

__all__ = [
    "BadLaunch",
    "Deadlock",
    "Diverged",
    "Fault",
    "Kernel",
    "Memory",
    "Misaligned",
    "Module",
    "OutOfBounds",
    "Param",
    "Race",
    "Region",
    "Report",
    "Schedule",
    "Traffic",
    "Trap",
    "Unsupported",
    "UnwrittenRead",
    "load",
]
