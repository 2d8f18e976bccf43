"""Arithmetic of y² = x³ - 3x + b modulo SM2's prime for any b: the formulas do not contain it.

Textbook affine formulas in variable time, for public numbers. The attacks with points of other
curves are possible because b is not in them (Biehl, Meyer, Müller, CRYPTO 2000).
"""

from __future__ import annotations

from hsmwrap.sm2.curve import GX, GY, A, P

Point = tuple[int, int] | None
"""None is the point at infinity."""

G: tuple[int, int] = (GX, GY)
"""The generator of SM2."""


def add(left: Point, right: Point) -> Point:
    """The sum of two points of one curve."""
    if left is None or right is None:
        return left or right
    (x1, y1), (x2, y2) = left, right
    if x1 == x2:
        if (y1 + y2) % P == 0:
            return None
        slope = (3 * x1 * x1 + A) * pow(2 * y1, -1, P)
    else:
        slope = (y2 - y1) * pow(x2 - x1, -1, P)
    x = (slope * slope - x1 - x2) % P
    return x, (slope * (x1 - x) - y1) % P


def multiples_of(point: Point) -> list[Point]:
    """``point`` times 1, 2, 4, … 2^255."""
    table = [point]
    while len(table) < 256:  # noqa: PLR2004  # bits of a scalar
        table.append(add(table[-1], table[-1]))
    return table


def multiply(scalar: int, table: list[Point]) -> Point:
    """``scalar`` times the point whose :func:`multiples_of` are ``table``."""
    total: Point = None
    for bit, multiple in enumerate(table):
        if scalar >> bit & 1:
            total = add(total, multiple)
    return total


def small_order_points() -> dict[str, tuple[int, int]]:
    """Points of order 2 and 3 on curves that differ from SM2's in b.

    (x, 0) is its own negative. A point has order 3 where its x is a root of the third division
    polynomial 3x⁴ + 6ax² + 12bx - a², which determines b.
    """
    return {"order 2": (2, 0), "order 3": _order_three()}


def _order_three() -> tuple[int, int]:
    for x in range(1, 100):
        b = (A * A - 6 * A * x * x - 3 * x**4) * pow(12 * x, -1, P) % P
        square = (x**3 + A * x + b) % P
        y = pow(square, (P + 1) // 4, P)
        if y * y % P == square:
            return x, y
    raise AssertionError("every second number is a square")
