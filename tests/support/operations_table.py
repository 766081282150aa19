# SPDX-License-Identifier: Apache-2.0
"""Write the table of docs/torch-distributed.md: what each operation takes on shmpi and on gloo, run in the same ranks.

Run `make docs-table`, or `mpirun -np 2 python tests/support/operations_table.py`. The columns of mpi and nccl are those
of the table of backends in torch's documentation, since torch's packages have no mpi, and nccl needs GPUs.
"""

import itertools
import re
import tempfile
import warnings
from collections import defaultdict
from datetime import timedelta
from pathlib import Path

import compiled_operations
import group_operations
import tensor_operations
import torch
import torch.distributed as dist
from operations import COMPLEX, FLOAT8, FLOATS, INTEGERS, REDUCTIONS, Call, Operation
from ranks import JobSpec, World

from distributed_trainer.backend import job

DOCUMENT = Path(__file__).parents[2] / "docs" / "torch-distributed.md"
START, END = "<!-- table: make docs-table -->\n", "<!-- end of the table -->\n"
OPERATIONS = [*tensor_operations.OPERATIONS, *group_operations.OPERATIONS, *compiled_operations.OPERATIONS]
KINDS = {"integers": INTEGERS, "floats": FLOATS, "complex": COMPLEX, "float8": FLOAT8}
DOCUMENTED = {"": ("", ""), "reduce_scatter": ("no", "GPU")}  # columns mpi and nccl
BACKENDS = ["shmpi", "gloo"]


class Backend:
    """torch.distributed on one backend, started again after each failure, since ranks may then be out of step."""

    def __init__(self, name: str, world: World, folder: str) -> None:
        self._name, self._world = name, world
        self._files = (f"{folder}/{number}" for number in itertools.count())
        self._start()

    def _start(self) -> None:
        timeout = timedelta(seconds=5)
        if self._name == "gloo":
            store = dist.FileStore(next(self._files), self._world.size)
            dist.init_process_group("gloo", None, timeout, self._world.size, self._world.rank, store)
        else:
            dist.init_process_group(self._name, init_method="mpi://", timeout=timeout)

    def failure(self, operation: Operation, **how: object) -> str:
        """Call an operation on all ranks; return a short error of the first rank that fails, or "" if none does."""
        text = ""
        try:
            operation.run(Call(dist.group.WORLD, self._world.rank, self._world.size, **how))
        except AssertionError as error:
            text = str(error) if str(error).startswith("is_completed") else "wrong result"
        except Exception as error:
            line = next(filter(None, str(error).strip().splitlines()), type(error).__name__)
            text = re.sub(r"\[[^]]*\]:? ?", "", line).partition("(")[0][:60].strip()  # without places, times and sizes
        found = self._world.gather(text)
        if any(found):
            dist.destroy_process_group()
            self._start()
        return next(filter(None, found), "")

    def cell(self, operation: Operation) -> str:
        """Return what the operation takes, as text for the table."""
        if operation.dtypes is None:
            return self.failure(operation) or "yes"
        cases = [(op, dtype) for op, dtypes in operation.dtypes.items() for dtype in dtypes]
        failures: dict[str, list] = defaultdict(list)
        for op, dtype in cases:
            if text := self.failure(operation, op=op, dtype=dtype):
                failures[text].append((op, dtype))
        if sum(map(len, failures.values())) == len(cases):
            return "; ".join(failures)
        texts = [f"not {_names(failed, cases)}: {text}" for text, failed in failures.items()]
        op = next(iter(operation.dtypes))
        others: dict[str, dict] = {"empty": {"layout": "empty"}}
        if operation.variants is None:
            others |= {"strided": {"layout": "strided"}, "async_op": {"async_op": True}}
        for what, how in others.items():
            if text := self.failure(operation, op=op, **how):
                texts.append(f"not {what}: {text}")
        return "; ".join(texts) or "all"


def _names(failed: list, cases: list) -> str:
    """Return names of the failed cases: whole reductions, then whole dtypes, then the remaining cases."""
    names = []
    left = list(failed)
    for number in (0, 1):
        for value in dict.fromkeys(case[number] for case in left):
            whole = [case for case in cases if case[number] == value]
            if value and set(whole) <= set(failed):
                names.append(value)
                left = [case for case in left if case not in whole]
    dtypes = [name for name in names if isinstance(name, torch.dtype)]
    texts = [name for name in names if isinstance(name, str)]
    for kind, members in KINDS.items():
        if set(members) <= set(dtypes):
            texts.append(kind)
            dtypes = [dtype for dtype in dtypes if dtype not in members]
    texts += [_name(dtype) for dtype in dtypes]
    for op in dict.fromkeys(op for op, _ in left):
        texts.append(f"{op} of {' '.join(_name(dtype) for other, dtype in left if other == op)}")
    return ", ".join(texts)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def legend() -> str:
    kinds = "; ".join(f"{kind}: {', '.join(map(_name, members))}" for kind, members in KINDS.items())
    by_dtypes: dict[str, list[str]] = defaultdict(list)
    for op, dtypes in REDUCTIONS.items():
        names = [kind for kind, members in KINDS.items() if set(members) <= set(dtypes)]
        by_dtypes[", ".join([*(["bool"] if torch.bool in dtypes else []), *names])].append(op)
    reductions = "; ".join(f"{', '.join(ops)} of {dtypes}" for dtypes, ops in by_dtypes.items())
    version = torch.__version__.partition("+")[0]
    return (
        f"CPU tensors, torch {version}, 2 ranks of one machine. *all* is every dtype (bool; {kinds}), of reductions "
        f"{reductions}; strided and empty tensors; and `async_op=True`. Functional collectives have no premul_sum and "
        "take contiguous tensors.\n\n"
    )


def render(cells: list[list[str]]) -> str:
    lines = ["| operation | shmpi | gloo | mpi (documented) | nccl (documented) |", "|---|---|---|---|---|"]
    for operation, row in zip(OPERATIONS, cells, strict=True):
        documented = DOCUMENTED.get(operation.documented, ("yes", "GPU"))
        lines.append("| " + " | ".join([operation.name, *row, *documented]) + " |")
    return legend() + "\n".join(lines) + "\n"


def rows(text: str) -> list[str]:
    """Return the names of the operations in the document's table."""
    table = text.partition(START)[2].partition(END)[0]
    return [line.split(" | ")[0].removeprefix("| ") for line in table.splitlines() if line.startswith("| ")][1:]


def main() -> None:
    warnings.simplefilter("ignore")
    started = job.start(None, None)
    world = World(JobSpec(started.engine.size), started.rank)
    columns = []
    with tempfile.TemporaryDirectory() as folder:
        for name in BACKENDS:
            backend = Backend(name, world, world.gather(folder)[0])
            # Groups first: gloo's split_group ends the process if torch.distributed had been started in it before.
            columns.append([backend.cell(operation) for operation in reversed(OPERATIONS)][::-1])
            dist.destroy_process_group()
        world.comm.Barrier()
    if world.rank == 0:
        before, _, rest = DOCUMENT.read_text().partition(START)
        after = rest.partition(END)[2]
        table = render([list(row) for row in zip(*columns, strict=True)])
        DOCUMENT.write_text(before + START + table + END + after)


if __name__ == "__main__":
    main()
