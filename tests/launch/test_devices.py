# SPDX-License-Identifier: Apache-2.0
"""Ranks per machine, devices and threads, on simulated machines."""

import os
import subprocess
import sys

import pytest
import torch

from distributed_trainer import LaunchError
from distributed_trainer.launch.devices import (
    find_other_ranks,
    fit_threads,
    num_usable_cores,
    pick_device,
    resolve_num_gpus,
    visible_devices,
)


@pytest.mark.parametrize(
    ("num_gpus", "local_size", "device_count", "num_ranks"),
    [
        (None, None, 0, 1),
        (None, None, 4, 1),
        (2, None, 0, 2),
        (4, None, 4, 4),
        (None, 3, 0, 3),
        (None, 3, 4, 3),
        (3, 3, 0, 3),
    ],
)
def test_ranks_per_machine(num_gpus, local_size, device_count, num_ranks):
    assert resolve_num_gpus(num_gpus, local_size, device_count) == (num_ranks, None)


@pytest.mark.parametrize("device_count", [0, 8])
@pytest.mark.parametrize(("num_gpus", "local_size"), [(2, 4), (4, 2), (2, 1)])
def test_the_launcher_overrules_num_gpus_with_one_line(num_gpus, local_size, device_count):
    num_ranks, line = resolve_num_gpus(num_gpus, local_size, device_count)
    assert num_ranks == local_size
    assert f"num_gpus={num_gpus}" in line and f"{local_size} rank(s)" in line and "\n" not in line


@pytest.mark.parametrize(("num_gpus", "local_size"), [(4, None), (None, 4), (4, 2), (2, 4)])
def test_more_ranks_than_gpus(num_gpus, local_size):
    with pytest.raises(LaunchError, match=r"(num_gpus=4|4 ranks).*2 GPU\(s\).*CUDA_VISIBLE_DEVICES"):
        resolve_num_gpus(num_gpus, local_size, 2)


@pytest.mark.parametrize("num_gpus", [0, -1])
def test_num_gpus_below_one(num_gpus):
    with pytest.raises(ValueError, match=f"at least 1, not {num_gpus}"):
        resolve_num_gpus(num_gpus, None, 0)


@pytest.mark.parametrize("num_gpus", ["2", 2.0, True, [0, 1]])
def test_num_gpus_of_wrong_type(num_gpus):
    with pytest.raises(TypeError, match=f"not {type(num_gpus).__name__}"):
        resolve_num_gpus(num_gpus, None, 0)


@pytest.mark.parametrize(
    ("visible", "indices"),
    [
        (["AB", "AB"], [0, 1]),  # every rank sees all GPUs
        (["A", "B", "C"], [0, 0, 0]),  # each rank sees only its own GPU
        (["AB", "AB", "CD", "CD"], [0, 1, 0, 1]),  # the ranks of a socket see the socket's GPUs
        (["ABCD"], [0]),
    ],
)
def test_one_gpu_per_rank(visible, indices):
    devices = [pick_device(visible, local_rank, "xpu") for local_rank in range(len(visible))]
    assert devices == [torch.device("xpu", index) for index in indices]


def test_ranks_without_gpus_are_on_the_cpu():
    assert pick_device([[], []], 1) == torch.device("cpu")


@pytest.mark.parametrize("visible", [["AB", "AB", "AB"], ["A", "B", "A"], ["AB", "CD", "AB"]])
def test_two_ranks_on_one_gpu(visible):
    with pytest.raises(LaunchError, match=r"Local ranks 0 and 2 .* GPU A: .*Start one rank per GPU"):
        pick_device(visible, 1)


def test_a_rank_that_sees_no_gpu():
    with pytest.raises(LaunchError, match=r"Local ranks \[1\] .* see no GPU"):
        pick_device(["A", "", "B"], 0)


class FakeAccelerator:
    """Replacement of torch.accelerator with some accelerators."""

    type = "cuda"

    def __init__(self, monkeypatch, count, **properties):
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: self)
        monkeypatch.setattr(torch, "get_device_module", lambda kind: self)
        self.properties = properties

    def get_device_properties(self, index):
        return type("Properties", (), {name: value[index] for name, value in self.properties.items()})


def test_devices_are_named_by_uuid(monkeypatch):
    FakeAccelerator(monkeypatch, 2, uuid=["GPU-7", "GPU-9"])
    assert visible_devices() == ["GPU-7", "GPU-9"]


def test_devices_without_uuid(monkeypatch):
    FakeAccelerator(monkeypatch, 2)
    assert visible_devices() == ["cuda:0", "cuda:1"]
    FakeAccelerator(monkeypatch, 1)
    assert visible_devices() == [f"cuda of process {os.getpid()}:0"]  # a name that no other rank has


def fit(cpus_of_ranks, environ=None, cpus_of_launcher=frozenset(), limits=(), core_of=lambda cpu: cpu):
    """Return `fit_threads` of all ranks."""
    ranks = range(len(cpus_of_ranks))
    return [fit_threads(cpus_of_ranks, rank, environ or {}, cpus_of_launcher, limits, core_of) for rank in ranks]


@pytest.mark.parametrize(
    ("cpus_of_ranks", "numbers"),
    [
        ([{0, 1}] * 2, [1, 1]),  # two ranks share two cores
        ([{0, 1}] * 4, [1] * 4),  # more ranks than cores
        ([set(range(16))] * 4, [3] * 4),  # 4 cores for each, one of them for the engine
        ([set(range(15))] * 4, [3] * 4),  # 3 cores for each, none for the engine
        ([set(range(6))] * 3, [2] * 3),
        ([{0}, {1}], [1, 1]),  # each rank is bound to one core
        ([{0, 1, 2}, {3, 4, 5, 6}], [3, 3]),
        ([set(range(8)), set(range(8, 16))], [7, 7]),
        ([{0, 1}, {0}], [1, 1]),  # the first rank has one and a half cores
        ([{0}, {0}], [1, 1]),
    ],
)
def test_threads(cpus_of_ranks, numbers):
    assert [threads.number for threads in fit(cpus_of_ranks)] == numbers


@pytest.mark.parametrize(
    ("limits", "numbers"),
    [
        ([(1, 2.0)] * 4, [1] * 4),
        ([(1, 8.0)] * 4, [2] * 4),
        ([(1, 7.5)] * 4, [2] * 4),
        ([(1, 16.0)] * 4, [3] * 4),  # 4 CPUs for each, one of them for the engine
        ([(1, 64.0)] * 4, [15] * 4),
        ([(rank, 2.0) for rank in range(4)], [2] * 4),  # each rank is in its own container
        ([(1, 2.0), (1, 2.0), None, (2, 0.5)], [1, 1, 15, 1]),
    ],
)
def test_threads_in_containers_with_a_limit(limits, numbers):
    found = fit([set(range(64))] * 4, limits=limits)
    assert [threads.number for threads in found] == numbers
    limited = [limit is not None and limit[1] < 64 for limit in limits]
    assert [" on 64 cores with time for " in threads.text for threads in found] == limited


def test_hyperthreads_are_one_core():
    threads = fit([set(range(8))] * 2, core_of=lambda cpu: cpu % 4)[0]
    assert (threads.number, threads.text) == (2, "2 threads per rank (2 on 4 cores)")


def test_cores_of_this_machine():
    assert fit_threads([os.sched_getaffinity(0)] * 1000, 0, {}).number == 1


@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "MKL_NUM_THREADS"])
def test_the_users_number_of_threads_stays(name):
    threads = fit([{0, 1}] * 2, {name: "5"})[0]
    assert threads.number is None and f"{name}=5" in threads.text


def test_binding_that_leaves_cores_idle():
    cores = set(range(8))
    assert [threads.warning for threads in fit([cores] * 2, cpus_of_launcher=cores)] == [None, None]
    warning = fit([{0}, {1}], cpus_of_launcher=cores)[0].warning
    assert "2 rank(s)" in warning and "2 of its 8 cores;" in warning and "--bind-to none" in warning
    warning = fit([{0}, {0}], {"OMP_NUM_THREADS": "1"}, cpus_of_launcher=cores)[0].warning
    assert "1 of its 8 cores (several to one core)" in warning


@pytest.mark.parametrize(
    ("cpus_of_ranks", "cpus_of_launcher", "limits", "number"),
    [
        ([{0, 1}] * 4, set(), [None] * 4, 2),
        ([{0}, {0}, {0}], {0, 1, 2, 3}, [None] * 3, 4),  # bound to one core by the launcher, which can use four
        ([{0}, {1}], set(), [None] * 2, 2),
        ([set(range(8))] * 3, set(), [(7, 1.5)] * 3, 2),  # in a container with the time of one CPU and a half
        ([set(range(8))] * 3, set(), [(7, 1.0), (8, 1.0), (9, 1.0)], 3),  # in a container each
        ([set(range(8))] * 2, set(), [(7, 1.0), None], 8),
    ],
)
def test_usable_cores(cpus_of_ranks, cpus_of_launcher, limits, number):
    assert num_usable_cores(cpus_of_ranks, cpus_of_launcher, limits, lambda cpu: cpu) == number


RANK = """
import ctypes, sys, threading, time
name = sys.argv[1].encode()
threading.Thread(target=lambda: (ctypes.CDLL(None).prctl(15, name), time.sleep(60)), daemon=True).start()
time.sleep(0.2)
print("ready", flush=True)
while sys.argv[2] == "busy" or time.sleep(60):
    pass
"""


@pytest.mark.parametrize(("thread", "load"), [("dtrain-stalls", "busy"), ("dtrain-stalls", "idle"), ("other", "busy")])
def test_ranks_of_another_job(thread, load):
    """Processes with the thread that ranks have, which compute on the same cores, are found."""
    cpus = os.sched_getaffinity(0)
    with subprocess.Popen([sys.executable, "-S", "-c", RANK, thread, load], stdout=subprocess.PIPE) as other:
        try:
            assert other.stdout.readline() == b"ready\n"
            looks = [other.pid in find_other_ranks(set(), cpus) for _ in range(3)]  # others may leave it no time
            assert any(looks) == ((thread, load) == ("dtrain-stalls", "busy"))
            assert other.pid not in find_other_ranks({other.pid}, cpus)
            assert other.pid not in find_other_ranks(set(), {max(cpus) + 1})
        finally:
            other.kill()


@pytest.mark.slow
@pytest.mark.parametrize(("limit", "number"), [(1.0, 1), (1.2, 2), (9.0, 4)])
def test_threads_of_one_process_with_a_limit(limit, number):
    """A process without a launcher respects a limit on CPU time, which torch does not know: it is set to 4 threads."""
    code = (
        "import torch, distributed_trainer as d; from distributed_trainer.launch import host_facts\n"
        "torch.set_num_threads(4)\n"
        f"host_facts.cpu_limit = lambda: (7, {limit}); d.create_distributed_trainer(torch.nn.Linear(1, 1))\n"
        "print(torch.get_num_threads())"
    )
    environ = {name: value for name, value in os.environ.items() if "NUM_THREADS" not in name}
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1:] == [str(number)], done.stderr


def test_torch_takes_one_thread_under_mpirun_by_itself():
    """Under mpirun torch takes one thread, which is why fit_threads exists; if this fails, simplify fit_threads."""
    if not torch.backends.mkl.is_available() or torch.get_num_threads() == 1:
        pytest.skip("this torch has no MKL, or this machine one core")
    environ = {name: value for name, value in os.environ.items() if "NUM_THREADS" not in name}
    environ |= {"MPI_LOCALNRANKS": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
    command = [sys.executable, "-c", "import torch; print(torch.get_num_threads())"]
    assert subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60).stdout == "1\n"


def page_faults_of(script):
    """Return the minor page faults of 20 allocations of 64 MiB that are written to and freed, after 5 others."""
    code = f"""
import os, resource, torch
from distributed_trainer.launch.devices import keep_freed_memory
{script}
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for i in range(25):
    if i == 5:
        before = faults()
    torch.ones(16 << 20)
print(faults() - before)
"""
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


@pytest.mark.slow
def test_freed_memory_is_kept():
    """The next allocation finds its pages mapped; with DTRAIN_MALLOC=default each allocation maps them again.

    Sometimes a small allocation takes some of the freed memory, so a large one needs new memory: once, 3 of 20 did.
    """
    kept = page_faults_of("keep_freed_memory({})")
    default = page_faults_of("keep_freed_memory({'DTRAIN_MALLOC': 'default'})")
    assert default > 20 * 16000
    assert kept < default / 3
