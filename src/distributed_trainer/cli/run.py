# SPDX-License-Identifier: Apache-2.0
"""`distributed-trainer run`: starts a training script by mpirun, with settings that users need not know."""

from __future__ import annotations

import argparse
import fnmatch
import functools
import os
import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import LaunchError
from ..launch import host_facts, job_record, mpi_library, mpirun, stall_limits
from ..launch.launcher import find_launcher
from ..launch.mpi_library import MPILibrary
from ..launch.relaunch import LOG_DIRECTORY, redirection
from . import preflight, supervisor
from .hostfile import Host, place_ranks, read_hostfile

# Variables that a script's behaviour may depend on. Open MPI by itself passes only its own to ranks on other hosts.
FORWARDED = (
    *("DTRAIN_*", "OMP_*", "MKL_*", "KMP_*", "GOMP_*"),
    *("PYTHON*", "LD_LIBRARY_PATH", "LD_PRELOAD"),
    *("TORCH*", "PYTORCH_*", "CUDA_*", "NCCL_*", "HIP_*", "ROCR_*", "UCX_*", "FI_*"),
)
_NOT_FORWARDED = ("DTRAIN_RANK_PID", "DTRAIN_RESTARTED")  # they describe this process's own place in a job

# Variables that are set if a scheduler has given us hosts: Slurm, PBS, LSF, SGE, Flux.
_ALLOCATIONS = ("SLURM_JOB_NODELIST", "PBS_NODEFILE", "LSB_MCPU_HOSTS", "PE_HOSTFILE", "FLUX_URI")

_ELASTIC_RESTARTS = 3

_DESCRIPTION = """\
Runs `mpirun -np N python SCRIPT ARGS`, with the mpirun of the MPI that the ranks will use. Sets the variables that
users would otherwise need to know, except those that the environment sets already. --dry-run prints the command.

With --hostfile all hosts are first asked whether the ranks can run there, which takes 5 s at most.
"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `run` to the command line."""
    parser = commands.add_parser(
        "run",
        help="start a script on MPI ranks",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_options(parser)
    option = parser.add_argument
    option("--tag-output", action="store_true", help="put the rank before each line")
    option(
        "--log-dir", metavar="DIR", help="write each rank's output to DIR/rank-N.log, on its host, not to the terminal"
    )
    option(
        "--restarts",
        type=functools.partial(_positive, "the number of restarts"),
        metavar="N",
        help="start the job again, at most N times, when a rank was killed or a host lost; hosts that do not answer "
        f"are left out. For scripts that call trainer.resume. Default: 0, with --elastic {_ELASTIC_RESTARTS}",
    )
    option(
        "--elastic",
        action="store_true",
        help="when a rank is killed, the others continue to train (with Open MPI 5; docs/reliability.md says when). "
        "Otherwise the job is started again, as with --restarts",
    )
    option(
        "--stall-report",
        type=_seconds,
        metavar="S",
        help=f"report a rank for which others have waited for S seconds, and where it is. Default: 5 "
        f"({stall_limits.REPORT_VARIABLE})",
    )
    option(
        "--stall-timeout",
        type=_seconds,
        metavar="S",
        help=f"end the job when a rank is stopped or does not answer for S seconds. Default: 600 "
        f"({stall_limits.TIMEOUT_VARIABLE})",
    )
    option("--dry-run", action="store_true", help="print the command and end")
    option(
        "--verbose",
        action="store_true",
        help="print the command, and show what mpirun prints after a rank's exception",
    )
    option("-m", dest="is_module", action="store_true", help="SCRIPT is a module, as for python -m")
    option("script", metavar="SCRIPT")
    # There may be none, which Python 3.10 and 3.11 would not allow for in the message about a missing script.
    option("arguments", metavar="ARGS", nargs=argparse.REMAINDER, help="belong to the script").required = False
    parser.set_defaults(main=main, parser=parser)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that `make_plan` reads."""
    option = parser.add_argument
    option(
        *("-np", "-n"),
        dest="num_ranks",
        type=functools.partial(_positive, "the number of ranks"),
        metavar="N",
        help="ranks; default: slots, GPUs or else cores",
    )
    option("--hostfile", metavar="FILE", help="lines `name slots=2` or `name:2`")
    option("--oversubscribe", action="store_true", help="allow more ranks than the hostfile has slots")
    option(
        *("-x", "--export"),
        action="append",
        default=[],
        metavar="NAME[=VALUE]",
        help="pass a variable to the ranks, or all that match a pattern: WANDB_*",
    )
    option("--mpirun-options", default="", metavar="...", help="options for mpirun: --mpirun-options='--bind-to numa'")
    option("--no-preflight", action="store_true", help="do not ask the hosts first")


def _positive(name: str, text: str) -> int:
    if not re.fullmatch("[0-9]*[1-9][0-9]*", text):
        raise argparse.ArgumentTypeError(f"{name} must be a whole number of at least 1, not {text!r}")
    return int(text)


def _seconds(text: str) -> str:
    try:
        stall_limits.parse_seconds("it", text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def main(options: argparse.Namespace) -> int:
    """Run mpirun; return its exit code, or that of the last restart.

    Raises:
        ValueError, OSError: The command line or the hostfile is wrong.
        LaunchError: The hosts are not ready, or an MPI launcher has started this process.
        MPINotFoundError: There is no MPI library, no mpirun for it, or none that this package was built for.
    """
    _check_command(options)
    variables: dict[str, str] = {}
    if options.log_dir or (sys.stdout is not None and sys.stdout.isatty()):
        variables |= {} if "PYTHONUNBUFFERED" in os.environ else {"PYTHONUNBUFFERED": "1"}  # show lines at once
    if options.log_dir and options.elastic:
        variables[LOG_DIRECTORY] = options.log_dir
    if options.stall_report:
        variables[stall_limits.REPORT_VARIABLE] = options.stall_report
    if options.stall_timeout:
        variables[stall_limits.TIMEOUT_VARIABLE] = options.stall_timeout
    if options.restarts is None:
        options.restarts = _ELASTIC_RESTARTS if options.elastic else 0
    if options.restarts:
        variables[job_record.VARIABLE] = str(supervisor.record_path(has_hosts=options.hostfile is not None))
    script = None if options.is_module else options.script
    words = [*(["-m"] if options.is_module else []), options.script, *options.arguments]
    wrapper = redirection(options.log_dir, "rank-${OMPI_COMM_WORLD_RANK:-$PMI_RANK}")
    plan = make_plan(options, words, script, variables, wrapper, options.elastic)
    command = plan.make_command(plan.hosts)
    for warning in plan.warnings:
        print(f"distributed_trainer: {warning}", file=sys.stderr)
    if options.dry_run:
        print(*(f"{name}={shlex.quote(value)}" for name, value in plan.variables.items()), shlex.join(command))
        return 0
    environment = {**os.environ, **plan.variables}
    if options.restarts:
        return supervisor.supervise(
            plan.make_command, plan.hosts, plan.find_lost, environment, options.restarts, options.verbose
        )
    return supervisor.run_mpirun(command, environment, options.verbose)[0]


@dataclass(frozen=True)
class Plan:
    """Plan for a start of mpirun."""

    make_command: Callable[[Sequence[Host] | None], list[str]]
    """Function that returns mpirun's command line for some hosts."""
    hosts: list[Host] | None
    """Hosts with their numbers of ranks as slots; None without a hostfile."""
    request: preflight.Request | None
    """Things that ranks need on each host; None without a hostfile."""
    variables: dict[str, str]
    """Variables to set for mpirun."""
    warnings: list[str]
    """Lines about settings that work, but may not be intended."""

    def find_lost(self, hosts: Sequence[Host]) -> dict[str, str]:
        """Ask hosts again; return those that do not answer, each with the reason. Takes 5 s at most."""
        assert self.request is not None
        shell = preflight.remote_shell(self.request.mpi_family, os.environ)
        answers = preflight.ask_hosts([host.name for host in hosts], shell, self.request)
        return {name: answer for name, answer in answers.items() if isinstance(answer, str)}


def make_plan(
    options: argparse.Namespace,
    words: Sequence[str],
    script: str | None,
    variables: Mapping[str, str],
    wrapper: Sequence[str] = (),
    is_elastic: bool = False,
) -> Plan:
    """Find MPI, ask the hosts, and plan the start.

    Args:
        options: Command line with the options of `add_options`.
        words: Arguments of Python on each rank.
        script: File that each host must have. None if each must have the module `words[1]`.
        variables: Variables to set for all ranks.
        wrapper: Command line that starts Python on each rank; empty for none.
        is_elastic: Whether the job shall continue when a rank is killed, if this MPI can do that.

    Raises:
        ValueError, OSError: The hostfile or an option is wrong.
        LaunchError: The hosts are not ready.
        MPINotFoundError: There is no MPI library, no mpirun for it, or none that this package was built for.
    """
    mpi_library.load_engine()
    mpi = mpi_library.loaded_mpi()
    assert mpi is not None
    program = mpirun.find_mpirun(mpi)
    fault_tolerance: list[str] = []
    if is_elastic:
        fault_tolerance, settings = mpirun.elastic_settings(mpi)
        variables = {**variables, **settings}
    variables = {**variables, **dict(word.split("=", 1) for word in options.export if "=" in word)}
    forwarded = select_variables({**os.environ, **variables}, options.export)
    num_ranks, hosts, request = options.num_ranks, None, None
    warnings: list[str] = []
    if options.hostfile is not None:
        request = _request(mpi, program, words, script, forwarded)
        hosts, settings, warnings = _prepare_hosts(options, request, is_elastic)
    elif is_in_allocation():
        settings = mpirun.mpirun_environment_for_hosts(is_crowded=False, has_cards=True, is_elastic=is_elastic)
    else:
        forwarded = {}
        num_ranks = num_ranks or host_facts.num_gpus() or host_facts.num_cores()
        settings = mpirun.mpirun_environment(num_ranks)
        warnings += host_facts.warn_of_shared_memory(mpi.family, num_ranks, host_facts.free_shared_memory())
    if mpi.family == "openmpi":
        variables |= settings

    def make_command(on: Sequence[Host] | None) -> list[str]:
        count = num_ranks if on is None else sum(host.slots or 0 for host in on)
        command = [program, *fault_tolerance, *_mpirun_options(options, mpi.family, on, forwarded)]
        return [*command, *(["-np", str(count)] if count else []), *wrapper, sys.executable, *words]

    return Plan(make_command, hosts, request, variables, warnings)


def is_in_allocation() -> bool:
    """Return whether a scheduler has given us hosts; if so, mpirun asks the scheduler for them and their slots."""
    return any(name in os.environ for name in _ALLOCATIONS)


def _check_command(options: argparse.Namespace) -> None:
    launcher = find_launcher(os.environ)
    if launcher is not None:
        raise LaunchError(
            f"`distributed-trainer run` starts mpirun itself, but {launcher.name} has started this command. "
            f"Use only one of the two."
        )
    if options.script == "python" or (options.script.startswith("python3") and not os.path.exists(options.script)):
        raise ValueError(f"leave out `{options.script}`: the script is run by {sys.executable}")
    if not options.is_module and not os.path.exists(options.script):
        raise ValueError(f"there is no {options.script} in {os.getcwd()}")
    if ":" in options.arguments:
        raise ValueError("the script can't get an argument ':', because for mpirun it ends the script's arguments")


def select_variables(environ: Mapping[str, str], exports: Sequence[str]) -> dict[str, str]:
    """Pick the variables that ranks on other hosts get.

    Raises:
        ValueError: A variable that -x names is not set.
    """
    wanted = [word.partition("=")[0] for word in exports]
    for pattern in wanted:
        if not fnmatch.filter(environ, pattern):
            raise ValueError(f"-x {pattern}: no such variable is set. Set it, or write -x {pattern}=VALUE.")
    patterns = [*FORWARDED, *wanted]
    return {
        name: value
        for name, value in sorted(environ.items())
        if name.isidentifier()  # leaves out exported functions of bash
        and name not in _NOT_FORWARDED
        and any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
    }


def _request(
    mpi: MPILibrary, program: str, words: Sequence[str], script: str | None, forwarded: Mapping[str, str]
) -> preflight.Request:
    """Return the things that the ranks will need on each host."""
    helpers = [Path(program).parent / name for name in ("prted", "orted", "hydra_pmi_proxy")]
    files = [os.getcwd(), *([] if script is None else [os.path.abspath(script)])]
    files += [str(path) for path in helpers if path.exists()]
    return preflight.Request(
        python=sys.executable,
        mpi_path=mpi.path,
        mpi_family=mpi.family,
        folder=os.getcwd(),
        files=files,
        module=words[1] if script is None else None,
        environment=forwarded,
    )


def _prepare_hosts(
    options: argparse.Namespace, request: preflight.Request, is_elastic: bool
) -> tuple[list[Host], dict[str, str], list[str]]:
    """Return the hosts with their numbers of ranks, the variables for mpirun, and warnings."""
    hosts = read_hostfile(options.hostfile)
    is_open = hosts[0].slots is None and options.num_ranks is None
    if options.no_preflight:
        if is_open:
            raise ValueError(f"{options.hostfile} gives no slots, so --no-preflight needs -np.")
        placed = place_ranks(hosts, options.num_ranks, {}, options.oversubscribe)
        return placed, mpirun.mpirun_environment_for_hosts(False, True, is_elastic), []
    if not is_open:
        hosts = place_ranks(hosts, options.num_ranks, {}, options.oversubscribe)
    facts = preflight.check_hosts(options.hostfile, [host.name for host in hosts], request)
    room = {name: fact["gpus"] or fact["cores"] for name, fact in facts.items()}
    hosts = place_ranks(hosts, None, room)
    warnings, is_crowded = [], False
    for host in hosts:
        num_ranks, fact = host.slots or 0, facts[host.name]
        if num_ranks > fact["cores"]:
            is_crowded = True
            warnings.append(f"the {num_ranks} ranks of {host.name} share {fact['cores']} core(s)")
        warnings += host_facts.warn_of_shared_memory(
            request.mpi_family, num_ranks, fact["free_shared_memory"], host.name
        )
    has_cards = any(fact["network_cards"] for fact in facts.values())
    return hosts, mpirun.mpirun_environment_for_hosts(is_crowded, has_cards, is_elastic), warnings


def _mpirun_options(
    options: argparse.Namespace, family: str, hosts: Sequence[Host] | None, forwarded: Mapping[str, str]
) -> list[str]:
    # A list of hosts works for both MPIs, while the formats of their hostfiles differ.
    words = ["--host" if family == "openmpi" else "-hosts"] if hosts else []
    words += [",".join(f"{host.name}:{host.slots}" for host in hosts)] if hosts else []
    if family == "openmpi":  # MPICH passes all variables to the ranks
        words += [word for name in forwarded for word in ("-x", name)]
    if options.tag_output:
        words.append("--tag-output" if family == "openmpi" else "-prepend-rank")
    return words + shlex.split(options.mpirun_options)
