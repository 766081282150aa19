# SPDX-License-Identifier: Apache-2.0
"""Create a trainer: find the ranks, and check the user's arguments."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch import nn

from ..backend import job as jobs
from ..backend.gather import call_together, gather_json
from ..backend.process_group import ProcessGroupShmpi
from ..errors import MismatchError
from ..gradients.sharded_optimizer import check_model
from ..launch import devices
from ..launch.call_sites import records_call
from ..launch.launcher import find_launcher
from ..launch.separate_models import note_connection
from ..options import PowerSGD, TrainerOptions
from ..replica.shared_buffers import check_rules
from .membership import Groups, Membership
from .trainer import DistributedTrainer

if TYPE_CHECKING:
    from mpi4py import MPI

logger = logging.getLogger("distributed_trainer")

_NUM_NAMED_RANKS = 8


@records_call
def create_distributed_trainer(
    model: nn.Module,
    num_gpus: int | None = None,
    *,
    group: MPI.Comm | dist.ProcessGroup | None = None,
    split_batches: bool = True,
    sync_batchnorm: bool = True,
    compression: Literal["bfloat16", "float16"] | PowerSGD | None = None,
    shard: Literal["optimizer"] | None = None,
    nonfinite_gradients: Literal["ignore", "skip", "raise"] = "ignore",
    reproducible: int | None = None,
    balance_speed: bool = False,
    split: Callable[[Any, int, int | None], tuple[Any, int]] | None = None,
    batch_dim: int = 0,
    buffers: Mapping[str, Literal["first", "mean", "gather"]] | None = None,
    precision: Literal["bfloat16", "float16"] | None = None,
) -> DistributedTrainer:
    """Create a trainer for `model`. Collective: every rank calls it, with the same model and options; blocks.

        model = torch.nn.Linear(8, 2)
        trainer = create_distributed_trainer(model, num_gpus=2)
        optimizer = torch.optim.Adam(model.parameters())
        loss = trainer.train_step(inputs, targets, torch.nn.CrossEntropyLoss(), optimizer)
        trainer.close()

    It starts MPI unless that has been done. Without a launcher and with `num_gpus` above 1, the script is started again
    under `mpirun -np num_gpus`, so the lines above this call run again.

    Parameters and buffers become rank 0's. So do the random states of `random`, NumPy and torch; with
    `split_batches=False` each other rank gets its own, derived from rank 0's. The model is moved to this rank's device:
    the GPU with the number of its local rank, or the CPU where there is no GPU.

    From then on the script's random streams continue as in one process: no call of the trainer draws from them or sets
    them, except for `load` and `resume`. In a step torch draws from streams of the trainer (dropout), which follow from
    the state of torch's stream at this call, so from `torch.manual_seed` before it. That holds on one rank, too, so
    dropout draws other numbers than in plain torch. For decisions about the whole batch see `common_random`.

    Args:
        model: Model to train, in place. Its parameters may be float32, float64, bfloat16 or float16, frozen, shared or
            unused. TypeError if it is not a torch.nn.Module, or is or contains a wrapper that exchanges gradients or
            weights itself (DataParallel, DistributedDataParallel, FSDP); ValueError if a lazy parameter has no shape
            yet.
        num_gpus: Number of ranks on each machine, at least 1: each has its own GPU, or is a CPU process where there is
            no GPU. Under a launcher the number of ranks that it started on this machine counts, and another number has
            no effect. The default, None, means as many as the launcher started, or 1 without a launcher. TypeError if
            it is not an int, ValueError if it is below 1, LaunchError if this machine has GPUs, but fewer than that.
        group: Ranks that train together: an mpi4py communicator, or a process group of torch.distributed (gloo, nccl,
            or shmpi, which is this package's backend over MPI). With a process group the trainer communicates over it
            instead of starting MPI, and the model stays on the device to which the caller has moved it. The default,
            None, means all ranks of the launch. TypeError for other objects.
        split_batches: True, the default: every rank passes the same global batch, and each trains on its part of it.
            False: each rank passes a part of its own; parts may differ in size, and the mean is over all samples.
            TypeError if it is not a bool.
        sync_batchnorm: True, the default: BatchNorm uses the statistics of the global batch, as one process does.
            False: the statistics of each rank's part. TypeError if it is not a bool.
        compression: Compression of gradients for slow networks (docs/slow-networks.md). Lossy: results are no longer
            exactly those of one process. The default, None, is exact.
            "bfloat16" or "float16" halves the bytes that float32 gradients take between machines: each machine's sum is
            rounded to 16 bits, these sums are added in float32, and the result is rounded to 16 bits again. All ranks
            still get the same bits. float16 overflows above 65504. On one machine it changes nothing.
            `PowerSGD(rank=4)` sends the gradients of large weights as two thin factors. With `dtype="bfloat16"` in it
            these and all other gradients also travel in 16 bits between machines.
            ValueError for other names, with `shard` or `reproducible`, and for 16 bits with a `group` of a backend
            other than shmpi; TypeError for other objects.
        shard: "optimizer": each rank keeps 1/N of the optimizer's state and updates 1/N of every parameter, and the
            ranks of a machine share one copy of the weights (docs/sharding.md). It is for CPU ranks and torch.optim's
            element-wise optimizers: SGD, Adam, AdamW, Adagrad, RMSprop, Adadelta, Adamax, NAdam, RAdam, ASGD, Rprop.
            The default, None: each rank keeps and updates all. ValueError for other names, with `compression` or
            `reproducible`, for a model on a GPU, for different parameters in the same memory, and for a `group` of a
            backend other than shmpi; TypeError for other objects.
        nonfinite_gradients: Behavior of a step in which a gradient, summed over all ranks, has an infinite or NaN
            element. "ignore", the default, does not check, as plain torch does not. "skip" leaves parameters and
            optimizer as they are, on every rank; rank 0 warns the first time, and `num_skipped_steps` counts. "raise"
            raises FloatingPointError on every rank, with parameters and optimizer as they were. Changes by forward
            remain (BatchNorm's running statistics, other buffers), as when torch's GradScaler skips a step. ValueError
            for other names, TypeError for other objects.
        reproducible: Number of shards, pieces into which each batch is cut (`shard` is something else), such as 8; at
            least the number of ranks. Weights, losses and the optimizer's state then have the same bits on any number
            of ranks up to it (docs/reproducible.md). Each shard has its own random stream and BatchNorm statistics, and
            the shards are summed in one order. It sets the number of threads to OMP_NUM_THREADS, or to 1 if that is not
            set; costs time; and works with `train_step` only, not in manual loops. The default, None, makes no shards.
            ValueError if it is not an int of at least 1, if it is below the number of ranks, and together with
            `split_batches=False`, `compression`, `shard` or `balance_speed`.
        balance_speed: True: split batches in proportion to how fast the ranks compute, which `train_step` measures; the
            mean stays exact. With `trainer.loader` the parts change only between epochs. The default, False, splits
            them evenly. TypeError if it is not a bool; ValueError with `split_batches=False` or `reproducible`.
        split: Function that cuts batches which the trainer cannot cut itself, such as batches of graphs
            (docs/training.md has examples). It is called as split(batch, start, stop) and returns two things: the part
            with the samples start to stop, and the number of samples in it. `stop` may be None, for all samples from
            start on: split(batch, 0, None) says how many samples there are. `batch` is the tuple (inputs, targets) in
            `train_step` and `evaluate`, and the part has the same form; elsewhere it is what the caller passes. The
            default, None, cuts tensors, lists and structures of them. TypeError if it is not callable, or returns
            something else in a step; ValueError with `batch_dim`, and in a step if a part does not have stop - start
            samples.
        batch_dim: Dimension that counts the samples in tensors, at least 0: with 1, inputs may be [time, batch,
            features] and targets [time, batch]. In tensors with no such dimension it is the last one, so targets may
            also be [batch]. The default is 0. TypeError if it is not an int, ValueError if it is below 0.
        buffers: How the ranks' values of a buffer become one, by patterns of its full name: `{"center": "mean",
            "encoder.*": "first"}`. "first" takes the value of the first rank that has samples. "mean" takes the mean
            over the ranks, weighted by their numbers of samples. "gather" joins the rows of all ranks, in their order.
            docs/training.md says for which buffers each gives what one process has; forward must read a buffer of the
            last two before it writes to it. Patterns are those of fnmatch; of
            several that match, the first counts. The default, None, is "first" for all buffers. Buffers of BatchNorm
            are exact anyway, and match only with `sync_batchnorm=False`. TypeError if it is not a dict of names;
            ValueError for other rules, for a pattern that matches nothing, for "mean" of integers, and with
            `reproducible`.
        precision: Mixed precision (docs/training.md): "bfloat16" or "float16" runs the model and the criterion in
            torch.autocast with this type, in `train_step`, `forward` and `evaluate`; backward and optimizer run outside
            of it, and weights stay as they are. "float16" also scales the loss in backward, as torch's GradScaler does.
            All ranks skip a step whose gradients overflow, which `num_skipped_steps` counts; the scale, 65536 at first,
            is then halved, but not below 1, and doubled after 2000 steps without an overflow. Checkpoints hold it. A
            gradient that is infinite or NaN while the scale is 1 is not an ordinary overflow: rank 0 warns the first
            time, or `nonfinite_gradients="raise"` raises FloatingPointError. The default, None, computes in the types
            of weights and inputs. ValueError for other names, for "float16" and a parameter that is float16, and if
            torch has no such autocast on this device, TypeError for other objects.

    Returns:
        The trainer, a context manager.

    Raises:
        TypeError, ValueError: An argument is not as described above. Types, names and combinations of options are
            checked before any communication.
        MPINotFoundError: There is no MPI library, or none for which this package was built.
        LaunchError: The processes were not started as one MPI job, there are more of them than GPUs, or this is a
            DataLoader worker.
        MismatchError: Ranks pass different options, have different models, or run different versions of the package;
            or, with `reproducible`, they have CPUs, numbers of threads or versions of torch that round differently. The
            same on every rank.
    """
    options = TrainerOptions(
        split_batches=split_batches,
        sync_batchnorm=sync_batchnorm,
        compression=compression,
        shard=shard,
        nonfinite_gradients=nonfinite_gradients,
        reproducible=reproducible,
        balance_speed=balance_speed,
        split=split,
        batch_dim=batch_dim,
        buffers=None if buffers is None else dict(buffers) if isinstance(buffers, Mapping) else buffers,
        precision=precision,
    )
    if group is not None:
        _check_group(group)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    for name, module in model.named_modules():
        for kind in type(module).__mro__:
            if kind.__module__.startswith("torch.") and kind.__name__ in _WRAPPERS:
                raise TypeError(
                    f"{name or 'the model'} is wrapped by {kind.__name__}, which exchanges or divides the same tensors "
                    f"as the trainer does. Pass the model without it."
                )
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if nn.parameter.is_lazy(tensor):
            raise ValueError(f"{name} has no shape yet: call the model once before create_distributed_trainer.")
    check_rules(model, options)
    if isinstance(group, dist.ProcessGroup):
        note_connection()
        _warn_of_num_gpus(num_gpus, group)
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        if options.shards_optimizer:
            check_model(model, group, device)
        if options.wire_dtype is not None and not isinstance(group, ProcessGroupShmpi):
            raise ValueError(
                f"compression={compression!r} needs this package's own exchange of gradients, to send "
                f"{options.wire_dtype} between machines. Leave group out, or pass a group of the backend shmpi."
            )
        _check_alike(options, group)
        _check_precision(precision, device, group)
        ranks = dist.get_process_group_ranks(group)
        gradient_group = group
        if options.wire_dtype is not None:  # the caller's group keeps its own wire type
            gradient_group = jobs.start(None, None).create_group(ranks, options.wire_dtype)
        steps, end = (dist.new_group(ranks, use_local_synchronization=True) for _ in range(2))
        return DistributedTrainer(model, options, device, Groups(gradient_group, steps, end), None)
    job = jobs.start(num_gpus, group, trains=True)
    if job.rank == 0 and not job.is_replacement:
        mode = "every rank reads the whole batch" if split_batches else "every rank reads its own part"
        if split_batches and job.engine.size > 1:
            mode = f"each rank trains on its part of a batch, and {mode}"
        print(f"distributed_trainer: {job.summary}; {mode}", flush=True)
    membership = Membership(job, options.wire_dtype)
    groups = membership.create_groups()
    _check_alike(options, groups.steps)
    _check_precision(precision, job.device, groups.steps)
    if options.shards_optimizer:
        check_model(model, groups.gradients, job.device)
    model.to(job.device)
    return DistributedTrainer(model, options, job.device, groups, membership)


# By name: to import FSDP's classes takes a second.
_WRAPPERS = {"DataParallel", "DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule"}


def _check_group(group: Any) -> None:
    """Raise TypeError if a group is neither a communicator of mpi4py nor a process group of torch. Local."""
    mpi = sys.modules.get("mpi4py.MPI")  # imported already if the caller has a communicator
    if not isinstance(group, dist.ProcessGroup) and (mpi is None or not isinstance(group, mpi.Comm)):
        raise TypeError(
            f"group must be an mpi4py communicator (mpi4py.MPI.Comm) or a group of torch.distributed "
            f"(torch.distributed.ProcessGroup), not {type(group).__name__}"
        )


def _warn_of_num_gpus(num_gpus: int | None, group: dist.ProcessGroup) -> None:
    """Log a line on the group's first rank if `num_gpus` is not its number of ranks, on a machine or in all. Local."""
    devices.resolve_num_gpus(num_gpus, None, 0)  # refuses a wrong one
    launcher = find_launcher(os.environ)
    if num_gpus not in (None, group.size(), launcher and launcher.local_size) and group.rank() == 0:
        logger.warning("num_gpus=%d has no effect: the group's %d rank(s) train.", num_gpus, group.size())


def _check_alike(options: TrainerOptions, group: Any) -> None:
    """Compare the options of all ranks. Collective over the group, blocks.

    Raises:
        MismatchError: An option differs between ranks. The same on every rank.
    """
    own = {field.name: _describe(getattr(options, field.name)) for field in fields(options)}
    of_ranks = gather_json(group, own)
    differences = []
    for name in own:
        ranks_with: dict[str, list[int]] = {}
        for rank, values in enumerate(of_ranks):
            ranks_with.setdefault(values.get(name, "no such option"), []).append(rank)
        if len(ranks_with) > 1:
            parts = (f"{_name_ranks(ranks)} {value}" for value, ranks in ranks_with.items())
            differences.append(f"{name} differs: {', '.join(parts)}. ")
    if differences:
        raise MismatchError(f"{''.join(differences)}Pass the same options to create_distributed_trainer on every rank.")


def _check_precision(precision: str | None, device: torch.device, group: Any) -> None:
    """Raise ValueError if some rank's device has no autocast of this type. Collective and blocks with a precision.

    On most devices torch warns of that, and computes without autocast.
    """

    def check() -> None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                torch.autocast(device.type, getattr(torch, str(precision)))
        except (RuntimeError, UserWarning) as error:
            raise ValueError(f"precision={precision!r} does not work on {device}: {error}") from error

    if precision is not None:
        call_together(group, check)


def _describe(option: Any) -> str:
    """Return an option as text that is the same on every rank; a function's `repr` has its address."""
    return getattr(option, "__qualname__", type(option).__name__) if callable(option) else repr(option)


def _name_ranks(ranks: list[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]} has"
    *first, last = map(str, ranks)
    if len(ranks) > _NUM_NAMED_RANKS:
        first, last = first[:_NUM_NAMED_RANKS], f"{len(ranks) - _NUM_NAMED_RANKS} more"
    return f"ranks {', '.join(first)} and {last} have"
