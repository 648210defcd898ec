"""Input as nobody would send it in good faith: valid data with something wrong in its bytes, or in its structure."""

from __future__ import annotations

import copy
from typing import Any

import msgspec
from hypothesis import strategies as st

INTEGERS = st.one_of(
    st.integers(-3, 9),
    st.sampled_from([2**n + d for n in (7, 8, 15, 16, 31, 32, 53, 62, 63, 64) for d in (-1, 0, 1)]),
    st.integers(-(2**63), 2**64 - 1),
)
LEAVES = st.one_of(
    INTEGERS.filter(lambda n: -(2**63) <= n < 2**64),  # what msgpack can carry
    st.sampled_from([None, True, False, 0.5, float("nan"), float("inf"), "", "x", "\0", "é" * 300, "../../etc/passwd"]),
    st.text(max_size=5),
)
JUNK = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3))


@st.composite
def damaged(draw: st.DrawFn, valid: bytes, most: int = 5) -> bytes:
    """`valid` after up to `most` edits of its bytes."""
    data = bytearray(valid)
    for _ in range(draw(st.integers(0, most))):
        at = draw(st.integers(0, len(data)))
        match draw(st.integers(0, 5)):
            case 0:
                data[at : at + 1] = draw(st.binary(min_size=1, max_size=1))
            case 1:
                data[at:at] = draw(st.binary(max_size=9))
            case 2:
                del data[at : at + draw(st.integers(1, 9))]
            case 3:
                del data[at:]
            case 4:  # a piece once more, somewhere
                start = draw(st.integers(0, len(data)))
                data[at:at] = data[start : start + draw(st.integers(1, 40))]
            case _:
                if at < len(data):
                    data[at] ^= 1 << draw(st.integers(0, 7))
    return bytes(data)


@st.composite
def misshapen(draw: st.DrawFn, tree: Any, junk: st.SearchStrategy[Any] = JUNK, most: int = 3) -> Any:
    """`tree` (lists, dictionaries, leaves) after up to `most` of its nodes were replaced, taken away or doubled."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(0, most))):
        parent, key, node = None, None, tree
        while isinstance(node, list | dict) and node and draw(st.integers(0, 5)):
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            parent, key = node, draw(st.sampled_from(keys))
            node = node[key]
        if parent is None:
            if not draw(st.integers(0, 9)):
                tree = draw(junk)
            continue
        match draw(st.integers(0, 5)):
            case 0:
                del parent[key]
            case 1 if isinstance(parent, list):
                parent.insert(key, copy.deepcopy(node))
            case 2 if isinstance(parent, dict):
                parent[draw(st.text(max_size=4))] = copy.deepcopy(node)
            case _:
                parent[key] = draw(junk)
    return tree


def nested(message: Any, depth: int) -> bytes:
    """Its msgpack with one thing more in it that no type knows: a list in a list, so many deep."""
    tree = msgspec.msgpack.decode(msgspec.msgpack.encode(message))
    more = [*tree, None] if isinstance(tree, list) else {**tree, "more": None}
    return msgspec.msgpack.encode(more)[:-1] + b"\x91" * depth + b"\xc0"
