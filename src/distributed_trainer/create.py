# SPDX-License-Identifier: Apache-2.0
"""Makes a trainer: finds the ranks, and checks what the user asks for."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from . import job as jobs
from .backend import ProcessGroupShmpi
from .compression import PowerSGD
from .elastic import Membership
from .options import TrainerOptions
from .places import noted
from .sharding import check_model
from .trainer import DistributedTrainer


@noted
def create_distributed_trainer(
    model: nn.Module,
    num_gpus: int | None = None,
    *,
    comm: Any = None,
    process_group: dist.ProcessGroup | None = None,
    split_batches: bool = True,
    sync_batchnorm: bool = True,
    compression: PowerSGD | None = None,
    shard_optimizer: bool = False,
    wire_dtype: str | None = None,
    nonfinite_gradients: str = "ignore",
    reproducible: int | None = None,
    balance: str | None = None,
    stall_report_seconds: float | None = None,
    stall_timeout_seconds: float | None = None,
) -> DistributedTrainer:
    """Makes a trainer for `model`. Collective: every rank calls it, with the same model; blocks.

    Starts MPI unless that was done. Without a launcher and with `num_gpus` above 1, the process becomes
    `mpirun -np num_gpus` of its own command line, so lines above run again.

    Parameters, buffers and the states of `random`, NumPy and torch become rank 0's. The model is moved to this rank's
    device: its local rank's GPU, the CPU where there is none.

    Args:
        model: Trained in place. Its parameters may be float32, float64, bfloat16 or float16, frozen, shared or unused.
        num_gpus: Devices (without a GPU: CPU processes) per machine. Under a launcher the ranks that it started on
            this machine decide, and another number has no effect. None: what the launcher started, else 1.
        comm: An mpi4py communicator whose ranks train together; None for all ranks of the launch.
        process_group: Train over this group of torch.distributed (gloo, nccl) instead of starting MPI; the caller has
            chosen the device by moving the model there.
        split_batches: True if every rank passes the same global batch, of which each trains on its part. False if each
            rank passes a part of its own; parts may differ in size, and the mean is over all samples.
        sync_batchnorm: BatchNorm uses the statistics of the global batch, as one process does. False: of each rank's
            part.
        compression: `distributed_trainer.compression.PowerSGD(rank=4)` sends the gradients of large weights as two
            thin factors, for slow networks. Lossy: results are no longer those of one process. None: exact.
        shard_optimizer: Each rank keeps 1/N of the optimizer's state and updates 1/N of every parameter; the ranks of
            a machine share one copy of the weights (docs/sharding.md). For CPU ranks and torch.optim's element-wise
            optimizers: SGD, Adam, AdamW, Adagrad, RMSprop, Adadelta, Adamax, NAdam, RAdam, ASGD, Rprop.
        wire_dtype: "bfloat16" or "float16" halves the bytes that float32 gradients take between machines: each
            machine's sum is rounded to it, these sums are added in float32, and the result is rounded to it once more.
            All ranks still get the same bits. float16 overflows above 65504. On one machine it changes nothing. None:
            float32.
        nonfinite_gradients: What a step does if a gradient, summed over all ranks, has an infinite or NaN element.
            "ignore" does not look, as plain torch does not. "skip" leaves parameters and optimizer as they are, on
            every rank; rank 0 warns the first time, and `num_skipped_steps` counts. "raise" raises FloatingPointError
            on every rank, with parameters and optimizer as they were. What forward has changed stays changed
            (BatchNorm's running statistics, other buffers), as when torch's GradScaler skips a step.
        reproducible: A number of shards, such as 8: weights, losses and the optimizer's state are then the same bits on
            any number of ranks up to it (docs/reproducible.md). Each batch is cut into that many shards, each with its
            own random stream and BatchNorm statistics, and they are summed in one order. Sets the number of threads
            to OMP_NUM_THREADS, else to 1. Costs time; for `train_step` only.
        balance: "speed" splits batches in proportion to how fast the ranks compute, which `train_step` watches; the
            mean stays exact. A part of `trainer.loader` changes with the epoch only. None splits them evenly.
        stall_report_seconds: When a rank has waited for so long, it says on stderr which rank it waits for, where that
            one is, since when and why (docs/reliability.md). This and the next are of the whole process; None leaves
            what an earlier trainer has set, at first 5 and 600.
        stall_timeout_seconds: A rank that is stopped or does not answer for so long ends the job. One that merely
            takes long does not.

    Raises:
        TypeError, ValueError: An argument is not what is described here.
        MPINotFoundError: There is no MPI library, or none for which this package was built.
        LaunchError: The processes were not started as one MPI job, or more of them than there are GPUs, or this is a
            DataLoader worker.
        MismatchError: Ranks have different models, or with `reproducible` computers that compute other bits. The same
            on every rank.
    """
    options = TrainerOptions(
        *(split_batches, sync_batchnorm, compression, shard_optimizer, wire_dtype, nonfinite_gradients),
        *(reproducible, balance),
    )
    for name, seconds in (
        ("stall_report_seconds", stall_report_seconds),
        ("stall_timeout_seconds", stall_timeout_seconds),
    ):
        if seconds is not None and (not isinstance(seconds, int | float) or not seconds > 0):
            raise ValueError(f"{name} must be a number of seconds above 0, not {seconds!r}")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if nn.parameter.is_lazy(tensor):
            raise ValueError(f"{name} has no shape yet: call the model once before create_distributed_trainer.")
    if process_group is not None:
        if comm is not None:
            raise ValueError("pass comm or process_group, not both")
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        if shard_optimizer:
            check_model(model, process_group, device)
        if wire_dtype is not None and not isinstance(process_group, ProcessGroupShmpi):
            raise ValueError(
                f"wire_dtype={wire_dtype!r} needs this package's own exchange of gradients. Leave process_group out, "
                f"or pass a group of the backend shmpi."
            )
        ranks = dist.get_process_group_ranks(process_group)
        # The caller's group keeps its own way of sending.
        gradient_group = jobs.start(None, None).create_group(ranks, wire_dtype) if wire_dtype else process_group
        groups = (gradient_group, *(dist.new_group(ranks, use_local_synchronization=True) for _ in range(2)))
        trainer = DistributedTrainer(model, groups, device, 0, options, owns_groups=False)
        if jobs.wants_elastic():
            trainer._begin_elastic()
        return trainer
    job = jobs.start(num_gpus, comm)
    job.engine.set_limits(stall_report_seconds, stall_timeout_seconds)
    if job.rank == 0 and not job.is_replacement:
        mode = "every rank reads the whole batch" if split_batches else "every rank reads its own part"
        print(f"distributed_trainer: {job.summary}; {mode}", flush=True)
    membership = Membership(job, wire_dtype)
    groups = membership.create_groups()
    if shard_optimizer:
        check_model(model, groups[0], job.device)
    model.to(job.device)
    trainer = DistributedTrainer(model, groups, job.device, job.local_rank, options, membership=membership)
    if job.is_replacement:
        trainer.rank, trainer.world_size = 1, 2  # whatever rank 0 alone does, such as writing, is not for this one
    if jobs.wants_elastic():
        trainer._begin_elastic()
    return trainer
