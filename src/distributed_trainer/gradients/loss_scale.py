# SPDX-License-Identifier: Apache-2.0
"""Loss scaling for float16 (Micikevicius et al., "Mixed Precision Training", ICLR 2018).

Gradients below 6e-8 are 0 in float16. So the loss is multiplied by a scale before backward, and the sums of gradients
are divided by it. A step whose sums are infinite or NaN is skipped, and halves the scale; many steps without such a sum
double it. These are the start value and factors of torch.amp.GradScaler. Two things differ from it: all ranks have the
same sums, so each decides alike without a message; and the scale does not fall below 1, since gradients that overflow
there do so without a scale as well.

The scale is a power of two, so multiplication and division change no bit of a gradient that stays within range.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FIRST = 2.0**16
LEAST = 1.0
GROWTH_INTERVAL = 2000


@dataclass
class LossScale:
    """Factor of the loss in backward, the same on every rank."""

    value: float = FIRST
    """The factor."""
    num_finite: int = 0
    """Number of steps since the last change, all with finite gradients."""

    @property
    def can_fall(self) -> bool:
        """Whether a gradient that is not finite may be finite with a smaller scale."""
        return self.value > LEAST

    def unscale(self, gradients: list[Tensor]) -> None:
        """Divide gradients by the scale, in place. Local."""
        if gradients:
            torch._foreach_mul_(gradients, 1 / self.value)

    def update(self, is_finite: bool) -> None:
        """Change the scale, if it is due, after a step whose gradients were finite or not. Local."""
        self.num_finite = self.num_finite + 1 if is_finite else 0
        if not is_finite:
            self.value = max(self.value / 2, LEAST)
        elif self.num_finite == GROWTH_INTERVAL:
            self.value, self.num_finite = self.value * 2, 0
