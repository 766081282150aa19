# SPDX-License-Identifier: Apache-2.0
"""`distributed-trainer run`: becomes mpirun of a training script, with what users get wrong set right."""

from __future__ import annotations

import argparse
import fnmatch
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import host_facts, launch, library, mpirun, preflight, record, restart
from .errors import LaunchError
from .hostfile import Host, place_ranks, read_hostfile
from .library import MPILibrary

# Open MPI gives ranks on other hosts its own variables alone. These are what a script's behaviour hangs on.
FORWARDED = (
    *("DTRAIN_*", "OMP_*", "MKL_*", "KMP_*", "GOMP_*"),
    *("PYTHON*", "LD_LIBRARY_PATH", "LD_PRELOAD"),
    *("TORCH*", "PYTORCH_*", "CUDA_*", "NCCL_*", "HIP_*", "ROCR_*", "UCX_*", "FI_*"),
)
_NOT_FORWARDED = ("DTRAIN_RANK_PID", "DTRAIN_RESTARTED")  # of this process's own place in a job

# Whose presence says that a scheduler has given us hosts: Slurm, PBS, LSF, SGE, Flux.
_ALLOCATIONS = ("SLURM_JOB_NODELIST", "PBS_NODEFILE", "LSB_MCPU_HOSTS", "PE_HOSTFILE", "FLUX_URI")

_ELASTIC_RESTARTS = 3

_DESCRIPTION = """\
Becomes `mpirun -np N python SCRIPT ARGS`, with the mpirun of the MPI that the ranks will use. Sets what users have to
know otherwise; what is set in the environment already is left alone. --dry-run prints the command.

With --hostfile all hosts are asked first whether the ranks can run there, which takes 5 s at most.
"""


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Adds `run` to the command line."""
    parser = commands.add_parser(
        "run",
        help="start a script on MPI ranks",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="distributed-trainer run [-np N] [--hostfile FILE] [OPTIONS] SCRIPT [ARGS ...]",
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
        type=_positive,
        metavar="N",
        help="start the job again, at most so often, when a rank was killed or a host lost; without hosts that do not "
        f"answer. For scripts that call trainer.resume. Default: 0, with --elastic {_ELASTIC_RESTARTS}",
    )
    option(
        "--elastic",
        action="store_true",
        help="when a rank is killed the others train on (with Open MPI 5; docs/reliability.md says when). Else the job "
        "is started again, as with --restarts",
    )
    option("--dry-run", action="store_true", help="print the command and end")
    option("-m", dest="is_module", action="store_true", help="SCRIPT is a module, as for python -m")
    option("script", metavar="SCRIPT")
    option("arguments", metavar="ARGS", nargs=argparse.REMAINDER, help="belong to the script")
    parser.set_defaults(main=main)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds what `make_plan` reads."""
    option = parser.add_argument
    option("-np", "-n", dest="num_ranks", type=_positive, metavar="N", help="ranks; default: slots, GPUs or else cores")
    option("--hostfile", metavar="FILE", help="lines `name slots=2` or `name:2`")
    option("--oversubscribe", action="store_true", help="allow more ranks than the hostfile has slots")
    option(
        *("-x", "--export"),
        action="append",
        default=[],
        metavar="NAME[=VALUE]",
        help="pass on a variable, or all of a form: WANDB_*",
    )
    option("--mpirun-options", default="", metavar="...", help="more for mpirun: --mpirun-options='--bind-to numa'")
    option("--no-preflight", action="store_true", help="do not ask the hosts first")


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no number of ranks or restarts")
    return int(text)


def main(options: argparse.Namespace) -> int:
    """Becomes mpirun; returns only after --dry-run and with --restarts.

    Raises:
        ValueError, OSError: The command line or the hostfile is not what is described.
        LaunchError: The hosts are not ready, or an MPI launcher has started this.
        MPINotFoundError: There is no MPI library, no mpirun for it, or none that this package was built for.
    """
    _check_command(options)
    variables = {}
    if options.log_dir or (sys.stdout is not None and sys.stdout.isatty()):
        variables |= {} if "PYTHONUNBUFFERED" in os.environ else {"PYTHONUNBUFFERED": "1"}  # show lines as they come
    if options.log_dir and options.elastic:
        variables[launch.LOG_DIRECTORY] = options.log_dir
    if options.restarts is None:
        options.restarts = _ELASTIC_RESTARTS if options.elastic else 0
    if options.restarts:
        variables[record.VARIABLE] = str(restart.record_path(has_hosts=bool(options.hostfile)))
    script = None if options.is_module else options.script
    words = [*(["-m"] if options.is_module else []), options.script, *options.arguments]
    wrapper = launch.redirection(options.log_dir, "rank-${OMPI_COMM_WORLD_RANK:-$PMI_RANK}")
    plan = make_plan(options, words, script, variables, wrapper, options.elastic)
    command = plan.make_command(plan.hosts)
    line = shlex.join(command)
    for warning in plan.warnings:
        print(f"distributed_trainer: {warning}", file=sys.stderr)
    if options.dry_run:
        print(*(f"{name}={shlex.quote(value)}" for name, value in plan.variables.items()), line)
        return 0
    environment = {**os.environ, **plan.variables}
    if options.restarts:
        return restart.supervise(plan.make_command, plan.hosts, plan.find_lost, environment, options.restarts)
    print(f"distributed_trainer: running {line}", file=sys.stderr, flush=True)
    os.execve(command[0], command, environment)


@dataclass(frozen=True)
class Plan:
    """How to start mpirun."""

    make_command: Callable[[Sequence[Host] | None], list[str]]
    """Gives its command line on some hosts."""
    hosts: list[Host] | None
    """With their ranks as slots; None without a hostfile."""
    request: preflight.Request | None
    """What ranks need on each host."""
    variables: dict[str, str]
    """To be set for it."""
    warnings: list[str]
    """What may not be meant, though it starts."""

    def find_lost(self, hosts: Sequence[Host]) -> dict[str, str]:
        """Asks hosts again: those that do not answer, and why. Takes 5 s at most."""
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
    """Finds MPI, asks the hosts, and says what to start.

    Args:
        options: With what `add_options` adds.
        words: Python's arguments, for each rank.
        script: A file that must be on each host. None: words[1] is a module that must.
        variables: To be set for all ranks.
        wrapper: What is to start Python on each rank.
        is_elastic: A rank that is killed is not to end the job, if MPI can have that.

    Raises:
        As `main`.
    """
    library.load_engine()
    mpi = library.loaded_mpi()
    assert mpi is not None
    program = mpirun.find_mpirun(mpi)
    fault_tolerance: list[str] = []
    if is_elastic:
        fault_tolerance, settings = mpirun.elastic_settings(mpi)
        variables = {**variables, **settings}
    variables = {**variables, **dict(word.split("=", 1) for word in options.export if "=" in word)}
    forwarded = select_variables({**os.environ, **variables}, options.export)
    num_ranks, hosts, request, warnings = options.num_ranks, None, None, []
    if options.hostfile:
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
    """Whether a scheduler has given us hosts: mpirun asks it for them and their slots."""
    return any(name in os.environ for name in _ALLOCATIONS)


def _check_command(options: argparse.Namespace) -> None:
    launcher = launch.find_launcher(os.environ)
    if launcher is not None:
        raise LaunchError(
            f"`distributed-trainer run` starts mpirun itself, but {launcher.name} has started it. Leave out one."
        )
    if options.script == "python" or (options.script.startswith("python3") and not os.path.exists(options.script)):
        raise ValueError(f"leave out `{options.script}`: the script is run by {sys.executable}")
    if not options.is_module and not os.path.exists(options.script):
        raise ValueError(f"there is no {options.script} in {os.getcwd()}")
    if ":" in options.arguments:
        raise ValueError("an argument ':' cannot be passed on: for mpirun it ends the script's arguments")


def select_variables(environ: Mapping[str, str], exports: Sequence[str]) -> dict[str, str]:
    """Picks the variables that ranks on other hosts are given.

    Raises:
        ValueError: One that is asked for by -x is not set.
    """
    wanted = [word.partition("=")[0] for word in exports]
    for pattern in wanted:
        if not fnmatch.filter(environ, pattern):
            raise ValueError(f"-x {pattern}: no such variable is set. Set it, or write -x {pattern}=VALUE.")
    patterns = [*FORWARDED, *wanted]
    return {
        name: value
        for name, value in sorted(environ.items())
        if name.isidentifier()  # bash's functions are not
        and name not in _NOT_FORWARDED
        and any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
    }


def _request(
    mpi: MPILibrary, program: str, words: Sequence[str], script: str | None, forwarded: Mapping[str, str]
) -> preflight.Request:
    """What the ranks will need on each host."""
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
    """Returns the ranks of each host, the variables for mpirun, and warnings."""
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
    # Both MPIs understand this list, where their hostfiles differ.
    words = ["--host" if family == "openmpi" else "-hosts"] if hosts else []
    words += [",".join(f"{host.name}:{host.slots}" for host in hosts)] if hosts else []
    if family == "openmpi":  # MPICH passes on all variables
        words += [word for name in forwarded for word in ("-x", name)]
    if options.tag_output:
        words.append("--tag-output" if family == "openmpi" else "-prepend-rank")
    return words + shlex.split(options.mpirun_options)
