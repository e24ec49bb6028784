"""Step widths: which numbers of tokens in a step give bitwise equal rows.

A kernel may sum in another order for another number of rows, and a quantized model turns a difference of 1e-7 into
a visible one where it crosses a rounding boundary. Within one set of widths every row is the same, bit for bit, so
that greedy tokens cannot depend on how they were drafted.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Widths:
    """The multiples of `step` from `least` on."""

    step: int = 1
    least: int = 1

    def width_for(self, tokens: int) -> int:
        """The smallest width that holds so many tokens."""
        return max(self.least, -(-tokens // self.step) * self.step)

    def __contains__(self, width: int) -> bool:
        return width == self.width_for(width)

    def up_to(self, most: int) -> tuple[int, ...]:
        return tuple(width for width in range(1, most + 1) if width in self)


ANY = Widths()
EVEN = Widths(2, 2)
# From the most to the least general; what holds for the widths tried is taken to hold for the whole set.
CANDIDATES = (ANY, Widths(1, 2), EVEN, Widths(4, 4), Widths(8, 8))
