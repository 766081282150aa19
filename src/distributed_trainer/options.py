# SPDX-License-Identifier: Apache-2.0
"""Options of a trainer: the arguments of `create_distributed_trainer` besides the model and the ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

WireDtype = Literal["bfloat16", "float16"]
Precision = Literal["bfloat16", "float16"]
NonfinitePolicy = Literal["ignore", "skip", "raise"]
ShardedState = Literal["optimizer"]
BufferRule = Literal["first", "mean", "gather"]


@dataclass(frozen=True, kw_only=True, slots=True)
class PowerSGD:
    """Low-rank compression of gradients, with error feedback: for `create_distributed_trainer(compression=...)`.

        trainer = create_distributed_trainer(model, compression=PowerSGD(rank=4, dtype="bfloat16"))

    The gradient of a weight [n, ...], seen as a matrix of n rows, is sent as two factors of `rank` columns wherever
    these have at most half its bytes. Biases, norms and small weights are sent as they are. The part of a gradient that
    the factors do not hold, its rest, stays on the process that computed it, and is added to the gradient of the next
    step.

    This is lossy: parameters differ from those of a run without it. All processes still have the same parameters if
    their CPUs are of the same kind. With one process nothing is compressed.

    - A process without samples in a step sends its rests of earlier steps. If no process used a parameter, its rests
      are kept for a later step.
    - If a gradient is not finite on at least one process, the whole gradient becomes NaN on every process, and its
      rests are dropped, so that later steps are free of it.
    - All rests are dropped when a parameter is frozen or unfrozen, and when `nonfinite_gradients` skips a step or
      raises.

    Each process needs memory for one more copy of the compressed gradients. For 16-bit parameters this copy and the
    factors are in float32.

    Args:
        rank: Number of columns of the factors (not the number of a process), an int of at least 1. More columns
            approximate the gradient better and cost more bytes. The default is 4. TypeError if it is not an int,
            ValueError if it is below 1.
        dtype: Type in which float32 factors and gradients travel between machines, "bfloat16" or "float16", as with
            `compression="bfloat16"`. The default, None: they travel in their own type. ValueError for other names,
            TypeError for other objects.

    Raises:
        TypeError, ValueError: An argument is not as described here.
    """

    rank: int = 4
    """Number of columns of the factors."""

    dtype: WireDtype | None = None
    """Type in which float32 factors and gradients travel between machines; None for their own type."""

    def __post_init__(self) -> None:
        if not isinstance(self.rank, int) or isinstance(self.rank, bool):
            raise TypeError(f"PowerSGD: rank must be an int, not {type(self.rank).__name__}")
        if self.rank < 1:
            raise ValueError(f"PowerSGD: rank must be at least 1, not {self.rank}")
        _check_choice("PowerSGD: dtype", self.dtype, get_args(WireDtype), others=(None,))


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainerOptions:
    """Options that say how a trainer trains: arguments of `create_distributed_trainer`, which describes them in full.

    Raises:
        TypeError, ValueError: An option is not as described there, or two options do not go together.
    """

    split_batches: bool = True
    """True: every rank passes the same global batch. False: each rank passes a part of its own."""

    sync_batchnorm: bool = True
    """True: BatchNorm uses the statistics of the global batch. False: the statistics of each rank's part."""

    compression: WireDtype | PowerSGD | None = None
    """How gradients travel with fewer bytes. None: exact. See `wire_dtype` and `power_sgd`."""

    shard: ShardedState | None = None
    """State of which each rank keeps 1/N: "optimizer", the optimizer's state. None: no state."""

    nonfinite_gradients: NonfinitePolicy = "ignore"
    """Behavior of a step in which a gradient, summed over all ranks, has an infinite or NaN element: "ignore", "skip"
    or "raise"."""

    reproducible: int | None = None
    """Number of shards of each batch, which make results the same bits on any number of ranks up to it. None: no
    shards."""

    balance_speed: bool = False
    """True: split batches in proportion to how fast the ranks compute. False: evenly."""

    split: Callable[[Any, int, int | None], tuple[Any, int]] | None = None
    """Function that cuts a batch: called with the batch, the first sample and one past the last (None: to the end), it
    returns the part and the number of samples in it. None: tensors, lists and structures of them are cut."""

    batch_dim: int = 0
    """Dimension of tensors that counts the samples."""

    buffers: Mapping[str, BufferRule] | None = None
    """How the ranks' values of buffers are combined: by pattern of their names, "first", "mean" or "gather". None:
    "first" for all."""

    precision: Precision | None = None
    """Type in which forward and criterion compute, by torch.autocast; "float16" with loss scaling. None: no autocast.
    """

    def __post_init__(self) -> None:
        for name in ("split_batches", "sync_batchnorm", "balance_speed"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, not {getattr(self, name)!r}")
        if self.split is not None and not callable(self.split):
            raise TypeError(f"split must be a function of (batch, start, stop), or None, not {self.split!r}")
        if not isinstance(self.batch_dim, int) or isinstance(self.batch_dim, bool):
            raise TypeError(f"batch_dim must be an int, not {self.batch_dim!r}")
        if self.batch_dim < 0:
            raise ValueError(f"batch_dim must be at least 0, not {self.batch_dim}")
        if self.split is not None and self.batch_dim:
            raise ValueError("pass split or batch_dim, not both: split cuts the whole batch")
        if not isinstance(self.compression, PowerSGD):
            _check_choice("compression", self.compression, get_args(WireDtype), others=("PowerSGD(rank=4)", None))
        _check_choice("shard", self.shard, get_args(ShardedState), others=(None,))
        _check_choice("nonfinite_gradients", self.nonfinite_gradients, get_args(NonfinitePolicy))
        _check_choice("precision", self.precision, get_args(Precision), others=(None,))
        if not (self.buffers is None or isinstance(self.buffers, Mapping)) or not all(
            isinstance(pattern, str) for pattern in self.buffers or ()
        ):
            raise TypeError(f'buffers must be a dict such as {{"center": "mean"}}, or None, not {self.buffers!r}')
        for pattern, rule in (self.buffers or {}).items():
            _check_choice(f"buffers[{pattern!r}]", rule, get_args(BufferRule))
        if self.shard is not None and self.compression is not None:
            raise ValueError("pass compression or shard, not both: shards are summed exactly")
        if self.reproducible is not None:
            if not isinstance(self.reproducible, int) or isinstance(self.reproducible, bool) or self.reproducible < 1:
                raise ValueError(f"reproducible must be a number of shards or None, not {self.reproducible!r}")
            if not self.split_batches:
                raise ValueError(
                    "reproducible= needs batches that do not depend on the number of ranks: pass whole batches, or "
                    "use trainer.loader, without split_batches=False"
                )
            for name in ("compression", "shard", "balance_speed", "buffers"):
                if getattr(self, name):
                    raise ValueError(f"pass {name} or reproducible, not both: shards are summed in their own way")
        if self.balance_speed and not self.split_batches:
            raise ValueError(
                "balance_speed chooses how batches are split, but with split_batches=False each rank brings its own "
                "part: pass whole batches or use trainer.loader, without split_batches=False"
            )

    @property
    def wire_dtype(self) -> WireDtype | None:
        """Type in which sums of float32 travel between machines; None for float32."""
        return self.compression.dtype if isinstance(self.compression, PowerSGD) else self.compression

    @property
    def power_sgd(self) -> PowerSGD | None:
        """Low-rank compression of gradients; None without."""
        return self.compression if isinstance(self.compression, PowerSGD) else None

    @property
    def scales_loss(self) -> bool:
        """Whether gradients are computed with a scaled loss, for float16."""
        return self.precision == "float16"

    @property
    def checks_gradients(self) -> bool:
        """Whether each step looks for infinite and NaN gradients."""
        return self.scales_loss or self.nonfinite_gradients != "ignore"

    @property
    def shards_optimizer(self) -> bool:
        """Whether each rank keeps 1/N of the optimizer's state."""
        return self.shard == "optimizer"


def _check_choice(name: str, value: Any, known: tuple[str, ...], others: tuple[str | None, ...] = ()) -> None:
    """Raise TypeError or ValueError that lists the known values, unless `value` is one of them or an allowed None."""
    if value in known if isinstance(value, str) else value is None and None in others:
        return
    words = [*(f'"{one}"' for one in known), *map(str, others)]
    listed = " or ".join(filter(None, [", ".join(words[:-1]), words[-1]]))
    kind = ValueError if isinstance(value, str) else TypeError
    raise kind(f"{name} must be {listed}, not {value!r}")
