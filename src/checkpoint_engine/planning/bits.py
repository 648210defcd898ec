"""Sets of small numbers as bytes: bit i % 8 of byte i // 8 for number i."""

from __future__ import annotations

from collections.abc import Iterable


def pack_bits(bits: Iterable[bool]) -> bytes:
    """As the module says; as many bytes as there are bits for."""
    flags = list(bits)
    packed = bytearray(-(-len(flags) // 8))
    for number, bit in enumerate(flags):
        if bit:
            packed[number // 8] |= 1 << number % 8
    return bytes(packed)


def unpack_bits(packed: bytes, count: int) -> tuple[int, ...]:
    """Numbers of the bits that are set, in rising order. Raises ValueError when these are not `count` bits."""
    if len(packed) != -(-count // 8) or (count % 8 and packed[-1] >> count % 8):
        raise ValueError(f"{len(packed)} bytes are not {count} bits")
    return tuple(number for number in range(count) if packed[number // 8] >> number % 8 & 1)
