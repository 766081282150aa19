# SPDX-License-Identifier: Apache-2.0
"""Exchange small Python values, and errors, between the ranks of any process group of torch."""

from __future__ import annotations

import json
import os
import pickle
import traceback
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist

from ..errors import (
    CheckpointError,
    DistributedTrainerError,
    LaunchError,
    MismatchError,
    MPINotFoundError,
    RankLostError,
    RankTraceback,
)
from .engine_group import EngineGroup

_Result = TypeVar("_Result")

# Bytes of the first message of `gather_objects`, of `gather_json`, and of `gather_objects` in calls of the script: the
# engine finds ranks that are in different ones.
_PICKLED, _JSON, SCRIPT_CALL = 8, 9, 10

# Types that an error of one rank can have on the other ranks. If several in `keep` fit, the first is taken.
_ERROR_TYPES = {
    kind.__name__: kind
    for kind in (
        *(TypeError, ValueError, OSError),
        *(CheckpointError, LaunchError, MismatchError, MPINotFoundError, RankLostError, DistributedTrainerError),
    )
}


def message_device(process_group: dist.ProcessGroup) -> torch.device:
    """Return the device for small tensors that a process group is to exchange: the CPU if the group accepts it."""
    kinds = process_group._device_types
    return torch.device("cpu") if not kinds or torch.device("cpu") in kinds else kinds[0]


def gather_bytes(process_group: dist.ProcessGroup, message: bytes) -> list[bytes]:
    """Gather bytes, as many from each rank, from all ranks of any process group, by rank. Collective, blocks."""
    if isinstance(process_group, EngineGroup):
        data = process_group.gather_bytes(message)
    else:
        device = message_device(process_group)
        own = torch.frombuffer(bytearray(message), dtype=torch.uint8).to(device)
        gathered = torch.empty(process_group.size() * len(message), dtype=torch.uint8, device=device)
        process_group._allgather_base(gathered, own).wait()
        data = gathered.cpu().numpy().tobytes()
    return [data[start : start + len(message)] for start in range(0, len(data), len(message))]


def gather_objects(process_group: dist.ProcessGroup, value: Any, header_bytes: int = _PICKLED) -> list[Any]:
    """Gather a picklable object from each rank of any process group, by rank. Collective, blocks."""
    return [pickle.loads(row) for row in _gather_unequal(process_group, pickle.dumps(value), header_bytes)]


def gather_json(process_group: dist.ProcessGroup, value: Any) -> list[Any]:
    """Gather a value that JSON can represent from each rank of any process group, by rank. Collective, blocks."""
    return [json.loads(row) for row in _gather_unequal(process_group, json.dumps(value).encode(), _JSON)]


def _gather_unequal(process_group: dist.ProcessGroup, data: bytes, header_bytes: int) -> list[bytes]:
    header = len(data).to_bytes(header_bytes, "little")
    lengths = [int.from_bytes(row, "little") for row in gather_bytes(process_group, header)]
    rows = gather_bytes(process_group, data.ljust(max(lengths), b"\0"))
    return [row[:length] for row, length in zip(rows, lengths, strict=True)]


def call_together(
    process_group: dist.ProcessGroup,
    call: Callable[[], _Result],
    otherwise: type[DistributedTrainerError] = DistributedTrainerError,
    keep: tuple[type[Exception], ...] = (ValueError,),
) -> _Result:
    """Call a local function on every rank; if it raises on any rank, raise the lowest such rank's error on all.

    Collective, blocks: it is a barrier, too.

    Args:
        process_group: Any process group of torch.
        call: Function to call. It must not communicate: ranks where it fails would leave the others waiting.
        otherwise: Type to raise for an error that is neither in `keep` nor a subclass of this type.
        keep: Types, among TypeError, ValueError and OSError, that an error keeps on all ranks. An OSError also keeps
            its number and file name, so FileNotFoundError stays FileNotFoundError.

    Returns:
        The result of `call` on this rank.
    """
    result, error = None, None
    try:
        result = call()
    except Exception as caught:
        error = caught
    raise_together(process_group, error, otherwise, keep)
    return result  # type: ignore[return-value]  # raise_together raises if call() did, so this is its result


def call_on_rank_0(
    process_group: dist.ProcessGroup,
    call: Callable[[], object],
    otherwise: type[DistributedTrainerError] = DistributedTrainerError,
    keep: tuple[type[Exception], ...] = (ValueError,),
) -> None:
    """Call a local function on rank 0; if it raises, raise its error on every rank. Collective, blocks.

    Args:
        process_group: Any process group of torch.
        call: As for `call_together`; its result is dropped.
        otherwise: As for `call_together`.
        keep: As for `call_together`.
    """
    call_together(process_group, call if process_group.rank() == 0 else lambda: None, otherwise, keep)


def raise_together(
    process_group: dist.ProcessGroup,
    error: Exception | None,
    otherwise: type[DistributedTrainerError] = DistributedTrainerError,
    keep: tuple[type[Exception], ...] = (ValueError,),
) -> None:
    """Raise the error of the lowest rank that has one, on every rank; return if no rank has one. Collective, blocks.

    Args:
        process_group: Any process group of torch.
        error: This rank's error, None if it has none.
        otherwise: As for `call_together`.
        keep: As for `call_together`.
    """
    own = None if error is None else _describe(error, otherwise, keep)
    for rank, description in enumerate(gather_json(process_group, own)):
        if description is not None:
            _raise(description, error if rank == process_group.rank() else None)


def raise_alike(process_group: dist.ProcessGroup, error: Exception | None) -> None:
    """Raise the exception of the lowest rank that has one, in its own type, on every rank; return if no rank has one.

    Collective, blocks. On other ranks than its own the exception has that rank's traceback as cause. An exception that
    cannot be pickled becomes a DistributedTrainerError there.

    Args:
        process_group: Any process group of torch.
        error: This rank's exception, None if it has none.
    """
    for rank, row in enumerate(gather_objects(process_group, None if error is None else pack_exception(error))):
        if row is not None:
            if rank == process_group.rank() and error is not None:
                raise error
            raise unpack_exception(row, rank)


def pack_exception(error: Exception) -> tuple[bytes, str]:
    """Return values that can be pickled, for `unpack_exception` on another rank. Local."""
    return _pickled(error), "".join(traceback.format_exception(error))


def unpack_exception(packed: tuple[bytes, str], rank: int) -> Exception:
    """Return another rank's exception, with its traceback there as cause. Local."""
    error: Exception = pickle.loads(packed[0])
    error.__cause__ = RankTraceback(f"raised on rank {rank}:\n{packed[1]}")
    return error


def _pickled(error: Exception) -> bytes:
    """Return bytes from which every rank can make the exception, or one that says the same. Local."""
    try:
        data = pickle.dumps(error)
        pickle.loads(data)
        return data
    except Exception:  # an exception's own code can raise anything
        return pickle.dumps(DistributedTrainerError(traceback.format_exception_only(error)[-1].strip()))


def _describe(error: Exception, otherwise: type[Exception], keep: tuple[type[Exception], ...]) -> list[Any]:
    """Return a description from which `_raise` makes the error: the name of its type, and its arguments."""
    kept = next((name for name, kind in _ERROR_TYPES.items() if isinstance(error, kind) and kind in keep), None)
    if kept == "OSError" and isinstance(error, OSError) and error.errno is not None:
        name = error.filename
        return [kept, error.errno, error.strerror, name if name is None or isinstance(name, int) else os.fsdecode(name)]
    if kept is not None:
        return [kept, str(error)]
    if not isinstance(error, otherwise):
        return [otherwise.__name__, f"{type(error).__name__}: {error}"]
    kind = type(error).__name__
    return [kind if kind in _ERROR_TYPES else otherwise.__name__, str(error)]


def _raise(description: list[Any], cause: Exception | None) -> NoReturn:
    kind, *arguments = description
    if type(cause) is _ERROR_TYPES[kind] and [str(argument) for argument in cause.args] == arguments:
        raise cause  # a new error would say nothing more
    raise _ERROR_TYPES[kind](*arguments) from cause
