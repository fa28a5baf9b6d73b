"""CRC-32 of a record that was read in pieces, in any order and by any thread: from the pieces' own checksums.

A CRC is a remainder of polynomials over GF(2): crc(A B) = crc(A) x^(8 |B|) + crc(B) modulo the CRC's polynomial. The
bits of zip's are in reverse order (Ross Williams, "A painless guide to CRC error detection algorithms").
"""

from __future__ import annotations

from functools import lru_cache

_POLYNOMIAL = 0xEDB88320  # of zip, reversed: bit 31 is x^0


def combine(first: int, second: int, length: int) -> int:
    """The CRC-32 of two byte strings end to end, from that of each; `length` in bytes is the second one's."""
    return _multiply(_shift(length), first) ^ second


def _multiply(a: int, b: int) -> int:
    """The product of two polynomials modulo the CRC's."""
    product = 0
    for bit in range(31, -1, -1):
        if a >> bit & 1:
            product ^= b
        b = b >> 1 ^ (_POLYNOMIAL if b & 1 else 0)  # times x
    return product


@lru_cache(maxsize=4096)
def _shift(length: int) -> int:
    """x^(8 length), by repeated squaring."""
    power, square = 1 << 31, 1 << 23  # x^0 and x^8
    while length:
        if length & 1:
            power = _multiply(power, square)
        square = _multiply(square, square)
        length >>= 1
    return power
