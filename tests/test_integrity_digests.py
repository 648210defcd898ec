"""Digests: the arithmetic against plain integers, the same on every path, and what they must not miss."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint_engine.devices.digests import bytes_of, slice_digest, verify
from checkpoint_engine.memory import checksum
from checkpoint_engine.memory.checksum import CHUNK_BYTES, LENGTH_WEIGHT, digest, finish, partial_sum
from checkpoint_engine.memory.digest import BLOCK_BYTES, Digests, Span, content_digest
from checkpoint_engine.memory.region import HostRegion

M = (1 << 64) - 1
EDGES = (0, 1, 3, 4, 7, 8, 9, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES - 5)
LENGTHS = st.one_of(st.sampled_from(EDGES), st.integers(0, 3 * CHUNK_BYTES))
few = settings(max_examples=60, deadline=None)


def splitmix(n: int) -> int:
    z = (n + 1) * 0x9E3779B97F4A7C15 & M
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & M
    z = (z ^ z >> 27) * 0x94D049BB133111EB & M
    return (z ^ z >> 31) | 1


def word_weights() -> list[int]:
    at_0, at_4 = [splitmix(i) for i in range(512)], [splitmix(i) for i in range(512, 1024)]
    pairs = [((at_0[i] + ((at_4[i - 1] << 32) if i else 0)) & M, (at_4[i] + (at_0[i] << 32)) & M) for i in range(512)]
    return [weight for pair in pairs for weight in pair]


WEIGHTS = word_weights()


def reference(data: bytes) -> int:
    """The docstring of memory.checksum, word for word."""
    total = len(data) * LENGTH_WEIGHT
    for chunk, start in enumerate(range(0, len(data), CHUNK_BYTES)):
        part = data[start : start + CHUNK_BYTES].ljust(CHUNK_BYTES, b"\0")
        s = sum(WEIGHTS[k] * int.from_bytes(part[4 * k : 4 * k + 4], "little") for k in range(1024)) & M
        total += splitmix((1 << 32) + chunk) * s
    return total & M or 1


def raw(data: bytes, shift: int = 0) -> torch.Tensor:
    """`data` at an address that is `shift` more than a multiple of 8."""
    memory = torch.zeros(len(data) + 64, dtype=torch.uint8)
    start = -memory.data_ptr() % 8 + shift
    memory[start : start + len(data)] = torch.tensor(list(data), dtype=torch.uint8)
    return memory[start : start + len(data)]


def device_digest(tensor: torch.Tensor) -> int:
    """What a device without the kernel makes; here it is a CPU."""
    if not tensor.numel():
        return finish(0, 0)
    sums = checksum._device_sums(tensor)
    return finish(int((sums * checksum.place_weights(tensor.device, len(sums))[: len(sums)]).sum()), tensor.numel())


def test_weights_are_what_the_bounds_need() -> None:
    assert all(weight % 2 for weight in WEIGHTS)
    assert len(set(WEIGHTS)) == len(WEIGHTS) == 1024
    places = checksum.place_weights(torch.device("cpu"), 5000)[:5000].tolist()
    assert [place & M for place in places] == [splitmix((1 << 32) + c) for c in range(5000)]


@few
@given(LENGTHS, st.integers(0, 8), st.integers())
def test_every_path_computes_what_is_documented(nbytes: int, shift: int, seed: int) -> None:
    data = random.Random(seed).randbytes(nbytes)
    tensor = raw(data, shift)
    expected = reference(data)
    assert digest(tensor) == expected
    assert device_digest(tensor) == expected
    assert content_digest(data) == expected


def test_values_never_change() -> None:
    """Digests are part of versions, which fleets compare: a release that changes them must know that it does."""
    found = [content_digest(b""), content_digest(b"checkpoint"), content_digest(bytes(range(256)) * 33)]
    assert found == [reference(b""), reference(b"checkpoint"), reference(bytes(range(256)) * 33)]
    assert [f"{value:016x}" for value in found] == ["0000000000000001", "4834a346846be402", "b6a015f32d331df8"]


@few
@given(st.integers(0, 6 * CHUNK_BYTES), st.lists(st.integers(0, 6), max_size=4), st.integers())
def test_parts_add_up_in_any_order(nbytes: int, cuts: list[int], seed: int) -> None:
    data = raw(random.Random(seed).randbytes(nbytes))
    edges = sorted({0, nbytes, *(cut * CHUNK_BYTES for cut in cuts if cut * CHUNK_BYTES < nbytes)})
    parts = [(data[a:b], a // CHUNK_BYTES) for a, b in itertools.pairwise(edges)]
    random.Random(seed).shuffle(parts)
    assert finish(sum(int(partial_sum(part, first)) for part, first in parts), nbytes) == digest(data)


def test_a_long_run_in_pieces_of_each_path(monkeypatch: pytest.MonkeyPatch) -> None:
    data = torch.randint(0, 256, (2 * BLOCK_BYTES + 12345,), dtype=torch.uint8)
    monkeypatch.setattr(checksum, "DEVICE_PIECE", 5 * CHUNK_BYTES)
    assert digest(data) == device_digest(data)
    with HostRegion(len(data)) as region:
        region.tensor.copy_(data)
        span = Span(region, 0, len(data))
        assert len(span.blocks) == -(-len(data) // BLOCK_BYTES) > 1
        digests = Digests(enabled=True)
        digests.make(region, span.blocks[::-1])
        assert digests.of(span) == digest(data)


# What must be caught


def differs(before: bytes, after: bytes) -> None:
    if before != after:
        assert digest(raw(before)) != digest(raw(after))


@few
@given(st.integers(1, 2 * CHUNK_BYTES), st.integers(), st.data())
def test_any_change_of_one_32_bit_word(nbytes: int, seed: int, data: st.DataObject) -> None:
    """By proof, so for any content: odd weights lose nothing."""
    content = bytearray(random.Random(seed).randbytes(nbytes))
    before = bytes(content)
    word = data.draw(st.integers(0, (nbytes - 1) // 4)) * 4
    end = min(word + 4, nbytes)
    content[word:end] = data.draw(st.binary(min_size=end - word, max_size=end - word))
    differs(before, bytes(content))


def test_every_single_flipped_bit_of_a_chunk_and_a_bit() -> None:
    content = raw(random.Random(1).randbytes(CHUNK_BYTES + 9))
    seen = {digest(content)}
    for byte in [*range(64), *range(2000, 2032), *range(CHUNK_BYTES - 16, CHUNK_BYTES + 9)]:
        for bit in range(8):
            content[byte] ^= 1 << bit
            seen.add(digest(content))
            content[byte] ^= 1 << bit
    assert len(seen) == 1 + 8 * (64 + 32 + 25), "all caught, and no two alike"


@few
@given(st.integers(0, 2047), st.integers(0, 2047), st.integers(0, 31), st.integers())
def test_two_flips_of_the_same_bit(first: int, second: int, bit: int, seed: int) -> None:
    """A sum of 64-bit words with odd weights misses every even number of flips of their highest bit."""
    content = bytearray(random.Random(seed).randbytes(2 * CHUNK_BYTES))
    before = bytes(content)
    for word in (first, second):
        content[4 * word + bit // 8] ^= 1 << bit % 8
    differs(before, bytes(content))


def swapped(a: int, b: int, size: int) -> Callable[[bytes], bytes]:
    def swap(data: bytes) -> bytes:
        parts = [data[i : i + size] for i in range(0, len(data), size)]
        x, y = a % len(parts), b % len(parts)
        parts[x], parts[y] = parts[y], parts[x]
        return b"".join(parts)

    return swap


@few
@given(st.sampled_from([1, 2, 4, 8, 64, 256, 1024, 4096, 12288]), st.integers(0, 10**6), st.integers(0, 10**6), st.integers())
def test_swapped_elements_words_rows_and_chunks(size: int, a: int, b: int, seed: int) -> None:
    """Also of few values, as quantized and half-trained weights have."""
    rng = random.Random(seed)
    values = rng.choice([bytes(range(256)), b"\0\x01", b"\0\x80", bytes([0x3C, 0xBC, 0])])
    before = bytes(rng.choices(values, k=6 * CHUNK_BYTES))
    differs(before, swapped(a, b, size)(before))


@few
@given(st.integers(1, 5000), st.booleans(), st.integers())
def test_shifted_data(shift: int, around: bool, seed: int) -> None:
    before = random.Random(seed).randbytes(2 * CHUNK_BYTES)
    differs(before, before[shift:] + (before[:shift] if around else bytes(shift)))
    differs(before, (before[-shift:] if around else bytes(shift)) + before[:-shift])


@few
@given(st.integers(0, 2 * CHUNK_BYTES), st.integers(1, CHUNK_BYTES))
def test_zeroes_count(nbytes: int, more: int) -> None:
    assert digest(raw(bytes(nbytes))) != digest(raw(bytes(nbytes + more)))


def test_a_row_negated_reversed_or_stale() -> None:
    weights = torch.randn(64, 512, generator=torch.Generator().manual_seed(0)).bfloat16()
    seen = {digest(bytes_of(weights))}
    for change in (
        lambda row: -row,
        lambda row: row.flip(0),
        lambda row: row * 0,
        lambda row: weights[0],
        lambda row: row.roll(1),
    ):
        other = weights.clone()
        other[5] = change(other[5])
        seen.add(digest(bytes_of(other)))
    assert len(seen) == 6


def test_no_accident_among_many_corruptions() -> None:
    """Two to six random flips each; a digest of 64 good bits has no collision among so few."""
    content, rng = raw(random.Random(3).randbytes(1000)), random.Random(4)
    seen = {digest(content)}
    for _ in range(2000):
        places = [(rng.randrange(1000), 1 << rng.randrange(8)) for _ in range(rng.randint(2, 6))]
        for byte, bit in places:
            content[byte] ^= bit
        seen.add(digest(content))
        for byte, bit in places:
            content[byte] ^= bit
    assert len(seen) == 2001


# Slices, and tensors of any layout


@few
@given(st.integers(0, 40), st.integers(1, 16), st.lists(st.integers(1, 4), max_size=3), st.data())
def test_a_slice_has_the_digest_of_its_bytes_one_after_the_other(
    offset: int, run: int, sizes: list[int], data: st.DataObject
) -> None:
    strides = [data.draw(st.integers(0, 300)) for _ in sizes]
    memory = raw(random.Random(1).randbytes(8000))
    rows = [offset]
    for size, stride in zip(sizes, strides, strict=True):
        rows = [row + i * stride for row in rows for i in range(size)]
    expected = b"".join(bytes(memory[row : row + run].tolist()) for row in rows)
    assert slice_digest(memory, offset, run, sizes, strides) == reference(expected)


def test_a_slice_that_leaves_the_memory() -> None:
    with pytest.raises(RuntimeError):
        slice_digest(torch.zeros(100, dtype=torch.uint8), 50, 8, (8,), (8,))


def test_verify_names_what_differs() -> None:
    named = {"a": torch.arange(5000), "b": torch.randn(40, 30).T, "c": torch.zeros(0), "d": torch.tensor(1.5), "e": torch.ones(3)}
    digests = [digest(bytes_of(tensor)) for tensor in named.values()]
    assert digests[1] == digest(bytes_of(named["b"].clone(memory_format=torch.contiguous_format)))
    assert verify(named.items(), digests) == []
    digests[4] = 0
    named["a"][4999] += 1
    named["b"][3, 3] = -named["b"][3, 3]
    named["e"] += 1
    assert verify(named.items(), digests) == ["a", "b"], "e had no digest"
