"""One block of threads: groups of lanes that stand at the same instruction, barriers, and asynchronous work.

Asynchronous work (cp.async, TMA, wgmma) is done as early as the program allows ("eager"), as late ("lazy"), or at any
time between ("random", where warps run apart, too). A right program gives the same bits in all three.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .memory import Fault, GlobalMemory, SharedMemory
from .program import Program

MODES = ("eager", "lazy", "random")
_LIMIT = 10_000_000


@dataclass(eq=False)
class Group:
    """Threads that go together; lanes ascending. waits: None, or for what."""

    lanes: np.ndarray
    pc: int
    waits: str | None = None


@dataclass
class Barrier:
    """mbarrier: arrivals and bytes still to come in this phase, and what those who arrived are sure of."""

    count: int
    pending: int
    known: np.ndarray
    bytes: int = 0
    phase: int = 0
    published: np.ndarray | None = None
    landed: list[np.ndarray] = field(default_factory=list)  # places of the copies of the phase that is complete
    landing: list[np.ndarray] = field(default_factory=list)


@dataclass
class Copies:
    """A warp's cp.async: groups that are closed, and the open one. A copy: (places, addresses of its sources, which of
    them are read and not zeros, the instruction)."""

    closed: list[list[Any]] = field(default_factory=list)
    open: list[Any] = field(default_factory=list)


@dataclass
class Products:
    """A warpgroup's wgmma: groups that are closed, and the open one; registers changed since its last wgmma.fence."""

    closed: list[list[Any]] = field(default_factory=list)
    open: list[Any] = field(default_factory=list)
    changed: set[int] = field(default_factory=set)

    def written(self) -> set[int]:
        return {slot for job in self.pending() for slot in job.accumulators}

    def read(self) -> set[int]:
        return {slot for job in self.pending() for slot in job.a_slots}

    def pending(self) -> list[Any]:
        return [job for group in self.closed for job in group] + self.open


class Block:
    """See the module. arguments: by parameter, integers, floats or descriptors; place: (x, y, z) of grid."""

    def __init__(
        self, program: Program, steps: list[Any], memory: GlobalMemory, arguments: list[Any], number: int,
        place: tuple[int, ...], grid: tuple[int, ...], shared_bytes: int, mode: str, seed: int,
    ) -> None:  # fmt: skip
        self.program, self.steps, self.memory, self.arguments = program, steps, memory, arguments
        self.number, self.place, self.grid, self.mode = number, place, grid, mode
        self.random = random.Random(f"{seed}/{number}")
        self.threads = np.arange(program.threads)
        self.warps = self.threads // 32
        self.shared = SharedMemory(shared_bytes, -(-program.threads // 32))
        self.registers: list[np.ndarray | None] = [None] * len(program.registers)
        self.matrix_slots = frozenset().union(*(step.matrix_slots for step in steps))
        self.arrived: dict[int, list[Group]] = {}
        self.barriers: dict[int, Barrier] = {}
        self.copies = [Copies() for _ in range(len(self.shared.clock))]
        self.products = [Products() for _ in range(-(-program.threads // 128))]
        self.tensor_copies: list[Any] = []
        self.executed = 0

    def held(self, slot: int) -> np.ndarray:
        """A register's bits in every thread; ones (a NaN) where it was never written."""
        found = self.registers[slot]
        if found is None:
            bits = self.program.registers[slot]
            fill = False if bits.kind == "b" else np.iinfo(bits).max
            found = self.registers[slot] = np.full(len(self.threads), fill, bits)
        return found

    def lanes(self, lanes: np.ndarray | None) -> np.ndarray:
        return self.threads if lanes is None else lanes

    def warps_of(self, lanes: np.ndarray | None) -> np.ndarray:
        """`[k]`, of each lane."""
        return self.warps if lanes is None else self.warps[lanes]

    # Running.

    def run(self) -> None:
        """To the end of every thread.

        Raises:
            Fault: what the program must not do, a deadlock among it.
        """
        unit = len(self.threads)
        if self.mode == "random":
            unit = 128 if self.matrix_slots else 32
        groups = [Group(self.threads[n : n + unit], 0) for n in range(0, len(self.threads), unit)]
        while groups:
            ready = [group for group in groups if group.waits is None]
            if not ready:
                # Phases may have passed, or a copy may be what all are waiting for.
                waiting = [group for group in groups if group.waits == "mbarrier"]
                if not any(self._may_go_on(group) for group in waiting) and not self._land_one():
                    where = "; ".join(f"{len(g.lanes)} threads at {self.steps[g.pc].text:.80}" for g in groups)
                    raise Fault(f"deadlock: {where}")
                for group in waiting:
                    group.waits = None
                continue
            if self.mode == "random":
                if self.random.random() < 0.3:
                    self._land_one()
                group = self.random.choice(ready)
                self._merge(groups, group, unit)
                self._burst(groups, group, self.random.choice([5, 50, 500, 5000]))
            else:
                group = min(ready, key=lambda one: one.pc)
                self._merge(groups, group, unit)
                self._burst(groups, group, _LIMIT)
        # What no one waited for would write into shared memory that is someone else's by then.
        if self.tensor_copies:
            raise Fault("the block ends with a tensor copy on its way")
        if any(products.pending() for products in self.products):
            raise Fault("the block ends with matrix products on their way")

    def _may_go_on(self, group: Group) -> bool:
        return self.steps[group.pc].done_waiting(self, group.lanes)

    def _merge(self, groups: list[Group], group: Group, unit: int) -> None:
        """With those that stand at the same place; where warps run apart, of the same unit."""
        for other in [g for g in groups if g is not group and g.pc == group.pc and g.waits is None]:
            if self.mode != "random" or other.lanes[0] // unit == group.lanes[0] // unit:
                group.lanes = np.union1d(group.lanes, other.lanes)
                groups.remove(other)

    def _burst(self, groups: list[Group], group: Group, quota: int) -> None:
        """Run a group until it waits, splits, ends or comes to where another one stands."""
        others = [g.pc for g in groups if g is not group and g.waits is None]
        lowest = min(others, default=_LIMIT)
        for _ in range(quota):
            self.executed += 1
            if self.executed > _LIMIT:
                raise Fault("the program doesn't end")
            step = self.steps[group.pc]
            if step.flow is None:
                self._execute(step, group.lanes)
                group.pc += 1
            elif not step.flow(self, groups, group):
                return
            if group.pc in others or (self.mode != "random" and group.pc > lowest):
                return

    def _execute(self, step: Any, lanes: np.ndarray) -> None:
        active: np.ndarray | None = None if len(lanes) == len(self.threads) else lanes
        if step.predicate is not None:
            true = step.predicate(self, active) != step.negated
            if not true.any():
                return
            if not true.all():
                active = lanes[true]
        if step.matrix_slots:
            self._check_registers(step, self.lanes(active))
        step.run(self, active)

    def _check_registers(self, step: Any, lanes: np.ndarray) -> None:
        """Registers of matrix products are no one's while these run, and new values need a fence before the next."""
        for number in np.unique(lanes // 128):
            products = self.products[number]
            if step.is_product:
                if products.changed & step.matrix_slots:
                    raise Fault(f"{step.text:.100}: registers were written since the last wgmma.fence")
                continue
            if products.written() & step.matrix_slots or products.read() & step.writes:
                raise Fault(f"{step.text:.100}: registers of a matrix product that no one waited for")
            products.changed |= step.writes & self.matrix_slots

    # Barriers of threads.

    def arrive(self, group: Group, number: int, expected: int) -> None:
        """A group at a barrier of threads; the last to come lets all go on, sure of what the others did."""
        here = self.arrived.setdefault(number, [])
        here.append(group)
        group.waits = "barrier"
        count = sum(len(g.lanes) for g in here)
        if count > expected:
            raise Fault(f"barrier {number}: {count} threads of {expected}")
        if count == expected:
            del self.arrived[number]
            warps = np.unique(np.concatenate([self.warps[g.lanes] for g in here]))
            self.shared.acquire(warps, self.shared.release(warps))
            for member in here:
                member.waits = None

    # mbarriers.

    def barrier_at(self, address: int, what: str) -> Barrier:
        if address not in self.barriers:
            raise Fault(f"{what}: no mbarrier was initialised there")
        return self.barriers[address]

    def phase_may_end(self, barrier: Barrier) -> None:
        if barrier.pending == 0 and barrier.bytes == 0:
            barrier.phase ^= 1
            barrier.pending = barrier.count
            barrier.published, barrier.known = barrier.known, np.zeros_like(barrier.known)
            barrier.landed, barrier.landing = barrier.landing, []

    # Copies by the copy engine.

    def _land_one(self) -> bool:
        if not self.tensor_copies:
            return False
        number = self.random.randrange(len(self.tensor_copies)) if self.mode == "random" else 0
        self.land(self.tensor_copies.pop(number))
        return True

    def land(self, copy: Any) -> None:
        places, fetch, address, what = copy
        self.shared.land(places, fetch().ravel())
        barrier = self.barrier_at(address, what)
        barrier.bytes -= places.size
        if barrier.pending == 0 and barrier.bytes < 0:
            raise Fault(f"{what}: more bytes than the mbarrier expects")
        barrier.landing.append(places)
        self.phase_may_end(barrier)
