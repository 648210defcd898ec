"""The arithmetic of digests: a position-weighted sum modulo 2^64, the same on a CPU and on every accelerator.

A run of bytes is cut into chunks of 4 KiB, the last one filled up with zeroes, and a chunk into little-endian 32-bit words u:

    S(chunk)  =  sum of W[k] * u[k]                      k = 0 .. 1023: the word's place in the chunk
    digest    =  sum of P[c] * S(chunk c)  +  L * length                  c: the chunk's number

The weights are odd 64-bit numbers drawn once and for all (splitmix64: Steele, Lea, Flood, "Fast splittable pseudorandom number
generators", 2014).

What it catches. For certain: any change inside one 32-bit word, so every flipped bit; a length that is not the announced one.
Everything else by chance: of all choices of weights a share of less than 2^-26 hides a given change, whatever it is. (Let 2^v be
the highest power of two that divides all words' changes, v <= 31, and 2^j the one that divides a changed chunk's S. Among odd W
j has the probability 2^(v - j) or less, for v < j < 64; P hides such a change with 2^(j - 63). For all j that makes
(64 - v) * 2^(v - 63), and S does not change at all with 2^(v - 63).) It is that large only where nothing but the highest bits of
32-bit words changed, in several chunks; less than 2^-41 where the signs of 16-bit numbers are the highest that changed; and
about 2^-57 for most changes: swapped words, rows or chunks, shifted or repeated data, stale or torn pages. A plain sum would
miss all of these, and one of 64-bit words with odd weights any two flips of a word's highest bit.

What it does not: somebody who knows the weights, which are no secret, can make bytes that have any digest he likes.

It is linear in the bytes: sums of parts add up to the sum of the whole, however it is cut, where every part has the weights of
its place in the whole (memory.slices). So parts can be summed in any order, by any thread, block of threads, or process.
"""

from __future__ import annotations

import ctypes
import itertools
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch

from checkpoint_engine.planning.digests import in_order, unpack

CHUNK_BYTES = 4096
"""Weights begin anew after so many bytes: few enough for all of them to stay in registers or in the first cache."""
WORDS = CHUNK_BYTES // 8
"""64-bit words of a chunk, each of which holds two 32-bit words."""
LENGTH_WEIGHT = 0xD1B54A32D192ED03
MASK64 = (1 << 64) - 1
DEVICE_PIECE = 8 << 20
"""Bytes that a device without the kernel sums up at a time; it takes six times as many for intermediate results."""
SMALL_BYTES = 1 << 18
"""A CPU sums up runs below this in a copy, many at a time: a call for each would take longer than its bytes."""
COPY_BYTES = 16 << 20
"""Of such copies at a time, in which a run has CHUNK_BYTES at least."""
_LOW32 = (1 << 32) - 1
_PLACES = 1 << 32  # where the numbers begin that place weights are drawn from
_ANY_LENGTH = ctypes.c_char * (1 << 62)


def signed(value: int) -> int:
    """A 64-bit number as torch's int64 has it."""
    return (value & MASK64) - ((value & (1 << 63)) << 1)


def _shifted(value: torch.Tensor, bits: int) -> torch.Tensor:
    """int64, shifted to the right, zeroes coming in."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def _drawn(numbers: torch.Tensor) -> torch.Tensor:
    """splitmix64's outputs of these numbers, made odd."""
    z = (numbers + 1) * signed(0x9E3779B97F4A7C15)
    z = (z ^ _shifted(z, 30)) * signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shifted(z, 27)) * signed(0x94D049BB133111EB)
    return (z ^ _shifted(z, 31)) | 1


# W of a chunk's even words is _LOW, of its odd ones _HIGH. They are made from two rows of numbers so that a CPU, which has
# no fast way to 32-bit words, gets the same sum from 64-bit words x: sum of _AT_0 * x, plus sum of _AT_4 * y, where y are
# the words that begin 4 bytes later. (Every W is a free 64-bit number nevertheless: the map between the two is one to one.)
_AT_0 = _drawn(torch.arange(WORDS))
_AT_4 = _drawn(torch.arange(WORDS, 2 * WORDS))  # its last y has nothing of the next chunk in its upper half
_none = torch.zeros(1, dtype=torch.int64)
_LOW = _AT_0 + (torch.cat([_none, _AT_4[:-1]]) << 32)
_HIGH = _AT_4 + (_AT_0 << 32)

_made: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}
_places: dict[torch.device, torch.Tensor] = {}
_making = threading.Lock()


def word_weights(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """W of a chunk's even and of its odd 32-bit words: int64, (WORDS,) each, on `device`."""
    made = _made.get(device)
    if made is None:
        made = _made[device] = (_LOW.to(device), _HIGH.to(device))
    return made


def place_weights(device: torch.device, chunks: int) -> torch.Tensor:
    """P of at least the first `chunks` chunks: int64, one-dimensional, on `device`. 8 bytes a chunk."""
    found = _places.get(device)
    if found is None or len(found) < chunks:
        with _making:
            found = _places.get(device)
            if found is None or len(found) < chunks:
                size = 1 << max(12, (chunks - 1).bit_length())
                # Copied there, which is waited for: any stream may use it at once.
                found = _places[device] = _drawn(torch.arange(_PLACES, _PLACES + size)).to(device)
    return found


def partial_sum(raw: torch.Tensor, first: int = 0) -> torch.Tensor:
    """The sum of the chunks that `raw` (uint8, one-dimensional, contiguous, at any address) consists of, of which the first is
    number `first` of its run. Only the run's last chunk may be shorter than CHUNK_BYTES. int64, (), on `raw`'s device.

    Takes one core of a CPU: threads of torch's own would compete with those that call this.
    """
    if not raw.numel():
        return torch.zeros((), dtype=torch.int64, device=raw.device)
    sums = chunk_sums(raw) if raw.device.type == "cpu" else _device_sums(raw)
    places = place_weights(raw.device, first + len(sums))[first : first + len(sums)]
    return torch.dot(sums, places) if raw.device.type == "cpu" else (sums * places).sum()


def finish(total: int, nbytes: int) -> int:
    """The digest of a run of `nbytes` bytes, from the sum of its chunks. Never 0, which means that no digest was made."""
    return (total + nbytes * LENGTH_WEIGHT) & MASK64 or 1


def digest(raw: torch.Tensor) -> int:
    """64 bits of `raw` (uint8, one-dimensional, contiguous), on whatever device; never 0. Waits for the device."""
    return finish(int(partial_sum(raw)), raw.numel())


class _Part(NamedTuple):
    """`nbytes` bytes of run number `run`, which begin at `address` with chunk number `chunk`."""

    run: int
    address: int
    nbytes: int
    chunk: int

    @property
    def rows(self) -> int:
        return -(-self.nbytes // CHUNK_BYTES)


def run_sums(raws: Sequence[torch.Tensor], firsts: Sequence[int]) -> list[int]:
    """`partial_sum` of each of these, in a CPU's memory, in a few calls of torch however many they are. (Threads that come back
    to the interpreter after every few hundred KiB wait for one another there: 16 of them made 1 GB/s.) Takes up to COPY_BYTES
    of memory."""
    if len(raws) > 1 and sum(max(raw.numel(), CHUNK_BYTES) for raw in raws if raw.numel() < SMALL_BYTES) > COPY_BYTES:
        half = len(raws) // 2
        return run_sums(raws[:half], firsts[:half]) + run_sums(raws[half:], firsts[half:])
    placed: list[_Part] = []
    copied: list[_Part] = []
    for run, (raw, first) in enumerate(zip(raws, firsts, strict=True)):
        at, nbytes = raw.data_ptr(), raw.numel()
        inside = nbytes // CHUNK_BYTES * CHUNK_BYTES if nbytes >= SMALL_BYTES else 0
        if inside:
            placed.append(_Part(run, at, inside, first))
        if inside < nbytes:
            copied.append(_Part(run, at + inside, nbytes - inside, first + inside // CHUNK_BYTES))
    parts = placed + copied
    ends = [0, *itertools.accumulate(part.rows for part in parts)]
    sums = torch.empty(ends[-1], dtype=torch.int64)
    done = 0
    for address, rows in _adjacent(placed):
        row_sums(address, sums[done : done + rows], WORDS)
        done += rows
    if copied:
        padded = torch.zeros((ends[-1] - done) * CHUNK_BYTES, dtype=torch.uint8)
        for part, row in zip(copied, ends[len(placed) :], strict=False):
            ctypes.memmove(padded.data_ptr() + (row - done) * CHUNK_BYTES, part.address, part.nbytes)
        row_sums(padded.data_ptr(), sums[done:], WORDS)
    places = place_weights(sums.device, max((part.chunk + part.rows for part in parts), default=1))
    sums.mul_(torch.cat([places[part.chunk : part.chunk + part.rows] for part in parts] or [places[:0]]))
    totals = torch.cat([_none, sums.cumsum(0)])[torch.tensor(ends)].diff()  # modulo 2^64, as all of this
    found = [0] * len(raws)
    for part, total in zip(parts, totals.tolist(), strict=True):
        found[part.run] += total
    return found


def _adjacent(parts: Iterable[_Part]) -> Iterator[tuple[int, int]]:
    """Address and number of chunks of all these whole chunks, those that lie one after the other taken together."""
    start = end = 0
    for part in parts:
        if part.address != end:
            if start < end:
                yield start, (end - start) // CHUNK_BYTES
            start = part.address
        end = part.address + part.nbytes
    if start < end:
        yield start, (end - start) // CHUNK_BYTES


def chunk_sums(raw: torch.Tensor) -> torch.Tensor:
    """S of each chunk of a CPU's memory, the last one filled up with zeroes. int64."""
    rows, rest = divmod(raw.numel(), CHUNK_BYTES)
    sums = torch.empty(rows + bool(rest), dtype=torch.int64)
    if rows:
        row_sums(raw.data_ptr(), sums[:rows], WORDS)
    if rest:
        last = torch.zeros(CHUNK_BYTES, dtype=torch.uint8)
        last[:rest] = raw[rows * CHUNK_BYTES :]
        row_sums(last.data_ptr(), sums[rows:], WORDS)
    return sums


def row_sums(address: int, out: torch.Tensor, stride: int, first: int = 0, words: int = WORDS) -> None:
    """Into `out` (int64) for each of its rows: the sum of W * u over 64-bit words [first, first + words) of a chunk, of which the
    first row's lie at `address` and every further one's `stride` words after."""
    rows = len(out)
    span = (rows - 1) * stride + words
    x = _words_at(address, span).as_strided((rows, words), (stride, 1))
    # torch's products of int64 matrices and vectors make no copies, start no threads and let other threads run.
    torch.mv(x, _AT_0[first : first + words], out=out)
    if words > 1:
        y = _words_at(address + 4, span - 1).as_strided((rows, words - 1), (stride, 1))
        out.addmv_(y, _AT_4[first : first + words - 1])
    out.add_(_shifted(x[:, -1], 32).mul_(_AT_4[first + words - 1]))  # half of a y that reaches out of these words
    if first:
        out.add_((x[:, 0] << 32).mul_(_AT_4[first - 1]))


def unpacked(packed: bytes) -> torch.Tensor:
    """int64, from 8 bytes each: digests, as they travel (planning.digests)."""
    return torch.frombuffer(unpack(packed), dtype=torch.int64) if packed else torch.zeros(0, dtype=torch.int64)


def packed(sums: torch.Tensor) -> bytes:
    """As `unpacked` takes them. Waits for the device."""
    there = sums.cpu().contiguous()
    return in_order(ctypes.string_at(there.data_ptr(), there.nbytes))


def _words_at(address: int, count: int) -> torch.Tensor:
    """int64, (count,), over memory at any address, which torch's views could not have unless it is a multiple of 8."""
    return torch.frombuffer(_ANY_LENGTH.from_address(address), dtype=torch.int64, count=count)


def _device_sums(raw: torch.Tensor) -> torch.Tensor:
    low, high = word_weights(raw.device)
    sums = []
    for piece in torch.split(raw, DEVICE_PIECE):
        if piece.numel() % CHUNK_BYTES or piece.data_ptr() % 8 or piece.storage_offset() % 8:
            padded = piece.new_zeros(-(-piece.numel() // CHUNK_BYTES) * CHUNK_BYTES)
            padded[: piece.numel()] = piece
            piece = padded
        words = piece.view(torch.int64).view(-1, WORDS)
        sums.append(((words & _LOW32) * low).addcmul_(_shifted(words, 32), high).sum(1))
    return torch.cat(sums)
