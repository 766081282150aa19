# SPDX-License-Identifier: Apache-2.0
"""The trainer: one training step on the global batch, computed by all ranks, each on its part."""

from __future__ import annotations

import contextlib
import logging
import struct
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import job as jobs
from .backend import ProcessGroupShmpi, gather_bytes
from .batchnorm import GlobalBatchNorm
from .compression import PowerSGD
from .criterion import criterion_name, is_known, local_loss, local_weight, split_criterion
from .data import (
    batch_size,
    call_model,
    compare_fingerprints,
    fingerprint,
    part_bounds,
    slice_batch,
    to_device,
    zero_sample,
)
from .direct import DirectLinear
from .errors import MismatchError
from .gradients import GradientSum
from .replicas import SharedBuffers, align_models, align_random_states, rank_random_stream
from .sharding import ShardedOptimizer, check_model, check_optimizer

logger = logging.getLogger("distributed_trainer")

# What ranks with parts tell each other before a step: number of samples, weight.
_PART_HEADER = struct.Struct("<dd")
_WIRE_DTYPES = ("bfloat16", "float16")
_NONFINITE_POLICIES = ("ignore", "skip", "raise")


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

    Raises:
        TypeError, ValueError: An argument is not what is described here.
        MPINotFoundError: There is no MPI library, or none for which this package was built.
        LaunchError: The processes were not started as one MPI job, or more of them than there are GPUs, or this is a
            DataLoader worker.
        MismatchError: Ranks have different models. The same on every rank.
    """
    if wire_dtype not in (None, *_WIRE_DTYPES):
        raise ValueError(f"wire_dtype must be one of {', '.join(_WIRE_DTYPES)} or None, not {wire_dtype!r}")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    if not isinstance(compression, PowerSGD | None):
        raise TypeError(f"compression must be PowerSGD(rank=...) or None, not {compression!r}")
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if nn.parameter.is_lazy(tensor):
            raise ValueError(f"{name} has no shape yet: call the model once before create_distributed_trainer.")
    if compression is not None and shard_optimizer:
        raise ValueError("pass compression or shard_optimizer, not both: shards are summed exactly")
    if wire_dtype is not None and shard_optimizer:
        raise ValueError("pass wire_dtype or shard_optimizer, not both: shards are summed exactly")
    if nonfinite_gradients not in _NONFINITE_POLICIES:
        policies = ", ".join(_NONFINITE_POLICIES)
        raise ValueError(f"nonfinite_gradients must be one of {policies}, not {nonfinite_gradients!r}")
    options = _Options(
        split_batches, sync_batchnorm, compression, shard_optimizer, nonfinite_gradients, process_group is None
    )
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
        groups = (gradient_group, dist.new_group(ranks, use_local_synchronization=True))
        return DistributedTrainer(model, groups, device, 0, options)
    job = jobs.start(num_gpus, comm)
    if job.rank == 0:
        mode = "every rank reads the whole batch" if split_batches else "every rank reads its own part"
        print(f"distributed_trainer: {job.summary}; {mode}", flush=True)
    groups = (job.create_group(wire_dtype=wire_dtype), job.create_group())
    if shard_optimizer:
        check_model(model, groups[0], job.device)
    model.to(job.device)
    return DistributedTrainer(model, groups, job.device, job.local_rank, options)


@dataclass(frozen=True)
class _Part:
    """This rank's share of a step."""

    inputs: Any
    targets: Any
    criterion: Callable[..., Any]
    weight: float
    """Of this part."""
    total: float
    """Of the global batch."""
    is_ghost: bool
    """A stand-in for an empty part, so that every hook and collective happens; it counts for nothing."""
    source: int
    """First rank that has samples: its buffers become everybody's."""


@dataclass(frozen=True)
class _Options:
    """Those of `create_distributed_trainer` that outlive it."""

    split_batches: bool
    sync_batchnorm: bool
    compression: PowerSGD | None
    shard_optimizer: bool
    nonfinite_gradients: str
    owns_groups: bool
    """Nobody else uses the process groups, so they end with the trainer."""


class DistributedTrainer:
    """Trains a model with all ranks of a job. Made by `create_distributed_trainer`; a context manager.

    Attributes:
        model: The model that was given; use it for evaluation and saving as usual.
        rank: This process's number, 0 to world_size - 1.
        world_size: Number of ranks.
        local_rank: This process's number on its machine.
        device: Where this rank's model is.
        num_skipped_steps: Steps that changed no parameter, since a gradient was infinite or NaN; the same on every
            rank. Only with `nonfinite_gradients="skip"`.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: tuple[Any, Any],
        device: torch.device,
        local_rank: int,
        options: _Options,
    ) -> None:
        # Two groups, since each has one order of calls: gradients become ready in another order than the calls of
        # forward and of this class are made.
        gradient_group, self._group = groups
        self._own_groups = groups if options.owns_groups else ()
        self.model = model
        self.rank: int = self._group.rank()
        self.world_size: int = self._group.size()
        self.local_rank = local_rank
        self.device = device
        self.num_skipped_steps = 0
        self._num_steps = 0
        self._options = options
        self._is_closed = False
        self._is_out_of_data = False
        self._known_criteria: set[str] = set()
        self._known_optimizers: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        self._last_optimizer: tuple[weakref.ref[torch.optim.Optimizer], set[int], bool] | None = None
        self._warned_new_optimizer = False

        align_models(model, self._group)
        align_random_states(self._group, alike=options.split_batches)
        self._sharded = None
        make_bucket = None
        if options.shard_optimizer and self.world_size > 1:
            self._sharded = ShardedOptimizer(model, gradient_group, self._group)
            make_bucket = self._sharded.make_bucket
        self._gradients = GradientSum(
            model.named_parameters(), gradient_group, options.compression, make_bucket, options.nonfinite_gradients
        )
        self._direct = DirectLinear(model, self._gradients) if self.world_size > 1 else None
        sync_batchnorm = options.sync_batchnorm
        self._batchnorm = GlobalBatchNorm(model, self._group) if sync_batchnorm and self.world_size > 1 else None
        self._buffers = SharedBuffers(model, self._group, skip_batchnorm=sync_batchnorm)

    def train_step(
        self,
        inputs: Any,
        targets: Any,
        criterion: Callable[..., Tensor],
        optimizer: torch.optim.Optimizer,
    ) -> Tensor:
        """Trains one step on the global batch: forward, backward, mean over all ranks, `optimizer.step()`.

        Collective, blocks. Afterwards the parameters on every rank are what one process gets on the whole batch. The
        learning rate is not to be scaled by the number of ranks. Gradients stay in `.grad` until the next step; with
        `shard_optimizer=True` there are none.

        Args:
            inputs: A tensor, or a tuple, list or dict of tensors, nested as you like; a dict is passed to the model as
                keywords, a tuple or list as positional arguments. All tensors share the first dimension, the samples.
            targets: Likewise; passed to the criterion as they are.
            criterion: Called as criterion(outputs, targets). With reduction "mean" (of samples, elements or weighted
                targets, as the loss defines it) or "sum". Any other callable counts as a mean over samples.
            optimizer: Of the model's parameters. Make it once: a new one has lost its state. With
                `shard_optimizer=True` its groups hold this rank's flat part of each parameter from the first step on;
                `state_dict()` is then collective, and gives and takes what an ordinary optimizer does.

        Returns:
            The loss of the global batch, 0-dimensional and detached, with the same bits on every rank.

        Raises:
            TypeError, ValueError: An argument is not what is described here. Raised before any communication.
            MismatchError: With whole batches, the ranks' batches differ. The same on every rank, before any has
                changed its parameters.
            FloatingPointError: A gradient is infinite or NaN, with `nonfinite_gradients="raise"`. The same on every
                rank; no parameter has changed, and training can go on.
            DistributedTrainerError: A rank has left the job or closed its trainer, or the transport failed.
        """
        self._check_arguments(criterion, optimizer)
        part = self._part(inputs, targets, criterion)
        self._gradients.start(leave_out=part.is_ghost)
        with self._random_stream(), self._global_batchnorm(part.is_ghost), self._direct_gradients():
            outputs = call_model(self.model, to_device(part.inputs, self.device))
            targets = to_device(part.targets, self.device)
            if part.is_ghost:
                loss = part.criterion(outputs, targets)
            else:
                loss = local_loss(part.criterion, outputs, targets, part.weight, part.total)
            self._gradients.start_backward()
            loss.backward()
        own_loss = 0.0 if part.is_ghost else loss.item()
        total_loss, has_changed_buffers = self._gradients.finish([own_loss, self._buffers.have_changed()])
        self._num_steps += 1
        if not self._gradients.found_nonfinite:
            if self._sharded is None:
                optimizer.step()
            else:
                self._sharded.step(optimizer)
            self._note_optimizer(optimizer)
        if has_changed_buffers:
            self._buffers.share(part.source)
        if self._gradients.found_nonfinite:
            self._report_nonfinite()
        return torch.tensor(total_loss, dtype=loss.dtype, device=loss.device)

    def split(self, batch: Any) -> Any:
        """This rank's part of a batch that every rank has: views of its tensors, of any nesting. Local.

        Parts are contiguous, in rank order, and differ by at most one sample; with fewer samples than ranks some are
        empty.
        """
        return slice_batch(batch, *part_bounds(batch_size({"batch": batch}), self.rank, self.world_size))

    def batches(self, loader: Iterable[Any]) -> Iterator[Any]:
        """Iterates over this rank's own loader until every rank's is at its end. Each step is collective.

        For `split_batches=False`, with one `train_step` for each batch. A rank whose loader has ended gets its last
        batch again, with which it takes part in the step, but which counts for nothing; so every sample counts once,
        whatever the number of batches on each rank.

        Raises:
            ValueError: The trainer takes whole batches, or some rank's loader is empty while another's is not (the
                same on every rank).
        """
        if self._options.split_batches:
            raise ValueError(
                "batches() is for loaders that differ between ranks. This trainer takes whole batches; make it with "
                "split_batches=False, or iterate over the loader itself."
            )
        batch, has_any = None, False
        for batch in loader:
            has_any = True
            self._agree(has_batch=True, has_any=True)
            yield batch
        while self._agree(has_batch=False, has_any=has_any):
            self._is_out_of_data = True
            try:
                yield batch
            finally:
                self._is_out_of_data = False

    def close(self) -> None:
        """Lets go of the model: its gradients are no longer summed. Local; MPI goes on until the process ends.

        Ranks of this machine that still wait for this one get an error.
        """
        self._is_closed = True
        self._gradients.close()
        if self._sharded is not None:
            self._sharded.close()
        for group in self._own_groups:
            group.close()

    def __enter__(self) -> DistributedTrainer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return (
            f"DistributedTrainer({type(self.model).__name__}, rank {self.rank} of {self.world_size}, "
            f"device={str(self.device)!r}, split_batches={self._options.split_batches})"
        )

    def _part(self, inputs: Any, targets: Any, criterion: Callable[..., Any]) -> _Part:
        """Cuts the batch, or weighs this rank's own part. Collective unless there is one rank."""
        roots = {"inputs": inputs, "targets": targets}
        num_samples = batch_size(roots)
        weight = local_weight(criterion, targets, num_samples)
        if self._options.split_batches:
            if num_samples == 0:
                raise ValueError("the batch has no samples; skip it on every rank")
            self._check_same_batch(roots)
            start, stop = part_bounds(num_samples, self.rank, self.world_size)
            if is_ghost := start == stop:
                start, stop = 0, 1
            part = slice_batch((inputs, targets), start, stop)
            part_criterion = split_criterion(criterion, targets, start, stop)
            part_weight = local_weight(part_criterion, part[1], stop - start)
            return _Part(*part, part_criterion, part_weight, weight, is_ghost, source=0)
        is_ghost = self._is_out_of_data or num_samples == 0
        if is_ghost:
            inputs, targets = slice_batch((inputs, targets), 0, 1) if num_samples else zero_sample((inputs, targets))
            weight, num_samples = 0.0, 0
        headers = [
            _PART_HEADER.unpack(row) for row in gather_bytes(self._group, _PART_HEADER.pack(num_samples, weight))
        ]
        source = next((rank for rank, (samples, _) in enumerate(headers) if samples), None)
        if source is None:
            raise ValueError("no rank has a sample for this step; end the loop on every rank, as trainer.batches does")
        total = sum(other for _, other in headers)
        return _Part(inputs, targets, criterion, weight, total, is_ghost, source)

    def _check_arguments(self, criterion: Any, optimizer: Any) -> None:
        if self._is_closed:
            raise ValueError("this trainer was closed; make another with create_distributed_trainer")
        if not callable(criterion):
            raise TypeError(f"criterion must be callable, such as nn.CrossEntropyLoss(), not {criterion!r}")
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, not {type(optimizer).__name__}")
        if self._options.shard_optimizer:
            check_optimizer(optimizer)
        if self._sharded is not None:
            self._sharded.check_places()
        name = criterion_name(criterion)
        if name not in self._known_criteria:
            self._known_criteria.add(name)
            if not is_known(criterion) and self.rank == 0 and self.world_size > 1:
                logger.warning(
                    "%s is not a loss of torch.nn: it counts as a mean over samples. If it is a sum, give it an "
                    'attribute reduction = "sum"; if it compares samples with each other, it cannot be split.',
                    name,
                )
        if optimizer in self._known_optimizers:
            return
        own = {id(parameter) for parameter in self.model.parameters()}
        ids = self._parameter_ids(optimizer)
        if not ids <= own:
            raise ValueError(
                f"the optimizer has {len(ids - own)} parameter(s) that are not the model's, so nobody would sum their "
                f"gradients. Make it from the parameters of the model that the trainer was made with."
            )
        if self._last_optimizer is not None and not self._warned_new_optimizer and self.rank == 0:
            last, last_ids, had_state = self._last_optimizer
            if last() is not optimizer and had_state and ids == last_ids and not optimizer.state:
                self._warned_new_optimizer = True
                logger.warning(
                    "train_step got a new %s, so the state of the last one (momentum, averages) is lost at each step. "
                    "Make the optimizer once, before the loop.",
                    type(optimizer).__name__,
                )
        self._known_optimizers.add(optimizer)

    def _report_nonfinite(self) -> None:
        """Counts a skipped step, or raises. Collective, blocks."""
        skips = self._options.nonfinite_gradients == "skip"
        self.num_skipped_steps += skips
        if skips and self.num_skipped_steps > 1:
            return
        name = self._gradients.first_nonfinite()
        text = f"step {self._num_steps}: the gradient of {name} is infinite or NaN, so no parameter was changed."
        if not skips:
            raise FloatingPointError(text)
        if self.rank == 0:
            logger.warning("%s Further steps like it are skipped and counted in num_skipped_steps.", text)

    def _note_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        if self._last_optimizer is None or self._last_optimizer[0]() is not optimizer:
            self._last_optimizer = weakref.ref(optimizer), self._parameter_ids(optimizer), bool(optimizer.state)

    def _parameter_ids(self, optimizer: torch.optim.Optimizer) -> set[int]:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if self._sharded is not None:
            parameters = [self._sharded.parameter_of(parameter) for parameter in parameters]
        return {id(parameter) for parameter in parameters}

    def _check_same_batch(self, roots: dict[str, Any]) -> None:
        if self.world_size == 1:
            return
        # Reading a device waits for it, but the last step has already done so for its loss.
        gathered = gather_bytes(self._group, fingerprint(roots, read_devices=True))
        difference = compare_fingerprints(gathered, roots, read_devices=True)
        if difference is not None:
            raise MismatchError(difference)

    def _random_stream(self) -> contextlib.AbstractContextManager[None]:
        # With parts each rank has streams of its own throughout, and alone it is the process to compare with.
        if self.world_size == 1 or not self._options.split_batches:
            return contextlib.nullcontext()
        return rank_random_stream(self.rank, self.device)

    def _global_batchnorm(self, is_ghost: bool) -> contextlib.AbstractContextManager[None]:
        return self._batchnorm.active(is_ghost) if self._batchnorm else contextlib.nullcontext()

    def _direct_gradients(self) -> contextlib.AbstractContextManager[None]:
        return self._direct.active() if self._direct else contextlib.nullcontext()

    def _agree(self, has_batch: bool, has_any: bool) -> bool:
        """Whether any rank has a batch. Collective."""
        rows = gather_bytes(self._group, bytes([has_batch, has_any]))
        if any(row[0] for row in rows):
            for rank, row in enumerate(rows):
                if not row[1]:
                    raise ValueError(
                        f"the loader of rank {rank} is empty, so it has nothing to take part with. Give every rank at "
                        f"least one batch."
                    )
        return any(row[0] for row in rows)
