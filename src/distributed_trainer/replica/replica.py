# SPDX-License-Identifier: Apache-2.0
"""This rank's replica of the model, and its part in each step, in the trainer's own loop and in users' loops."""

from __future__ import annotations

import contextlib
import itertools
import logging
import operator
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..backend.gather import gather_bytes, gather_objects, raise_alike
from ..data import rng
from ..data.batch import tensors
from ..data.handshake import StepFlags
from ..gradients.direct_linear import DirectLinear
from ..gradients.hooks import GradientFunctions, ParameterHooks
from ..gradients.loss_scale import LossScale
from ..gradients.reducer import GradientReducer, Reducer
from ..gradients.sharded_optimizer import ShardedOptimizer, check_optimizer
from ..options import TrainerOptions
from .batchnorm import GlobalBatchNorm
from .divergence import DivergenceCheck
from .leaves import LeafCheck
from .max_norm import GlobalMaxNorm, max_norm_modules
from .model_state import align_models
from .script_calls import ScriptCalls
from .shared_buffers import SharedBuffers
from .streams import StepStreams
from .structure import ModelStructure, follow

logger = logging.getLogger("distributed_trainer")

_parameters_of = operator.itemgetter("params")
_version_of = operator.attrgetter("_version")


@dataclass
class Progress:
    """Progress of a training. It outlives a set of ranks: each later replica continues to count in the same object."""

    seed: int = 0
    """Seed from which the random streams of all steps follow, the same on every rank."""
    num_steps: int = 0
    """Calls of `Replica.update`."""
    num_commits: int = 0
    """Calls of `Replica.finish` that have passed the commit point."""
    has_unsummed_step: bool = False
    """Whether an optimizer has made a step on gradients of `loss.backward()`, which the ranks have not added."""
    num_skipped_steps: int = 0
    """Steps that changed nothing, since a gradient was infinite or NaN."""
    gradient_norm: Tensor | None = None
    """Norm of the gradients before the last clipping, 0-dimensional; None if none were clipped."""
    committed: Any = None
    """Result of the last commit, the same on all ranks; a rank that missed it gets it from another rank
    (`finish_after_failure`)."""
    functions: GradientFunctions = field(default_factory=GradientFunctions)
    """Functions of `DistributedTrainer.on_gradient`."""
    loss_scale: LossScale = field(default_factory=LossScale)
    """Scale of the loss, used with `precision="float16"` only."""
    has_warned_of_nonfinite: bool = False
    """Whether rank 0 has warned of a step that was skipped."""
    makes_script_calls: bool = False
    """Whether a forward or backward has ever made one of `ScriptCalls`; the same on every rank."""

    @property
    def counts(self) -> tuple[int, int]:
        """Number of steps and of commits. It changes whenever weights may change, also in users' loops."""
        return self.num_steps, self.num_commits


class Replica:
    """Model whose gradients, buffers and BatchNorm statistics are those of all ranks. Making it is collective.

    Args:
        model: The user's model, on `device`.
        groups: Two process groups of the same ranks: the first for gradients, the second for calls in forward and of
            the trainer. Each group has one order of calls, and gradients become ready in a different order.
        device: Device on which this rank computes.
        options: Options of the trainer, the same on every rank.
        progress: Progress of the training, which this replica updates.
        aligns: Set parameters, buffers and random states to rank 0's. False where the ranks' models are already
            equal, except for buffers (`share_buffers`).

    Attributes:
        model: The user's model.
        gradients: Reducer of the gradients; its `backward` surrounds each backward.
        streams: Random streams from which the model draws.
        leaves: Check of what gets gradients besides the model.
        divergence: Check that the ranks' weights are the same.
        script_calls: Calls of the script that bring the ranks' values together, such as `DistributedTrainer.gather`.
        failure: Exception of this rank's forward or backward in the present step, None if there was none. `finish`
            raises it on every rank.
        buffers_synced: Whether the last `finish` that passed the commit point has returned, so that buffers are the
            same on all ranks.
    """

    gradients: Reducer

    def __init__(
        self,
        model: nn.Module,
        groups: tuple[Any, Any],
        device: torch.device,
        options: TrainerOptions,
        progress: Progress,
        aligns: bool = True,
    ) -> None:
        gradient_group, self._group = groups
        self.model = model
        self._device, self._options, self._progress = device, options, progress
        self.buffers_synced = True
        self._loss: Any = None  # result of the criterion, from `finish` to `update`
        # Parameter whose gradient is infinite or NaN, "" where no name is needed; None if all are finite.
        self._nonfinite_name: str | None = None
        self._has_new_sums = False  # whether gradients were summed since the last call of `update`
        self._is_one_of_many = self._group.size() > 1
        self._num_graphs = 0  # backwards of this step whose loss had a graph
        self._objection: str | None = None  # why this step must not change weights
        self.failure: Exception | None = None
        self._has_warned_of_buffers = False
        self._has_written = False  # whether forward or backward has written to a parameter
        self._sees_parts = self._is_one_of_many
        _refuse_max_norm(model, options)
        _refuse_float16(model, options)
        if aligns:
            align_models(model, self._group)
            progress.seed = rng.share(self._group, device, alike=options.split_batches)
        self.streams = StepStreams(self._group.rank(), device)
        self.script_calls = ScriptCalls(self._group, progress)
        self._has_changed = False
        self._accepted: weakref.WeakKeyDictionary[torch.optim.Optimizer, list[int]] = weakref.WeakKeyDictionary()
        self._set_up(gradient_group)
        self._structure = ModelStructure(model)
        self.gradients.functions = progress.functions
        self.gradients.loss_scale = progress.loss_scale if options.scales_loss else None
        self.divergence = DivergenceCheck(model, self._group, device, self._unchanged_buffers)
        has_global_batchnorm = options.sync_batchnorm and options.reproducible is None
        self.leaves = LeafCheck(model, self._group, has_global_batchnorm)
        self._hooks = ParameterHooks(model, is_loud=self._group.rank() == 0)
        self._watched = _with_versions(model)

    def _set_up(self, gradient_group: Any) -> None:
        self._sharded = None
        make_bucket = None
        if self._options.shards_optimizer and self._is_one_of_many:
            self._sharded = ShardedOptimizer(self.model, gradient_group, self._group)
            make_bucket = self._sharded.make_bucket
        self.gradients = self._reducer = GradientReducer(
            self.model.named_parameters(),
            gradient_group,
            self._options.power_sgd,
            make_bucket,
            self._options.checks_gradients,
        )
        self._buffers = SharedBuffers(self.model, self._group, self._options)
        self._find_modules()

    def _find_modules(self) -> None:
        """Look up the model's modules and parameters, and replace what holds them. Local."""
        self._direct = DirectLinear(self.model, self._reducer) if self._is_one_of_many else None
        sync_batchnorm = self._options.sync_batchnorm
        self._batchnorm = GlobalBatchNorm(self.model, self._group) if sync_batchnorm and self._is_one_of_many else None
        self._max_norm = GlobalMaxNorm(self.model, self._group) if self._is_one_of_many else None

    @property
    def is_forward_collective(self) -> bool:
        """Whether forward calls the other ranks: for BatchNorm, or for embeddings with `max_norm`."""
        return bool(self._batchnorm or self._max_norm)

    @property
    def has_unsummed_step(self) -> bool:
        """Whether an optimizer has made a step on gradients that the ranks have not added."""
        return self._progress.has_unsummed_step

    def take_has_counted(self) -> bool:
        """Return whether samples of this rank have counted in BatchNorm's statistics since the last call. Local."""
        return self._batchnorm is not None and self._batchnorm.take_has_counted()

    @property
    def waited_seconds(self) -> float:
        """Seconds spent so far in BatchNorm's collectives, in forward and backward."""
        return self._batchnorm.waited_seconds if self._batchnorm else 0.0

    @property
    def step_key(self) -> tuple[int, ...]:
        """Key of the step's random streams."""
        return self._progress.seed, *self._progress.counts

    def notice_changes(self) -> bool:
        """Return whether the model has changed since the last step; use its present modules from now on. Local."""
        self._has_changed = self._structure.differs()
        if self._has_changed:
            self._accepted.clear()
            if self._structure.has_other_modules():
                self._find_modules()
        return self._has_changed

    def prepare(self, keep: bool = False) -> int:
        """Drop the gradients of the last step, and return this rank's `StepFlags` about the model. Local.

        `notice_changes` comes first; then the ranks exchange the flags, and call `follow` and `start`. See
        `GradientReducer.prepare` for `keep`.
        """
        is_held = self._reducer.prepare(keep)
        return self._has_changed * StepFlags.MODEL_HAS_CHANGED | is_held * StepFlags.GRADIENTS_ARE_HELD

    def follow(self, flags: int, aligns: bool = True) -> None:
        """Make the step work on the model as it is now, if it has changed on any rank. Collective and blocks then.

        Args:
            flags: The `StepFlags` that any rank has.
            aligns: As for `structure.follow`.

        Raises:
            ValueError: A parameter has no shape yet, or the optimizer is sharded. The same on every rank.
            MismatchError: The ranks' models differ. The same on every rank.
        """
        if not flags & StepFlags.MODEL_HAS_CHANGED:
            return
        structure = follow(self.model, self._structure, self._group, aligns)
        if self._sharded is not None:
            self._sharded.check_parameters(self.model)
        _refuse_float16(self.model, self._options)
        self._structure, self._has_changed = structure, False
        self.gradients.follow(structure.named_parameters)
        self.leaves.forget_graphs()
        self._watched = _with_versions(self.model)

    def start(self, flags: int, keep: bool = False) -> None:
        """Begin a step. Collective and blocks if a rank holds gradients, else local.

        See `GradientReducer.start` for `keep`.
        """
        self._start_checks(keep)
        if not keep:
            self.streams.begin_again()
        if flags & StepFlags.MODEL_HAS_CHANGED and not keep:
            self._reducer.prepare()  # parameters that are new may have gradients, too
        self._reducer.start(keep, bool(flags & StepFlags.GRADIENTS_ARE_HELD))

    def _start_checks(self, keep: bool) -> None:
        self._num_graphs, self._objection, self.failure = 0, None, None
        if not (keep and self._has_new_sums):  # else a step with these sums and the next ones is still to follow
            self._nonfinite_name, self._has_new_sums = None, False
        self.leaves.start(keep)

    def refuse_hooks(self, sees_parts: bool) -> str | None:
        """Look for hooks on parameters; return why a step with them must not begin on any rank, or None. Local.

        Args:
            sees_parts: Whether a backward of the step computes the gradient of a part of the batch. Where it computes
                the gradient of the whole batch, hooks act as in plain torch.
        """
        self._sees_parts = sees_parts
        return self._hooks.look() if sees_parts else None

    def keep_outputs(self, outputs: list[Any]) -> RemovableHandle:
        """Append the results of the model's calls to `outputs`, until the handle is removed. Local."""
        self._hooks.expect_own()
        return self.model.register_forward_hook(lambda _model, _arguments, output: outputs.append(output))

    @contextlib.contextmanager
    def around_step(self) -> Iterator[None]:
        """Surround all forwards and backwards of a step: the script's random streams stay as they are. Local."""
        with (
            self.streams.active(),
            self._direct.active() if self._direct else contextlib.nullcontext(),
            self._watch_weights(),
        ):
            self.leaves.begin()
            yield

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """Surround the model's calls and the criterion's: torch.autocast, as `precision` says. Local."""
        precision = self._options.precision
        if precision is None:
            return contextlib.nullcontext()
        return torch.autocast(self._device.type, getattr(torch, precision))

    @contextlib.contextmanager
    def _watch_weights(self) -> Iterator[None]:
        """Note whether the block writes to a parameter, other than by its `.data`. Local."""
        versions = list(map(_version_of, self._watched))
        yield
        self._has_written |= versions != list(map(_version_of, self._watched))

    def around_microbatch(self, is_dummy: bool = False) -> contextlib.AbstractContextManager[object]:
        """Surround a forward and its backward, inside `around_step`. Local.

        BatchNorm and `max_norm` act on the batch of all ranks, and dropout draws from this rank's own stream.
        """
        return self._as_one_process(is_dummy=is_dummy)

    def begin_completion(self) -> None:
        """Begin a microbatch of which only the calls for other ranks are made. Local."""
        with self.around_microbatch():
            pass

    def around_completion(self) -> contextlib.AbstractContextManager[object]:
        """Surround forward and backward of the dummy that completes a microbatch after an exception. Local."""
        return self._as_one_process(completes=True)

    def _as_one_process(self, **options: bool) -> contextlib.AbstractContextManager[object]:
        self.streams.begin_microbatch(self.step_key)
        stack = contextlib.ExitStack()
        stack.enter_context(self.script_calls.active(**options))
        for modules in (self._batchnorm, self._max_norm):
            if modules:
                stack.enter_context(modules.active(**options))
        return stack

    @contextlib.contextmanager
    def around_evaluation(self, number: int, is_dummy: bool = False) -> Iterator[None]:
        """Surround the evaluation of batch `number`: the script's random streams stay as they are. Local, 0.1 ms.

        A rank with an empty part does not call the model, so `random` and NumPy have streams of the batch here. If the
        script calls the other ranks there, the rank runs a dummy.
        """
        key = *self.step_key, "evaluate", number
        with rng.preserved(), self.streams.active(), self.script_calls.active(is_dummy):
            rng.seed_host(rng.mix(*key))
            self.streams.begin(key, self._group.rank())
            yield

    def check_batchnorm(self) -> None:
        """Check that no rank is still in a call of forward. Collective and blocks with BatchNorm or `max_norm`.

        Call it where this rank has made its last call, before it waits for the other ranks elsewhere.

        Raises:
            MismatchError: Another rank calls more modules of these kinds. The same on every rank.
        """
        if self._batchnorm:
            self._batchnorm.check_finished()
        elif self._max_norm:
            gather_bytes(self._group, bytes(3))  # no other call in forward has this length

    def around_backward(self, is_dummy: bool) -> contextlib.AbstractContextManager[object]:
        """Surround a backward whose forward is over. Local."""
        stack = contextlib.ExitStack()
        stack.enter_context(self.streams.active())
        if self._direct:
            stack.enter_context(self._direct.active())
        stack.enter_context(self._watch_weights())
        stack.enter_context(self.around_microbatch(is_dummy))
        return stack

    def backward(
        self,
        loss: Tensor,
        outputs: Any,
        is_dummy: bool,
        is_last: bool = True,
        inputs: Sequence[Tensor] | None = None,
        others: Sequence[Tensor] = (),
        **options: Any,
    ) -> None:
        """Run a backward of the step, inside of `around_step` or `around_backward`.

        A loss without a graph has no gradient. But with BatchNorm other ranks' losses depend on this rank's samples, so
        backward runs with zeros as gradients of the outputs.

        Args:
            loss: The loss, with one element.
            outputs: Outputs of the model, from which a loss without a graph was computed.
            is_dummy: Leave the gradients out.
            is_last: This is the last backward of the step.
            inputs: Tensors that get gradients; None for all leaves.
            others: Leaves that are no parameters of the model. Their gradients are not multiplied by the loss scale.
            options: Other options of `torch.Tensor.backward`.
        """
        has_graph, scale = loss.requires_grad, self.gradients.loss_scale
        self._num_graphs += has_graph and not is_dummy
        gathered = self.script_calls.take_results()  # other ranks' losses may depend on them, if this rank's does not
        if has_graph:
            with contextlib.ExitStack() as stack:
                if scale is not None:
                    loss, factor = loss * scale.value, 1 / scale.value
                    for leaf in others:
                        handle = leaf.register_hook(lambda gradient: gradient * factor)  # type: ignore[no-untyped-call]
                        stack.callback(handle.remove)
                stack.enter_context(self.gradients.backward(leave_out=is_dummy, is_last=is_last))
                if gathered:
                    zeros = map(torch.zeros_like, gathered)
                    torch.autograd.backward([loss, *gathered], [None, *zeros], inputs=inputs, **options)
                else:
                    loss.backward(inputs=inputs, **options)  # type: ignore[no-untyped-call]  # torch has no types here
        elif self.is_forward_collective or gathered:
            roots = [tensor for tensor in tensors(outputs) if tensor.requires_grad] + gathered
            with self._reducer.backward(leave_out=is_dummy, is_last=is_last, ignores_zeros=True):
                if roots:
                    torch.autograd.backward(roots, [torch.zeros_like(root) for root in roots], inputs=inputs, **options)
        else:
            with self.gradients.backward(leave_out=True, is_last=is_last):
                pass

    def object(self, text: str | None) -> None:
        """Make `finish` raise ValueError with this text on every rank, before weights change; None does nothing."""
        self._objection = self._objection or text

    def combine_buffers(self, weight: float) -> None:
        """Combine the ranks' buffers by the rules of `buffers=`, after a microbatch. Collective, blocks.

        Local without such rules.

        Args:
            weight: Number of this rank's samples; 0 for a dummy.

        Raises:
            MismatchError, ValueError: As `SharedBuffers.combine` describes them.
        """
        self._buffers.combine(weight)

    def finish(self, values: list[list[float]], loss: Any, source: int, has_samples: bool) -> tuple[list[float], Any]:
        """Finish the gradients and buffers of a step, so that they are those of all ranks. Collective, blocks.

        Args:
            values: Terms of the loss for each of this rank's microbatches.
            loss: Loss in the structure in which the criterion returns it.
            source: Rank whose buffers are copied to all ranks if any rank's have changed.
            has_samples: Whether this rank has samples in this step.

        Returns:
            The sum of each term over all microbatches and ranks, in float64, and the structure of the loss.

        Raises:
            ValueError: A rank objects to the step. The same on every rank.
            Exception: Any rank's `failure`. The same on every rank.
        """
        self._loss = loss
        own = [sum(terms) for terms in zip(*values, strict=True)]
        numbers = [*own, *self._buffers.changes(), *self._findings()]
        sums = self._reducer.finish(numbers)
        sums, changes, findings = sums[: len(own)], sums[len(own) : -3], sums[-3:]
        if findings[0]:
            self._forget_sums()
            self._warn_of_buffers(changes[0] > 0 or bool(self._options.buffers))
        self._check_findings(*findings)
        self._commit((sums, self._reducer.unused))
        self._buffers.share(source, changes, has_samples)
        self.buffers_synced = True
        self._find_nonfinite()
        return sums, loss

    def _unchanged_buffers(self) -> dict[str, Tensor]:
        return self._buffers.unchanged()

    def _findings(self) -> tuple[bool, bool, int]:
        """Return what `_check_findings` needs from every rank, as sums. Local."""
        if self._sees_parts:
            self.object(self._hooks.changed())
        if self._batchnorm:
            self.object(self._batchnorm.refusal)
            self._batchnorm.refusal = None
        if self._has_written and self._options.reproducible is not None:
            self.object(
                "forward or backward has written to a parameter. With reproducible= a rank computes its shards one "
                "after the other, and would write once for each. Leave reproducible out, or write after the step."
            )
        if self._has_written and self._sharded is not None:
            self.object(
                'forward or backward has written to a parameter. With shard="optimizer" the ranks of a machine share '
                "the weights, and would write to the same memory. Leave shard out."
            )
        has_written, self._has_written = self._has_written, False
        return bool(self.failure or self._objection), has_written, self._num_graphs

    def _check_findings(self, num_objections: float, num_writers: float, num_graphs: float) -> None:
        """Raise the same error on every rank if the step must not change weights.

        Collective and blocks if a number says so, which is the sum over all ranks.

        Args:
            num_objections: Ranks that object to the step, or have failed in it.
            num_writers: Ranks on which forward or backward has written to a parameter.
            num_graphs: Backwards of a loss with a graph.
        """
        if num_objections:
            error = self.failure or (None if self._objection is None else ValueError(self._objection))
            self.failure = None
            raise_alike(self._group, error)
        if not num_graphs:
            torch.zeros(()).backward()  # type: ignore[no-untyped-call]  # raises torch's own error
        if num_writers:
            self.divergence.check_forward()

    def _commit(self, committed: Any) -> None:
        self._progress.num_commits += 1
        self._has_new_sums = True
        self._progress.committed, self.buffers_synced = committed, False

    def finish_after_failure(self, committed: Any) -> tuple[list[float], Any]:
        """Complete a `finish` that was interrupted by a rank's death, after some rank had passed the commit point.

        Local. Buffers are not copied; see `share_buffers`.

        Args:
            committed: `Progress.committed` of a rank that passed the commit point; None if this rank has passed it.

        Returns:
            The result that `finish` would have returned.
        """
        if committed is not None:
            self._reducer.finish_after_failure(committed[1])
            self._commit(committed)
        self._find_nonfinite()
        return self._progress.committed[0], self._loss

    def share_buffers(self, source: int) -> None:
        """Copy the buffers of rank `source` to all ranks. Collective, blocks."""
        self._buffers.share_all(source)

    def share_changed_buffers(self) -> None:
        """Copy rank 0's buffers to all ranks if any rank has changed some outside of a step. Collective, blocks."""
        if self._is_one_of_many:
            rows = gather_objects(self._group, self._buffers.changes())
            self._buffers.share(0, [sum(column) for column in zip(*rows, strict=True)], has_samples=True)

    def abandon(self) -> None:
        """Make the gradients' calls of `finish` for a step whose results are not used. Collective, blocks."""
        self._reducer.finish([])
        self._forget_sums()

    def _forget_sums(self) -> None:
        """Keep nothing of sums that are not used. Local; for every rank.

        If this was the first step, the next step determines the order of the gradients.
        """
        self._reducer.reset_error_feedback()
        if self._progress.num_steps == 0:
            self._reducer.forget_order()

    def _warn_of_buffers(self, have_changed: bool) -> None:
        """Warn once, on rank 0, if forward has changed buffers in a step that is not made. Local."""
        if have_changed and not self._has_warned_of_buffers and self._group.rank() == 0:
            logger.warning(
                "a step was not made, but forward has changed buffers of the model on ranks that had no exception. "
                "They keep these changes (docs/training.md, Exceptions in a step)."
            )
        self._has_warned_of_buffers |= have_changed

    def update(
        self,
        optimizers: Sequence[torch.optim.Optimizer],
        clip_norm: float | None,
        closure: Callable[[], Any] | None = None,
        is_alone: bool = False,
    ) -> bool:
        """Let the optimizers step, unless gradients that must be finite are not.

        Collective with a sharded optimizer, and in the steps that compare the ranks' weights.

        Args:
            optimizers: The user's optimizers.
            clip_norm: Largest norm of the gradients, as in `DistributedTrainer.train_step`; None for no clipping.
            closure: Argument of an only optimizer's `step`, as in `DistributedTrainer.step`.
            is_alone: Ranks were killed, so the check for divergence, which is collective, is left out.

        Returns:
            Whether the optimizers have made a step.

        Raises:
            FloatingPointError: Gradients are not finite, with `nonfinite_gradients="raise"`. The same on every rank.
            MismatchError: The weights of some ranks differ. The same on every rank.
        """
        progress = self._progress
        if not is_alone:
            self.divergence.check(progress.num_steps + 1)
        # Not before: if a rank is killed meanwhile, recovery makes the update that is not counted yet.
        progress.num_steps += 1
        self._loss = None
        self._update_loss_scale()
        if self._nonfinite_name is not None:
            self._report_nonfinite()
            return False
        if self._sharded is not None:
            if clip_norm is not None:
                progress.gradient_norm = self._sharded.clip(optimizers, clip_norm)
            self._sharded.step(optimizers)
        else:
            if clip_norm is not None:
                groups = itertools.chain.from_iterable(optimizer.param_groups for optimizer in optimizers)
                parameters = [parameter for group in groups for parameter in group["params"]]
                progress.gradient_norm = nn.utils.clip_grad_norm_(parameters, clip_norm)
            with self._around_optimizer():
                for optimizer in optimizers:
                    optimizer.step() if closure is None else optimizer.step(closure)  # not every step() takes a closure
        return True

    @property
    def needs_update(self) -> bool:
        """Whether an optimizer may step on the present gradients only through `update`, which updates the scale."""
        return self._options.scales_loss and (self._has_new_sums or self._nonfinite_name is not None)

    def _update_loss_scale(self) -> None:
        """Update the loss scale after gradients; once, if several optimizers step on them. Local."""
        scale, has_new_sums, self._has_new_sums = self.gradients.loss_scale, self._has_new_sums, False
        if scale is None or not has_new_sums:
            return
        before = scale.value
        scale.update(is_finite=self._nonfinite_name is None)
        if self._options.power_sgd is not None:
            self._reducer.scale_error_feedback(scale.value / before)

    @contextlib.contextmanager
    def _around_optimizer(self) -> Iterator[None]:
        """Make an optimizer that draws (Langevin dynamics) draw the same on every rank. Local."""
        if self._options.split_batches:
            yield  # the script's streams are the same on every rank
            return
        with self.streams.active():
            self.streams.begin(self.step_key, "optimizer")
            yield

    def optimizer_parts(self) -> contextlib.AbstractContextManager[None]:
        """Make `state_dict()` of any optimizer local in the block, with a `Part` in place of each sharded tensor."""
        return contextlib.nullcontext() if self._sharded is None else self._sharded.parts()

    def check_optimizers(self, optimizers: Sequence[torch.optim.Optimizer]) -> list[list[int]]:
        """Raise ValueError for optimizers that do not fit the options, the model or each other. Local.

        Args:
            optimizers: The user's optimizers of a step.

        Returns:
            For each, ids of the model's parameters that it updates.
        """
        ids = [self._check_optimizer(optimizer) for optimizer in optimizers]
        if len(ids) > 1:
            seen: set[int] = set()
            for number, own in enumerate(ids):
                if not seen.isdisjoint(own):
                    shared = seen.intersection(own)
                    named = self.model.named_parameters()
                    name = next((name for name, parameter in named if id(parameter) in shared), "a parameter")
                    raise ValueError(
                        f"{name} is a parameter of optimizer[{number}] and of one before it in the list, so both would "
                        f"update it. Give each parameter to one optimizer."
                    )
                seen.update(own)
        return ids

    def _check_optimizer(self, optimizer: torch.optim.Optimizer) -> list[int]:
        """Raise ValueError for an optimizer that does not fit the options or the model. Local.

        A known optimizer is checked again if it, or the model, has other parameters.

        Args:
            optimizer: The user's optimizer.

        Returns:
            Ids of the model's parameters that it updates.
        """
        if self._options.shards_optimizer:
            check_optimizer(optimizer)
        if self._sharded is not None:
            self._sharded.check_places()
        parameters: Iterable[Tensor] = itertools.chain.from_iterable(map(_parameters_of, optimizer.param_groups))
        if self._sharded is not None:
            parameters = map(self._sharded.parameter_of, parameters)
        ids = list(map(id, parameters))
        if self._accepted.get(optimizer) == ids:
            return ids
        own = set(map(id, self.model.parameters()))
        if not self._has_changed:  # in a manual loop the gradients are those of the model at the time of backward
            own |= self._structure.ids
        foreign = set(ids) - own
        if foreign:
            raise ValueError(
                f"the optimizer has {len(foreign)} parameter(s) that are not the model's, so their gradients would not "
                f"be summed. Make the optimizer from the present parameters of the model that the trainer was made "
                f"with: model.parameters(), after the last change of a module."
            )
        self._accepted[optimizer] = ids
        return ids

    def close(self) -> None:
        """Release the model. Local."""
        self.gradients.close()
        self.leaves.close()
        self._hooks.close()
        if self._sharded is not None:
            self._sharded.close()

    def _find_nonfinite(self) -> None:
        if self.gradients.found_nonfinite and self._nonfinite_name is None:
            is_raised, scale = self._options.nonfinite_gradients == "raise", self.gradients.loss_scale
            is_named = is_raised or not self._progress.has_warned_of_nonfinite
            if scale is not None and scale.can_fall:
                is_named = False  # an ordinary overflow
            self._nonfinite_name = self.gradients.first_nonfinite() if is_named else ""

    def _report_nonfinite(self) -> None:
        """Count a skipped step, or raise FloatingPointError, as `nonfinite_gradients` says.

        A step that another optimizer makes on the same gradients is skipped as well.
        """
        name, progress = self._nonfinite_name, self._progress
        text = f"step {progress.num_steps}: the gradient of {name} is infinite or NaN, so no parameter was changed."
        if self._options.scales_loss:
            text += ' The loss scale has fallen to 1: look for the cause, or use precision="bfloat16".'
        if name and self._options.nonfinite_gradients == "raise":
            self._nonfinite_name = None
            raise FloatingPointError(text)
        self._nonfinite_name = ""
        progress.num_skipped_steps += 1
        if name and not progress.has_warned_of_nonfinite:
            progress.has_warned_of_nonfinite = True
            if self._group.rank() == 0:
                logger.warning("%s Later steps of this kind are skipped and counted in num_skipped_steps.", text)


def _with_versions(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that have a version: inference tensors have none, and cannot be trained nor changed."""
    return [parameter for parameter in model.parameters() if not parameter.is_inference()]


def _refuse_max_norm(model: nn.Module, options: TrainerOptions) -> None:
    """Raise ValueError for options with which ranks cannot rescale rows of an embedding together. Local."""
    name = next(iter(max_norm_modules(model)), None)
    if name is not None and (options.shards_optimizer or options.reproducible is not None):
        option = 'shard="optimizer"' if options.shards_optimizer else "reproducible="
        raise ValueError(
            f"{name or 'the model'} has max_norm, with which forward writes to the weight. That does not work with "
            f"{option}: leave it or max_norm out"
        )


def _refuse_float16(model: nn.Module, options: TrainerOptions) -> None:
    """Raise ValueError for parameters whose gradients, divided by the loss scale, float16 would not hold. Local."""
    for name, parameter in model.named_parameters() if options.scales_loss else ():
        if parameter.dtype == torch.float16:
            raise ValueError(
                f'{name} is float16, but precision="float16" computes in float16 with weights in float32: call '
                f"model.float() before making the trainer, and leave the casts to precision"
            )
