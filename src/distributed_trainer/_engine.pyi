# SPDX-License-Identifier: Apache-2.0
# Written by tools/write_stub.py
from collections.abc import Sequence
import enum
from typing import Annotated, NoReturn

import numpy
from numpy.typing import NDArray


class ReduceOp(enum.Enum):
    """Operation of a reduction."""

    SUM = 0

    AVERAGE = 1

    PRODUCT = 2

    MIN = 3

    MAX = 4

    BAND = 5

    BOR = 6

    BXOR = 7

class WireDtype(enum.Enum):
    """Type in which sums of float32 cross between nodes."""

    bfloat16 = 2

    float16 = 3

class Operation:
    """Collective or message that was submitted."""

    def wait(self, timeout_seconds: float | None = None) -> bool:
        """
        Block until the operation is done and return True; return False after timeout_seconds (None: no limit).

        Raise the error with which the operation failed.
        """

    def found_nonfinite(self) -> bool:
        """
        Return whether the result holds an infinity or NaN; for reduce_shards, this rank's shards of it.

        Raise ValueError unless the operation is done without error and was called with check_finite=True.
        """

    def is_done(self) -> bool:
        """
        Return whether the operation is done, with or without error. Does not block.
        """

    @property
    def done_at_ns(self) -> int | None:
        """
        Time at which this process saw the operation done, by the clock of time.perf_counter_ns(); None before.
        """

    @property
    def source(self) -> int:
        """Rank that sent the message, once a receive is done."""

class Group:
    """
    Group of ranks and its collectives.

    A collective returns at once; the operation that it returns is to be waited for. All ranks of the group must call the same collectives in the same order. Tensors are contiguous and on the CPU, and must stay alive until the operation is done. Ranks are numbers in this group.
    """

    @property
    def rank(self) -> int:
        """Number of this rank in the group."""

    @property
    def size(self) -> int:
        """Number of ranks in the group."""

    @property
    def world_ranks(self) -> list[int]:
        """Number in the engine of each rank of the group."""

    @property
    def num_nodes(self) -> int:
        """Number of nodes on which the group has ranks."""

    def allocate(self, num_bytes: int) -> Annotated[NDArray[numpy.uint8], dict(device='cpu')]:
        """
        Allocate num_bytes of zeroed memory in which this group's collectives need no copies. Collective, blocks.
        """

    def release(self, memory: object) -> None:
        """
        Release memory of allocate() from use in place; it is freed with its last view. Local.
        """

    def allocate_shared(self, num_bytes: int) -> Annotated[NDArray[numpy.uint8], dict(device='cpu')]:
        """
        Allocate one zeroed block of num_bytes on each node, which the group's ranks there share. Collective, blocks.
        """

    def all_reduce(self, buffer: object, op: ReduceOp = ReduceOp.SUM, wire_dtype: WireDtype | None = None, check_finite: bool = False) -> Operation:
        """
        Reduce buffer over all ranks, in place.

        wire_dtype: type in which sums of float32 cross between nodes; None for buffer's own. check_finite: look for infinities and NaN in the result, for found_nonfinite().
        """

    def reduce(self, buffer: object, op: ReduceOp, root: int) -> Operation:
        """
        Reduce buffer over all ranks for rank root. Every rank's buffer gets the result.
        """

    def broadcast(self, buffer: object, root: int) -> Operation:
        """Copy buffer of rank root to buffer of every rank."""

    def all_gather(self, input: object, outputs: object) -> Operation:
        """
        Fill outputs[r] on every rank with input of rank r.

        outputs: a list with a tensor for each rank, or one tensor that is cut into equal parts.
        """

    def all_to_all(self, inputs: object, outputs: object) -> Operation:
        """
        Fill outputs[r] with this rank's entry in inputs of rank r.

        inputs, outputs: a list with a tensor for each rank, or one tensor that is cut into equal parts.
        """

    def gather(self, input: object, outputs: object | None, root: int) -> Operation:
        """
        Fill outputs[r] of rank root with input of rank r.

        outputs: a list with a tensor for each rank, or one tensor that is cut into equal parts; None on other ranks.
        """

    def scatter(self, inputs: object | None, output: object, root: int) -> Operation:
        """
        Fill output of rank r with inputs[r] of rank root.

        inputs: a list with a tensor for each rank, or one tensor that is cut into equal parts; None on other ranks.
        """

    def send(self, tensor: object, destination: int, tag: int) -> Operation:
        """Send tensor to rank destination, which receives it with the same tag."""

    def receive(self, tensor: object, source: int | None, tag: int) -> Operation:
        """
        Receive a message into tensor, which has its size. source: a rank; None for any.
        """

    def gather_bytes(self, message: bytes) -> bytes:
        """
        Return the messages of all ranks, one behind the other; all must have the same length. Collective, blocks.
        """

    def reduce_scatter(self, inputs: object, output: object, op: ReduceOp = ReduceOp.SUM) -> Operation:
        """
        Fill output of rank r with the reduction of inputs[r] of all ranks.

        inputs: a list with a tensor for each rank, or one tensor that is cut into equal parts.
        """

    def reduce_shards(self, buffer: object, blocks: Sequence[tuple[int, int]], op: ReduceOp = ReduceOp.SUM, check_finite: bool = False) -> Operation:
        """
        Reduce blocks of buffer over all ranks; each rank gets the result for its own shards, in place.

        buffer: in memory of allocate(). blocks: pairs (offset, length) in bytes; rank r owns part r of each. check_finite: look for infinities and NaN in the result, for found_nonfinite().
        """

    def gather_shards(self, buffer: object, blocks: Sequence[tuple[int, int]]) -> Operation:
        """
        Gather the shards of blocks from all ranks into buffer, which is memory of allocate_shared().

        blocks: pairs (offset, length) in bytes; see reduce_shards().
        """

    def describe_wait(self, operation: Operation) -> str:
        """
        Describe what the operation waits for. Local; asks other nodes, which takes up to 1 s.
        """

    def give_up(self, reason: str) -> None:
        """
        Fail all calls of every rank in this group, now and later, with reason. Local.
        """

    def close(self) -> None:
        """
        Close the group on this rank, which takes part in none of its calls any more. Local.
        """

    def barrier(self) -> Operation:
        """Complete once every rank has called it."""

class Mailbox:
    """
    Short messages between any two ranks. Its calls are local and do not block.
    """

    @property
    def rank(self) -> int:
        """Number of this rank."""

    @property
    def size(self) -> int:
        """Number of ranks."""

    def post(self, message: bytes, destination: int) -> None:
        """Send message to rank destination."""

    def is_flushed(self) -> bool:
        """Return whether everything posted has left this rank."""

    def collect(self) -> bytes | None:
        """
        Return a message that has arrived from any rank, or None. Messages of one rank arrive in order.
        """

class Engine:
    """
    Groups of this process's ranks, and their memory. It belongs to one set of ranks.
    """

    def __init__(self, communicator_address: int = 0, max_ranks_per_node: int = 0, numa_node: int | None = None, initialized_mpi: bool = False, cpu_limit: int | None = None, survives_deaths: bool = False) -> None:
        """
        Initialise MPI unless it is initialised already. Collective over the communicator, blocks.

        communicator_address: address of the communicator; 0 for the world. max_ranks_per_node, numa_node: for tests, pretend nodes of that many ranks (0: the real nodes), and that this rank is on that NUMA node. initialized_mpi: exchange_versions() has initialised MPI, so close() finalises it. cpu_limit: number of processors that this machine's ranks get time on. survives_deaths: survive killed ranks; see recover().
        """

    @property
    def rank(self) -> int:
        """Number of this rank."""

    @property
    def size(self) -> int:
        """Number of ranks."""

    @property
    def node_of_rank(self) -> list[int]:
        """
        Number of the node of each rank; nodes are numbered by their lowest rank.
        """

    def cores_of(self, rank: int) -> list[int]:
        """Return the numbers of the processors that rank may use. Local."""

    @property
    def has_thread(self) -> bool:
        """Whether an engine thread drives the collectives."""

    def counters(self) -> dict[str, int]:
        """
        Count what this rank has done since the engine started. Local.

        collectives: those that succeeded. messages_sent, bytes_sent, messages_received, bytes_received: messages to and from other nodes. mpi_collectives: calls of MPI's own collectives between nodes, whose messages are not counted.
        """

    def create_group(self, ranks: Sequence[int]) -> Group:
        """Create a group of ranks, in this order. Collective over them, blocks."""

    def create_mailbox(self) -> Mailbox:
        """Create a mailbox of all ranks. Collective over all ranks, blocks."""

    def set_limits(self, report_seconds: float | None, timeout_seconds: float | None) -> None:
        """
        Set the limits of waits; None leaves a limit unchanged. Local.

        report_seconds, at first 5: a wait is reported before it has lasted so long. timeout_seconds, at first 600: a rank that is silent for so long ends the job.
        """

    def set_stack_signal(self, signal: int, pipe: int) -> None:
        """
        Set the signal that the main thread gets when others wait for this rank. Local.

        Its handler writes the stack to a pipe; the engine prints what it reads from pipe, which does not block.
        """

    def note_call(self, call: str, file: str, line: int) -> None:
        """
        Record that the script makes this call to the trainer, at that place. Local.
        """

    def note_return(self) -> None:
        """Record that the script's call to the trainer has returned. Local."""

    def describe_places(self) -> str:
        """
        Describe the last note_call() of each rank. Local; asks other nodes, which takes up to a fifth of report_seconds.
        """

    def is_rank_lost(self) -> bool:
        """
        Return whether a rank is dead, stopped or silent. Local; takes as long as describe_places().
        """

    def note_failure(self) -> None:
        """Record that the exception that ends this rank was printed. Local."""

    def has_lost_rank(self, timeout_seconds: float) -> bool:
        """
        Return whether a rank was killed, so that only recover() can be called; False without survives_deaths.

        Wait up to timeout_seconds for MPI to report the death. Local.
        """

    def recover(self) -> Engine | None:
        """
        Make the engine of the ranks that live, in their order, after has_lost_rank(). Collective over them, blocks.

        Return None if one of them is in close(): the other ranks have reached their end.
        """

    def start_replacement(self, command: str, arguments: Sequence[str], folder: str) -> None:
        """
        Start a process that replaces a killed rank: command with arguments, in folder. Local; for rank 0.
        """

    def has_replacement(self) -> bool:
        """Return whether a process that this rank has started lives. Local."""

    def has_ready_replacement(self) -> bool:
        """Return whether that process waits in join(). Local."""

    def admit(self) -> Engine:
        """
        Make the engine of all ranks and of the process that waits in join(), the last of them.

        Collective over all of them, blocks.
        """

    def join(self) -> Engine | None:
        """
        Make the engine that admit() makes, in the new process; return None if the process is not needed any more.

        Collective over all ranks of that engine, blocks.
        """

    def close(self) -> None:
        """
        Fail operations in flight and finalise MPI if the engine initialised it. Collective; nothing in a forked child.
        """

engine_version: str

def exchange_versions(communicator_address: int, own: str) -> tuple[list[str], bool]:
    """
    Gather a text from every rank before there is an engine; also return whether this call has initialised MPI.

    Collective over the communicator (see Engine), blocks.
    """

def world_rank_and_size() -> tuple[int, int]:
    """
    Return this process's rank and the number of ranks in the launch, whatever the engine's communicator. Local.
    """

def is_replacement() -> bool:
    """
    Return whether a rank has started this process to replace another. Local.
    """

def survives_deaths() -> bool:
    """Return whether MPI continues when a rank is killed. Local."""

def library_version() -> str:
    """Return the first line of the MPI library's version. Local."""

def kernel_isa() -> str:
    """Return the name of the instruction set that reductions use. Local."""

def abort(exit_code: int) -> NoReturn:
    """End all ranks of the job with exit_code. Local."""

def end_with_launcher(launcher_pid: int) -> None:
    """
    End this process when the process launcher_pid is gone. Local, returns at once.
    """
