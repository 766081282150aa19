# SPDX-License-Identifier: Apache-2.0
"""`distributed-trainer check`: says on one screen whether ranks will work together here, and what to mend.

Under an MPI launcher each process is a rank of the check. Otherwise it starts such ranks itself, and reports that they
did not come up as well.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from typing import Any

from . import host_facts, launch, mpi_environment, run
from .check_report import make_report, problem, render
from .errors import DistributedTrainerError
from .preflight import HostsNotReadyError

_START_SECONDS = 30  # for ranks whose Python has imported everything to reach each other
_LIMIT_SECONDS = 180  # for all of it: importing torch takes a while on a cold file system


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Adds `check` to the command line."""
    parser = commands.add_parser(
        "check",
        help="look whether ranks will work together here, and what to mend",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    run.add_options(parser)
    parser.add_argument("--json", action="store_true", help="print the report for scripts")
    parser.set_defaults(main=main, tag_output=False)


def main(options: argparse.Namespace) -> int:
    """Prints the report; returns 1 if something will not work, else 0.

    Raises:
        ValueError, OSError: The command line or the hostfile is not what is described.
        LaunchError: A rank has started this process, outside of its job.
    """
    launcher = launch.find_launcher(os.environ)
    report = _start_ranks(options) if launcher is None else _be_rank(launcher, options.json)
    return 0 if report is None else _print(report, options.json)


def _print(report: dict[str, Any], as_json: bool) -> int:
    print(json.dumps(report) if as_json else render(report), flush=True)
    return 1 if any(item["is_fatal"] for item in report["problems"]) else 0


def _be_rank(launcher: launch.Launcher, as_json: bool) -> dict[str, Any] | None:
    """Collective over all ranks of the launch. Returns the report on rank 0, None on others.

    Every rank of a failed start gets a report, with the cause, unless that is the same on all. They come to print it
    one after the other, so that the first to end ends the job before the others speak, which srun does not do.

    Raises:
        SystemExit: Rank 0 prints what is wrong.
    """
    from . import check_ranks, job  # which import torch

    alarm = threading.Timer(_START_SECONDS, _give_up, args=(launcher, as_json))
    alarm.daemon = True
    alarm.start()
    try:
        started = job.start(None, None)
        facts = check_ranks.gather_facts(started, launcher, mpi_environment.is_apart(launcher))
    except DistributedTrainerError as error:
        time.sleep(min(0.5 * launcher.rank, 2.0))
        if error.is_for_rank_0 and launcher.rank > 0:
            sys.exit(1)
        return {"problems": [problem(str(error), is_fatal=True)]}
    finally:
        alarm.cancel()
    cuda_awareness = check_ranks.gather_cuda_awareness(started)
    speed = check_ranks.measure(started)
    return make_report(facts, cuda_awareness, speed) if started.rank == 0 else None


def _give_up(launcher: launch.Launcher, as_json: bool) -> None:
    time.sleep(min(0.5 * launcher.rank, 2.0))
    text = (
        f"rank {launcher.rank} on {os.uname().nodename} has waited {_START_SECONDS} s in MPI_Init or its first "
        f"exchange. A firewall stands between the hosts, or MPI has chosen a network that others don't reach "
        f"(docker's bridge, a VPN). Name the right one. Open MPI: OMPI_MCA_btl_tcp_if_include=10.0.0.0/24 and "
        f"PRTE_MCA_prte_if_include=10.0.0.0/24. MPICH: `-iface eth0`."
    )
    _print({"problems": [problem(text, is_fatal=True)]}, as_json)
    os._exit(1)  # MPI would wait for the others


def _start_ranks(options: argparse.Namespace) -> dict[str, Any]:
    if not options.hostfile and options.num_ranks is None and not run.is_in_allocation():
        options.num_ranks = host_facts.num_gpus() or min(max(host_facts.num_cores(), 2), 4)
    try:
        plan = run.make_plan(options, ["-m", __package__, "check", "--json"], None, {})
    except HostsNotReadyError as error:
        return {"problems": [problem(text, is_fatal=True) for text in error.problems]}
    except DistributedTrainerError as error:
        return {"problems": [problem(str(error), is_fatal=True)]}
    environ = {**os.environ, **plan.variables}
    process = subprocess.Popen(
        plan.make_command(plan.hosts),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environ,
        start_new_session=True,
        text=True,
        errors="replace",
    )
    try:
        output, errors = process.communicate(timeout=_LIMIT_SECONDS)
        end = f"ended with {process.returncode}"
    except subprocess.TimeoutExpired:
        _end(process)
        output, errors = process.communicate()
        end = f"did not end within {_LIMIT_SECONDS} s"
    except BaseException:  # Ctrl-C
        _end(process)
        raise
    warnings = [problem(text) for text in plan.warnings]
    for line in output.splitlines():
        with contextlib.suppress(ValueError):
            if line.startswith("{"):
                report = json.loads(line)
                known = {item["text"] for item in report["problems"]}
                report["problems"] += [item for item in warnings if item["text"] not in known]
                return report
    words = [line for line in (output + errors).splitlines() if line.strip(" -=")]
    text = f"mpirun {end}, and no rank has reported. Its last words:" + "".join(f"\n    {w}" for w in words[-12:])
    return {"problems": [problem(text, is_fatal=True), *warnings]}


def _end(process: subprocess.Popen[str]) -> None:
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(3)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
