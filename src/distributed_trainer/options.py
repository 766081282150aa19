# SPDX-License-Identifier: Apache-2.0
"""What a trainer is asked for, beside the model and the ranks."""

from __future__ import annotations

from dataclasses import dataclass

from .compression import PowerSGD

_WIRE_DTYPES = ("bfloat16", "float16")
_NONFINITE_POLICIES = ("ignore", "skip", "raise")


@dataclass(frozen=True)
class TrainerOptions:
    """Those arguments of `create_distributed_trainer` that say how to train; they are described there.

    Raises:
        TypeError, ValueError: One is not what is described there, or two do not go together.
    """

    split_batches: bool
    sync_batchnorm: bool
    compression: PowerSGD | None
    shard_optimizer: bool
    wire_dtype: str | None
    nonfinite_gradients: str
    reproducible: int | None
    balance: str | None

    def __post_init__(self) -> None:
        if self.wire_dtype not in (None, *_WIRE_DTYPES):
            raise ValueError(f"wire_dtype must be one of {', '.join(_WIRE_DTYPES)} or None, not {self.wire_dtype!r}")
        if not isinstance(self.compression, PowerSGD | None):
            raise TypeError(f"compression must be PowerSGD(rank=...) or None, not {self.compression!r}")
        if self.shard_optimizer:
            for name in ("compression", "wire_dtype"):
                if getattr(self, name) is not None:
                    raise ValueError(f"pass {name} or shard_optimizer, not both: shards are summed exactly")
        if self.reproducible is not None:
            if not isinstance(self.reproducible, int) or isinstance(self.reproducible, bool) or self.reproducible < 1:
                raise ValueError(f"reproducible must be a number of shards or None, not {self.reproducible!r}")
            if not self.split_batches:
                raise ValueError(
                    "reproducible= needs batches that do not depend on the number of ranks: pass whole batches, or "
                    "use trainer.loader, without split_batches=False"
                )
            for name in ("compression", "wire_dtype", "shard_optimizer", "balance"):
                if getattr(self, name):
                    raise ValueError(f"pass {name} or reproducible, not both: shards are summed in their own way")
        if self.balance not in (None, "speed"):
            raise ValueError(f'balance must be "speed" or None, not {self.balance!r}')
        if self.balance is not None and not self.split_batches:
            raise ValueError(
                "balance= chooses how batches are split, but with split_batches=False each rank brings its own part: "
                "pass whole batches or use trainer.loader, without split_batches=False"
            )
        if self.nonfinite_gradients not in _NONFINITE_POLICIES:
            policies = ", ".join(_NONFINITE_POLICIES)
            raise ValueError(f"nonfinite_gradients must be one of {policies}, not {self.nonfinite_gradients!r}")
