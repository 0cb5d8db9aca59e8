"""Compiled GPU kernels executed without a GPU: an emulator of the PTX that Triton writes for sm_80 and sm_90.

`emulating` runs the launches inside it. All threads of a block are computed at once with numpy; memory is checked,
order is checked by vector clocks (memory.py), and asynchronous work is done as early or as late as the program allows,
so that a missing wait, fence or barrier is a fault and not a matter of luck. What it can't tell: speed, and what ptxas
makes of the PTX (`bench.compile_kernels` reads that).
"""

from .block import MODES
from .launch import Launch, emulating
from .memory import Fault

__all__ = ["MODES", "Fault", "Launch", "emulating"]
