"""The part of MessagePack that MindRecord's small columns use: a map of names to numbers and texts.

In: a dict. Out: bytes, and back. Format: github.com/msgpack/msgpack, spec.md.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any


def pack_message(values: Mapping[str, Any]) -> bytes:
    """A row's small columns in MessagePack: the numbers and texts that MindRecord's columns know."""
    out = bytearray(b"\xde" + struct.pack(">H", len(values)) if len(values) > 15 else bytes([0x80 | len(values)]))
    for name, value in values.items():
        out += _pack_text(name)
        if isinstance(value, str):
            out += _pack_text(value)
        elif isinstance(value, float):
            out += b"\xcb" + struct.pack(">d", value)
        elif -32 <= value < 128:
            out += struct.pack(">b", value)
        elif value >= 0:
            code, form = next((c, f) for c, f, top in _UNSIGNED if value < top)
            out += bytes([code]) + struct.pack(form, value)
        else:
            code, form = next((c, f) for c, f, low in _SIGNED if value >= low)
            out += bytes([code]) + struct.pack(form, value)
    return bytes(out)


_UNSIGNED = ((0xCC, ">B", 1 << 8), (0xCD, ">H", 1 << 16), (0xCE, ">I", 1 << 32), (0xCF, ">Q", 1 << 64))
_SIGNED = ((0xD0, ">b", -(1 << 7)), (0xD1, ">h", -(1 << 15)), (0xD2, ">i", -(1 << 31)), (0xD3, ">q", -(1 << 63)))
_FORMS = {code: form for code, form, _ in (*_UNSIGNED, *_SIGNED)} | {0xCA: ">f", 0xCB: ">d"}
_TEXTS = {0xD9: ">B", 0xDA: ">H", 0xDB: ">I"}


def _pack_text(text: str) -> bytes:
    data = text.encode()
    if len(data) < 32:
        return bytes([0xA0 | len(data)]) + data
    code, form = (0xD9, ">B") if len(data) < 256 else (0xDA, ">H") if len(data) < 65536 else (0xDB, ">I")
    return bytes([code]) + struct.pack(form, len(data)) + data


def unpack_message(data: bytes) -> dict[str, Any]:
    """A MessagePack map of numbers, booleans and texts; ValueError for anything else."""
    at = 1
    count = data[0] & 0x0F
    if data[0] == 0xDE:
        (count,), at = struct.unpack_from(">H", data, 1), 3
    elif data[0] >> 4 != 8:
        raise ValueError("a row's columns are no map")
    values = []
    for _ in range(2 * count):
        value, at = _unpack(data, at)
        values.append(value)
    return dict(zip(values[::2], values[1::2], strict=True))


def _unpack(data: bytes, at: int) -> tuple[Any, int]:
    code, at = data[at], at + 1
    if code < 0x80 or code >= 0xE0:
        return (code if code < 0x80 else code - 256), at
    if code in (0xC0, 0xC2, 0xC3):
        return {0xC0: None, 0xC2: False, 0xC3: True}[code], at
    if code in _FORMS:
        return struct.unpack_from(_FORMS[code], data, at)[0], at + struct.calcsize(_FORMS[code])
    if code >> 5 == 5:
        length = code & 0x1F
    elif code in _TEXTS:
        length = struct.unpack_from(_TEXTS[code], data, at)[0]
        at += struct.calcsize(_TEXTS[code])
    else:
        raise ValueError(f"a column has the MessagePack type {code:#x}; allowed are numbers and texts")
    return data[at : at + length].decode("utf-8"), at + length
