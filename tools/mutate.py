# SPDX-License-Identifier: Apache-2.0
"""Plant bugs in a copy of the checkout, one at a time, and report which tests find each.

Usage: python tools/mutate.py [--all] [NAME...]. Without names: every mutation of `MUTATIONS`. The tests of its room try
each mutation first, then the rest of `make test`, and with --all the rest of `make test-all` that can find it: more
ranks, MPICH and the long tests. The exit code is 1 if a mutation survives. A mutation takes seconds to minutes.

Who chose the mutations had not seen the tests. A bug that a user reports and no test had found is worth a new one.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COPY = ROOT / "build" / "mutants"
ENGINE_TESTS = "build/asan/engine_tests"
_P = "src/distributed_trainer/"


@dataclass(frozen=True)
class Mutation:
    """A bug: `old`, which occurs once in the file `path`, is replaced by `new`."""

    name: str
    path: str
    old: str
    new: str
    effect: str
    """Effect that a user would see."""

    @property
    def room(self) -> str:
        """Folder of the tests for the mutated file."""
        return "backend" if self.path.startswith("engine/") else Path(self.path).parts[2]

    def apply(self, root: Path) -> None:
        """Change the file below `root`."""
        path = root / self.path
        text = path.read_text()
        if text.count(self.old) != 1:
            raise SystemExit(f"{self.name}: its text occurs {text.count(self.old)} times in {self.path}, not once")
        path.write_text(text.replace(self.old, self.new))


def make_copy() -> None:
    """Copy all files that git knows to `COPY`, with the environments and the built engine of this checkout.

    The test that each mutation fits the code is left out, since it fails with every mutation.
    """
    shutil.rmtree(COPY, ignore_errors=True)
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in set(names.splitlines()) - {"tests/test_tools.py"}:
        (COPY / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, COPY / name)
    for name in (".venv", ".venv-mpich"):
        if (ROOT / name).exists():
            (COPY / name).symlink_to(ROOT / name)
    for module in (ROOT / "src/distributed_trainer").glob("_engine_*.so"):
        shutil.copy2(module, COPY / "src/distributed_trainer")


def run(*command: str) -> subprocess.CompletedProcess[str]:
    """Run a command in the copy, whose package is imported in place of the checkout's."""
    environment = os.environ | {"PYTHONPATH": f"{COPY}/src"}
    return subprocess.run(command, cwd=COPY, env=environment, capture_output=True, text=True)


def stages(mutation: Mutation, with_all: bool) -> Iterator[tuple[str, list[str]]]:
    """Yield the name and the command of each group of tests, the likeliest to find the mutation first."""

    def pytest(*words: str, venv: str = ".venv") -> list[str]:
        return [f"{venv}/bin/python", "-m", "pytest", "-x", "-q", *words]

    if mutation.path.startswith("engine/"):
        yield "make test, engine", ["env", "TEST_RANKS=123", ENGINE_TESTS]
    yield "make test, room", pytest("-m", "not long and not slow", f"tests/{mutation.room}")
    yield "make test, rest", pytest("-m", "not long and not slow", f"--ignore=tests/{mutation.room}")
    if with_all:
        if mutation.path.startswith("engine/"):
            yield "make test-all, engine", ["env", "TEST_RANKS=4", ENGINE_TESTS]
        yield "make test-all, slow", pytest("-m", "slow and not long")
        yield "make test-all, long", pytest("-m", "long")
        yield "make test-all, MPICH", pytest("-m", "each_mpi", venv=".venv-mpich")


def find(mutation: Mutation, with_all: bool) -> tuple[str, str]:
    """Return which group of tests finds the mutation, and its first failure; two empty strings if none does."""
    is_engine = mutation.path.startswith("engine/")
    if is_engine:
        built = run("make", "build-openmpi", ENGINE_TESTS, *(["build-mpich"] if with_all else []))
        if built.returncode:
            raise SystemExit(f"{mutation.name} does not compile:\n{built.stdout}{built.stderr}")
    for stage, command in stages(mutation, with_all):
        result = run(*command)
        if result.returncode:
            text = result.stdout + result.stderr
            failure = re.search(r"^(?:FAILED|ERROR) (.*?)(?: - |$)|^.*\bFAILED\b.*$", text, re.MULTILINE)
            return stage, (failure.group(1) or failure.group()) if failure else text.strip().splitlines()[-1]
    return "", ""


def main() -> int:
    """Print a row of a Markdown table for each mutation as it is done; return 1 if any survives."""
    parser = argparse.ArgumentParser(description="Plant bugs, and report which tests find each.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="mutations to try; default: every one")
    parser.add_argument("--all", action="store_true", help="try the rest of `make test-all` where `make test` is green")
    options = parser.parse_args()
    chosen = [mutation for mutation in MUTATIONS if not options.names or mutation.name in options.names]
    make_copy()
    num_survivors = 0
    print("| mutation | found by | first failure | seconds |\n|---|---|---|---|", flush=True)
    for mutation in chosen:
        original = (COPY / mutation.path).read_text()
        mutation.apply(COPY)
        start = time.monotonic()
        try:
            stage, failure = find(mutation, options.all)
        finally:
            (COPY / mutation.path).write_text(original)
        num_survivors += not stage
        seconds = time.monotonic() - start
        print(f"| {mutation.name} | {stage or '**survives**'} | {failure} | {seconds:.0f} |", flush=True)
    print(f"{len(chosen) - num_survivors} of {len(chosen)} found")
    return 1 if num_survivors else 0


MUTATIONS = [
    Mutation(
        name="trainer-evaluate-modes",
        path=_P + "trainer/evaluation.py",
        old="        for module, mode in modes:\n            module.training = mode\n",
        new="        model.train(modes[0][1])\n",
        effect="After evaluate(), submodules that the user had put into eval mode (frozen BatchNorm, "
        "dropout) train again.",
    ),
    Mutation(
        name="trainer-manual-nan-dummy",
        path=_P + "trainer/manual_loop.py",
        old="        value = sum(fraction * other for fraction, other in zip(fractions, losses, "
        "strict=True) if fraction)\n",
        new="        value = sum(fraction * other for fraction, other in zip(fractions, losses, strict=True))\n",
        effect="backward() returns NaN on all ranks if a rank with an empty part passes a NaN loss (a "
        "mean over nothing) with weight 0.",
    ),
    Mutation(
        name="checkpoint-newest-by-step",
        path=_P + "checkpoint/format.py",
        old='        return self.content["saved_at"], self.content["step"]\n',
        new='        return self.content["step"], self.content["saved_at"]\n',
        effect="After going back to an older checkpoint and training on, resume() loads the abandoned "
        "run's checkpoint with the higher step, and the cleanup removes the checkpoints that were "
        "just saved.",
    ),
    Mutation(
        name="checkpoint-late-random-states",
        path=_P + "checkpoint/state.py",
        old='encode((streams or rng.RngState.capture(self._device)).to_plain(), "random", {}),\n',
        new='encode(rng.RngState.capture(self._device).to_plain(), "random", {}),\n',
        effect="A resumed run reads the pending batch again but with random states from after the script "
        "has drawn for that batch (noise, mixup, trainer.forward), so it does not continue like "
        "the uninterrupted run.",
    ),
    Mutation(
        name="replica-batchnorm-dummy-backward",
        path=_P + "replica/batchnorm.py",
        old="    if call.is_dummy:  # not multiplied by 0, since 0 x NaN is NaN\n",
        new="    if False:\n",
        effect="With BatchNorm and a rank without samples, the dummy's gradients enter the other ranks' "
        "gradients of the layers before BatchNorm, which are then wrong.",
    ),
    Mutation(
        name="replica-checksum-remainder",
        path=_P + "replica/divergence.py",
        old="    return data[:num_whole].view(torch.int64).sum() + data[num_whole:].sum()\n",
        new="    return data[:num_whole].view(torch.int64).sum()\n",
        effect="Drift in the last element of a float32 parameter with an odd number of elements (such as "
        "a bias of one element) is never reported as weights that have drifted apart.",
    ),
    Mutation(
        name="gradients-dummy-clears-earlier",
        path=_P + "gradients/reducer.py",
        old="            if self._buckets and not state.has_gradient and state.view is not None:\n",
        new="            if self._buckets and state.view is not None:\n",
        effect="With microbatches, a rank whose last microbatch is a dummy loses the gradients of its "
        "earlier microbatches (from the second step on), so the step is not that of one process.",
    ),
    Mutation(
        name="gradients-powersgd-error",
        path=_P + "gradients/powersgd.py",
        old="                matrix.addmm_(p, self._own_q[position], alpha=-1)\n",
        new="                matrix.addmm_(p, q, alpha=-1)\n",
        effect="With PowerSGD on several ranks each rank subtracts the sum of all ranks from its own "
        "error, so the error feedback is wrong and training gets worse than without compression or "
        "diverges.",
    ),
    Mutation(
        name="data-bookmark-after-step",
        path=_P + "data/position.py",
        old="            if bookmark is not None and bookmark.progress == progress:\n",
        new="            if bookmark is not None:\n",
        effect="A checkpoint made at the end of a run that left its loop over the loader in mid-epoch "
        "says that the last batch was not trained on, so a resumed run trains on it twice.",
    ),
    Mutation(
        name="data-label-checksum",
        path=_P + "data/fingerprint.py",
        old="if wrong[rank] or header[1] != headers[0][1]]\n",
        new="if wrong[rank]]\n",
        effect="Ranks whose integer tensors (labels, tokens) differ only in elements outside of the "
        "sampled ones get no MismatchError and train on different batches.",
    ),
    Mutation(
        name="metrics-slowest-phase",
        path=_P + "metrics/step_clock.py",
        old="        phase, excess = _OWN[int(differences.argmax())], float(differences.max())\n",
        new="        phase, excess = PHASES[int(differences.argmax())], float(differences.max())\n",
        effect='summary() names the wrong phase of the slowest rank: "agreement" for forward, "forward" for backward.',
    ),
    Mutation(
        name="metrics-line-every-batch",
        path=_P + "metrics/progress.py",
        old="                said = time.monotonic()\n                say(line())\n",
        new="                say(line())\n",
        effect="Without a terminal, progress() prints a line for every batch once ten seconds have "
        "passed, instead of one every ten seconds.",
    ),
    Mutation(
        name="backend-split-ranks",
        path=_P + "backend/process_group.py",
        old="        group = self._create_group([world_ranks[rank] for rank in ranks], timeout or self._timeout)\n",
        new="        group = self._create_group(list(ranks), timeout or self._timeout)\n",
        effect="split_group of a group other than the world takes the ranks for ranks of the job: an "
        "error, or a group of the wrong processes. (Needs 3 ranks, or 2 in another order.)",
    ),
    Mutation(
        name="backend-recv-no-copy",
        path=_P + "backend/process_group.py",
        old="        return self._start(operation, (target,), copy_back(tensor, target), tensors, is_message=True)\n",
        new="        return self._start(operation, (target,), None, tensors, is_message=True)\n",
        effect="recv into a tensor that is not contiguous (or on an accelerator) succeeds but leaves the "
        "tensor as it was.",
    ),
    Mutation(
        name="launch-salloc-shell",
        path=_P + "launch/launcher.py",
        old='            if name == "srun" and (size == 1 or environ.get("SLURM_STEP_ID") == str(0xFFFFFFFA)):\n',
        new='            if name == "srun" and size == 1:\n',
        effect="`python train.py` in the shell of salloc (an interactive step of a job of several tasks) "
        "is taken for a rank of srun and fails, and num_gpus= does not start ranks there.",
    ),
    Mutation(
        name="launch-threads-of-limit",
        path=_P + "launch/devices.py",
        old="        of_limit = Fraction(math.ceil(limit[1]), limits.count(limit))\n",
        new="        of_limit = Fraction(math.ceil(limit[1]), len(limits))\n",
        effect="Ranks of one machine in several containers, each with its own CPU limit, get too few "
        "threads: each container's limit is divided among all ranks of the machine. The start-up "
        "line shows the wrong number.",
    ),
    Mutation(
        name="engine-stall-message-peer",
        path="engine/runtime/stall_monitor.cpp",
        old="    waited_for_ = {rank_, at(ranks, call.root)};\n",
        new="    waited_for_ = {rank_, call.root};\n",
        effect="The stall report of a send or recv in a group that is not the whole job names (and asks "
        "for the stack of) the wrong rank. (Needs 3 ranks.)",
    ),
    Mutation(
        name="engine-nodes-nonfinite-last-slice",
        path="engine/collectives/all_reduce_nodes.cpp",
        old="      found_nonfinite_ |= reduce({&source, 1}, copies, num_elements(slice),\n",
        new="      found_nonfinite_ = reduce({&source, 1}, copies, num_elements(slice),\n",
        effect="On several nodes, a NaN or infinity in any but the last part of a large bucket is not "
        'noticed, so nonfinite_gradients="skip" or "raise" lets the optimizer step with it.',
    ),
    Mutation(
        name="engine-thread-level",
        path="engine/mpi/library.cpp",
        old="  if (provided < MPI_THREAD_MULTIPLE) {\n",
        new="  if (provided < MPI_THREAD_SERIALIZED) {\n",
        effect="A script that has initialised MPI with MPI_THREAD_SERIALIZED is no longer refused with an "
        "explanation; the engine then calls MPI from several threads at once, which may crash or hang.",
    ),
    Mutation(
        name="engine-min-drops-nan",
        path="engine/kernels/reduce_kernels.cpp",
        old="  if constexpr (std::is_floating_point_v<T>) return a != a || a < b ? a : b;\n",
        new="  if constexpr (std::is_floating_point_v<T>) return a < b ? a : b;\n",
        effect="all_reduce with MIN hides a NaN of a lower rank: the result is the minimum of the later "
        "ranks, not NaN as in torch.",
    ),
]


if __name__ == "__main__":
    sys.exit(main())
