"""Memory that notices what hardware does in silence: accesses out of bounds, misaligned, of what was never written, and
accesses that nothing orders.

Order is kept by vector clocks: `clock[w, v]` is how much of warp v's past warp w is sure of. Barriers join clocks. What
one warp wrote or read, another may read or overwrite only if its clock covers it, whatever happened to come first here.
"""

from __future__ import annotations

import numpy as np

GLOBAL_BASE, SHARED_BASE = 1 << 40, 1024
_IN_FLIGHT = 1 << 30  # later than any clock: asynchronous work that no one has waited for
_RED_ZONE = 4096


class Fault(Exception):
    """What the emulated program must not do."""


class GlobalMemory:
    """An arena; between its arrays lie red zones. Blocks are in no order: one may not read or write what another one
    writes, nor write what another one reads."""

    def __init__(self) -> None:
        self.bytes = np.zeros(0, np.uint8)
        self.valid = np.zeros(0, bool)
        self.writer = np.zeros(0, np.int32)  # block, -1: none
        self.reader = np.zeros(0, np.int32)  # block, -1: none, -2: several

    def put(self, array: np.ndarray) -> int:
        """The address of a copy."""
        raw = np.ascontiguousarray(array).view(np.uint8).ravel()
        start = -(-(len(self.bytes) + _RED_ZONE) // 512) * 512
        grown = start + len(raw) + _RED_ZONE - len(self.bytes)
        self.bytes = np.concatenate([self.bytes, np.zeros(grown, np.uint8)])
        self.valid = np.concatenate([self.valid, np.zeros(grown, bool)])
        no_one = np.full(grown, -1, np.int32)
        self.writer, self.reader = (np.concatenate([x, no_one]) for x in (self.writer, self.reader))
        self.bytes[start : start + len(raw)] = raw
        self.valid[start : start + len(raw)] = True
        return GLOBAL_BASE + start

    def get(self, address: int, size: int) -> np.ndarray:
        return self.bytes[address - GLOBAL_BASE : address - GLOBAL_BASE + size]

    def read(self, addresses: np.ndarray, size: int, block: int, what: str) -> np.ndarray:
        """Bytes `[k, size]` at k addresses."""
        places = self._places(addresses, size, what)
        writer = self.writer[places]
        if ((writer != -1) & (writer != block)).any():
            raise Fault(f"{what}: reads what another block writes")
        reader = self.reader[places]
        self.reader[places] = np.where((reader == -1) | (reader == block), block, -2)
        return self.bytes[places]

    def write(self, addresses: np.ndarray, raw: np.ndarray, block: int, what: str) -> None:
        places = self._places(addresses, raw.shape[1], what)
        for other in (self.writer[places], self.reader[places]):
            if ((other != -1) & (other != block)).any():
                raise Fault(f"{what}: writes what another block reads or writes")
        self.bytes[places] = raw
        self.writer[places] = block

    def _places(self, addresses: np.ndarray, size: int, what: str) -> np.ndarray:
        first = addresses.astype(np.int64) - GLOBAL_BASE
        if (first < 0).any() or (first + size > len(self.bytes)).any():
            raise Fault(f"{what}: outside of memory")
        if (first % size).any():
            raise Fault(f"{what}: misaligned")
        places = first[:, None] + np.arange(size)
        if not self.valid[places].all():
            raise Fault(f"{what}: out of bounds")
        return places


class SharedMemory:
    """Of one block of `warps` warps, `size` bytes from `SHARED_BASE` on. Places are byte indices from 0."""

    def __init__(self, size: int, warps: int) -> None:
        self.bytes = np.full(size, 0xFF, np.uint8)
        self.valid = np.zeros(size, bool)
        self.clock = np.eye(warps, dtype=np.int32)
        # The last write of each byte: by which warp, at which of its times, and which warps have it without a barrier.
        self.writer = np.zeros(size, np.uint8)
        self.written_at = np.zeros(size, np.int32)
        self.seen = np.zeros(size, np.uint32)
        self.read_at = np.zeros((warps, size), np.int32)  # the last read by each warp
        # Written by ordinary stores, so that asynchronous units need a fence; and which warps have made one since.
        self.dirty = np.zeros(size, bool)
        self.fenced = np.zeros(size, np.uint32)

    def places(self, addresses: np.ndarray, size: int, what: str) -> np.ndarray:
        """`[k, size]` of k addresses."""
        first = addresses.astype(np.int64) - SHARED_BASE
        if (first < 0).any() or (first + size > len(self.bytes)).any():
            raise Fault(f"{what}: outside of shared memory")
        if (first % size).any():
            raise Fault(f"{what}: misaligned in shared memory")
        return first[:, None] + np.arange(size)

    def _ordered(self, places: np.ndarray, warps: np.ndarray) -> np.ndarray:
        """Whether the last write of each place is known to its warp; warps broadcasts against places."""
        known = self.clock[warps, self.writer[places]] >= self.written_at[places]
        return known | ((self.seen[places] >> warps.astype(np.uint32)) & 1).astype(bool)

    def read(self, places: np.ndarray, warps: np.ndarray, what: str) -> np.ndarray:
        """Bytes at places; warps broadcasts against them."""
        self._check_read(places, warps, what)
        self.read_at[warps, places] = self.clock[warps, warps]
        return self.bytes[places]

    def _check_read(self, places: np.ndarray, warps: np.ndarray, what: str) -> None:
        if not self.valid[places].all():
            raise Fault(f"{what}: reads shared memory that was never written")
        if not self._ordered(places, warps).all():
            raise Fault(f"{what}: reads shared memory that another warp wrote, or a copy, and nothing waited for it")

    def write(self, places: np.ndarray, raw: np.ndarray, warps: np.ndarray, what: str) -> None:
        self._check_write(places, warps, what, raw)
        self._store(places, raw)
        self.writer[places], self.written_at[places] = warps, self.clock[warps, warps]
        self.seen[places] = np.uint32(1) << warps.astype(np.uint32)
        self.dirty[places], self.fenced[places] = True, 0

    def _check_write(self, places: np.ndarray, warps: np.ndarray, what: str, raw: np.ndarray | None = None) -> None:
        late = self.read_at[:, places] > np.moveaxis(self.clock[warps], -1, 0)
        unordered = late.any(0) | (self.valid[places] & ~self._ordered(places, warps))
        if raw is not None:  # several warps may write the same
            in_flight = (self.written_at[places] == _IN_FLIGHT) | (self.read_at[:, places] == _IN_FLIGHT).any(0)
            unordered &= in_flight | (self.bytes[places] != raw)
        if unordered.any():
            raise Fault(f"{what}: overwrites shared memory that is still read or written")

    def _store(self, places: np.ndarray, raw: np.ndarray) -> None:
        self.bytes[places] = raw
        self.valid[places] = True

    # Asynchronous work.

    def begin_copy(self, places: np.ndarray, warps: np.ndarray, what: str) -> None:
        """A copy into places is on its way: till it has been waited for, they are no one's."""
        self._check_write(places, warps, what)
        self.writer[places], self.written_at[places], self.seen[places] = warps, _IN_FLIGHT, 0

    def land(self, places: np.ndarray, raw: np.ndarray) -> None:
        """The bytes arrive."""
        self._store(places, raw)
        self.dirty[places] = False

    def end_copy(self, places: np.ndarray, warp: int) -> None:
        """A warp has waited for a copy; what ordinary stores have put there since is no part of it."""
        places = places[~self.dirty[places]]
        first = self.written_at[places] == _IN_FLIGHT
        mine = places[first]
        self.writer[mine], self.written_at[mine] = warp, self.clock[warp, warp]
        self.seen[places] |= np.uint32(1 << warp)

    def begin_read(self, places: np.ndarray, warps: np.ndarray, what: str) -> None:
        """An asynchronous unit reads from now on, for all of warps, until `end_read`."""
        for warp in warps:
            self._check_read(places, warp, what)
            self.read_at[warp, places] = _IN_FLIGHT
        mask = np.uint32(sum(1 << int(warp) for warp in warps))
        by_writer = (self.fenced[places] >> self.writer[places].astype(np.uint32)) & 1
        if (self.dirty[places] & ~(by_writer.astype(bool) | ((self.fenced[places] & mask) == mask))).any():
            raise Fault(f"{what}: reads what ordinary stores wrote without fence.proxy.async")

    def end_read(self, places: np.ndarray, warps: np.ndarray) -> None:
        for warp in warps:
            self.read_at[warp, places] = self.clock[warp, warp]

    def fence(self, warps: np.ndarray) -> None:
        """fence.proxy.async by warps: what each knows to be written, asynchronous units see for it."""
        places = np.flatnonzero(self.dirty)
        for warp in warps:
            seen = self._ordered(places, warp)
            self.fenced[places[seen]] |= np.uint32(1 << int(warp))

    # Order.

    def release(self, warps: np.ndarray) -> np.ndarray:
        """What these warps together are sure of; what they do from now on is not part of it."""
        known = self.clock[warps].max(0)
        self.clock[warps, warps] += 1
        return known

    def acquire(self, warps: np.ndarray, known: np.ndarray) -> None:
        self.clock[warps] = np.maximum(self.clock[warps], known)
