"""The dtypes that safetensors 0.8 knows: their names and widths.

The list is the library's own: `safe_open` names every variant it accepts when it refuses one.
"""

from __future__ import annotations

DTYPE_BITS: dict[str, int] = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}
"""Bits per element. Sub-byte elements are packed; a tensor of them must fill whole bytes."""

CASTABLE = frozenset({"F16", "BF16", "F32", "F64"})
"""Dtypes a conversion may cast. Narrower floats are quantised weights whose scales lie in other tensors."""

TORCH_NAMES: dict[str, str] = {
    "BOOL": "bool",
    "F4": "float4_e2m1fn_x2",
    "U8": "uint8",
    "I8": "int8",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "I16": "int16",
    "U16": "uint16",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "U32": "uint32",
    "F32": "float32",
    "C64": "complex64",
    "F64": "float64",
    "I64": "int64",
    "U64": "uint64",
}
"""The attribute of `torch` for each dtype that torch has (it has no 6-bit floats)."""

MAX_TENSOR_BYTES = 1 << 50
"""No tensor is larger: products of hostile shapes stop here."""


def tensor_bytes(dtype: str, shape: tuple[int, ...]) -> int | None:
    """Return the bytes that a tensor fills, or None when it cannot exist.

    A tensor cannot exist when it is larger than `MAX_TENSOR_BYTES` or ends inside a byte.

    Args:
        dtype: A key of `DTYPE_BITS`.
        shape: Element counts, none negative; `()` is one element.
    """
    if 0 in shape:
        return 0
    bits = DTYPE_BITS[dtype]
    for extent in shape:
        bits *= extent
        if bits > MAX_TENSOR_BYTES * 8:
            return None
    return bits // 8 if bits % 8 == 0 else None
