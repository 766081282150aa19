# SPDX-License-Identifier: Apache-2.0
"""`distributed-trainer check`: says on one screen whether ranks will work together here, and what to fix.

Under an MPI launcher each process is a rank of the check. Without one, the command itself starts such ranks, and also
reports if they do not start.
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

from ..errors import DistributedTrainerError
from ..launch import host_facts, mpi_environment
from ..launch.launcher import Launcher, find_launcher
from . import run
from .check_report import make_report, problem, render
from .preflight import HostsNotReadyError

_START_SECONDS = 30  # limit for ranks to reach each other, once their Python has imported everything
_LIMIT_SECONDS = 180  # limit for the whole check: importing torch takes long if the files are not cached


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `check` to the command line."""
    parser = commands.add_parser(
        "check",
        help="check whether ranks will work together here, and say what to fix",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    run.add_options(parser)
    parser.add_argument("--json", action="store_true", help="print the report for scripts")
    parser.set_defaults(main=main, parser=parser, tag_output=False)


def main(options: argparse.Namespace) -> int:
    """Print the report; return 1 if something will not work, else 0.

    Raises:
        ValueError, OSError: The command line or the hostfile is wrong.
        LaunchError: A rank has started this process, which is not part of the rank's job.
    """
    launcher = find_launcher(os.environ)
    report = _start_ranks(options) if launcher is None else _be_rank(launcher, options.json)
    return 0 if report is None else _print(report, options.json)


def _print(report: dict[str, Any], as_json: bool) -> int:
    print(json.dumps(report) if as_json else render(report), flush=True)
    return 1 if any(item["is_fatal"] for item in report["problems"]) else 0


def _be_rank(launcher: Launcher, as_json: bool) -> dict[str, Any] | None:
    """Return the report on rank 0, None on others. Collective over all ranks of the launch.

    If the start fails, every rank returns a report with its cause, unless the cause is the same on all ranks. They
    print their reports one after the other. Launchers except srun then end the job at the first rank that ends, before
    the others print.

    Raises:
        SystemExit: The start failed with the same error on all ranks, and this is not rank 0, which prints it.
    """
    from ..backend import job
    from . import check_ranks

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
    speed = check_ranks.measure(started)
    return make_report(facts, speed) if started.rank == 0 else None


def _give_up(launcher: Launcher, as_json: bool) -> None:
    time.sleep(min(0.5 * launcher.rank, 2.0))
    text = (
        f"rank {launcher.rank} on {os.uname().nodename} has waited {_START_SECONDS} s in MPI_Init or its first "
        f"exchange. A firewall is between the hosts, or MPI has chosen a network that other hosts don't reach "
        f"(docker's bridge, a VPN). Name the right network. Open MPI: OMPI_MCA_btl_tcp_if_include=10.0.0.0/24 and "
        f"PRTE_MCA_prte_if_include=10.0.0.0/24. MPICH: `-iface eth0`."
    )
    _print({"problems": [problem(text, is_fatal=True)]}, as_json)
    os._exit(1)  # an orderly exit would wait for the other ranks


def _start_ranks(options: argparse.Namespace) -> dict[str, Any]:
    if not options.hostfile and options.num_ranks is None and not run.is_in_allocation():
        options.num_ranks = host_facts.num_gpus() or min(max(host_facts.num_cores(), 2), 4)
    try:
        plan = run.make_plan(options, ["-m", "distributed_trainer", "check", "--json"], None, {})
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
                report: dict[str, Any] = json.loads(line)
                known = {item["text"] for item in report["problems"]}
                report["problems"] += [item for item in warnings if item["text"] not in known]
                return report
    words = [line for line in (output + errors).splitlines() if line.strip(" -=")]
    text = f"mpirun {end}, and no rank has reported. Its last lines:" + "".join(f"\n    {w}" for w in words[-12:])
    return {"problems": [problem(text, is_fatal=True), *warnings]}


def _end(process: subprocess.Popen[str]) -> None:
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(3)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
