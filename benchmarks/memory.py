# SPDX-License-Identifier: Apache-2.0
"""Measure the memory of all ranks at the peak of backward, beside plain processes: python benchmarks/memory.py

The figure is the Pss of all ranks (proportional set size: a shared page counts once in total), in backward of the first
layer, when all gradients exist. A rank may use its buckets instead of gradients, and 15 MiB besides its largest single
gradient. Each contender is a separate launch, since memory that one leaves would count for the next.
"""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

from table import Table, make_parser, run_on_ranks

CONTENDERS = ["plain", "ours", "ours, sharded"]
MIB = 1 << 20


def pss_bytes() -> int:
    """Read how much memory this process has, in bytes."""
    (line,) = (line for line in Path("/proc/self/smaps_rollup").read_text().splitlines() if line.startswith("Pss:"))
    return int(line.split()[1]) * 1024


def peak(layer: object, step: Callable[[], object]) -> int:
    """Return the sum of all ranks' Pss when the layer's gradient is known, in the last of some steps.

    Collective, blocks.
    """
    from mpi4py import MPI

    sums = []

    def look(*_unused: object) -> None:
        MPI.COMM_WORLD.Barrier()
        sums.append(MPI.COMM_WORLD.allreduce(pss_bytes()))
        MPI.COMM_WORLD.Barrier()

    for _ in range(3):
        step()
    hook = layer.register_full_backward_hook(look)
    step()
    hook.remove()
    return sums[-1]


def run_rank(contender: str, file: Path, is_quick: bool) -> None:
    """Measure one contender; rank 0 writes the bytes to the file. Runs on each rank."""
    from models import make_step, make_subjects, make_trainer_step
    from mpi4py import MPI

    from distributed_trainer import create_distributed_trainer

    subject = make_subjects(MPI.COMM_WORLD.size, is_quick)[0]
    model = subject.model
    trainer = create_distributed_trainer(model, shard="optimizer" if contender == "ours, sharded" else None)
    if contender == "plain":
        step = make_step(model, *trainer.split(subject.batch))
        trainer.close()
    else:
        step = make_trainer_step(trainer, *subject.batch)
    bytes_in_all = peak(model[1], step)
    if MPI.COMM_WORLD.rank == 0:
        file.write_text(json.dumps(bytes_in_all))


def main() -> None:
    """Print the table, which has one row."""
    parser = make_parser(__doc__, seconds=0.0)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--contender", nargs=2, metavar=("NAME", "FILE"), help="used on ranks")
    options = parser.parse_args()
    if options.contender:
        run_rank(options.contender[0], Path(options.contender[1]), options.quick)
        return
    values = {}
    quick = ["--quick"] if options.quick else []
    with tempfile.TemporaryDirectory() as folder:
        for name in CONTENDERS:
            file = Path(folder) / "bytes"
            run_on_ranks(options.ranks, Path(__file__), "--contender", name, str(file), *quick, is_quiet=True)
            values[name] = json.loads(file.read_text())
    title = f"Memory at the peak of a step, Pss of {options.ranks} ranks in all"
    table = Table(title, "model", CONTENDERS, "MiB", 1 / MIB, ratios="size")
    table.add("MLP", values)
    table.show(options.results)


if __name__ == "__main__":
    main()
