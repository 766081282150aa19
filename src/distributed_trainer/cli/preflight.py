# SPDX-License-Identifier: Apache-2.0
"""Ask all hosts over ssh, before mpirun starts, whether ranks can run there: mpirun would hang or report little.

All hosts run `host_facts.py` in parallel. All problems are reported at once, for each host, with the remedy.
"""

from __future__ import annotations

import inspect
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import LaunchError
from ..launch import host_facts

LIMIT_SECONDS = 5.0
_MAX_PROBLEMS = 12  # so many fit on a screen
_SILENT = f"does not answer within {LIMIT_SECONDS:.0f} s. Is it up? See `{{shell}} {{name}} true`"
MARK = "distributed_trainer facts: "  # marks the line with the facts, since login scripts may print lines, too
_MAX_BYTES = 1 << 20  # a host's output beyond this is not read


@dataclass(frozen=True)
class Request:
    """Things that the ranks will need on each host."""

    python: str
    """Path of the Python interpreter."""
    mpi_path: str
    """Path of the MPI library."""
    mpi_family: str
    """`MPILibrary.family` of this library."""
    folder: str
    """Folder in which mpirun is called."""
    files: Sequence[str]
    """Files that must exist: the script, mpirun's helper program."""
    module: str | None
    """Module that must exist; None if the ranks run a script."""
    environment: Mapping[str, str]
    """Variables that the ranks will have."""


class HostsNotReadyError(LaunchError):
    """Error for hosts on which ranks could not run; `problems` has a line for each cause."""

    def __init__(self, title: str, problems: list[str]) -> None:
        self.problems = problems
        shown = problems[:_MAX_PROBLEMS]
        shown += [f"... and {len(problems) - len(shown)} more"] if len(problems) > len(shown) else []
        lines = "".join(f"\n  {problem}" for problem in shown)
        super().__init__(f"the hosts of {title} are not ready, so mpirun was not started:{lines}")


def remote_shell(family: str, environ: Mapping[str, str]) -> list[str]:
    """Return the command by which an MPI starts its processes on other hosts: ssh, unless its variables name another.

    Local.
    """
    if family == "openmpi":
        agents = ["PRTE_MCA_plm_ssh_agent", "OMPI_MCA_plm_ssh_agent", "OMPI_MCA_plm_rsh_agent"]
        arguments = ["PRTE_MCA_plm_ssh_args", "OMPI_MCA_plm_ssh_args", "OMPI_MCA_plm_rsh_args"]
    else:
        agents, arguments = ["HYDRA_LAUNCHER_EXEC"], ["HYDRA_LAUNCHER_EXTRA_ARGS"]
    # In a list such as "ssh : rsh" Open MPI takes the first program that is installed.
    named = next((environ[name] for name in agents if name in environ), "ssh")
    choices = [shlex.split(choice) for choice in named.split(" : ")]
    command = next((choice for choice in choices if shutil.which(choice[0])), choices[0])
    command += shlex.split(next((environ[name] for name in arguments if name in environ), ""))
    if os.path.basename(command[0]) == "ssh":  # ssh must not ask for a password, which nobody would see
        command += ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={LIMIT_SECONDS - 1:.0f}"]
    return command


def check_hosts(title: str, names: Sequence[str], request: Request) -> dict[str, dict[str, Any]]:
    """Ask all hosts, and raise if some are not ready. Takes `LIMIT_SECONDS` at most.

    Args:
        title: Name of the hosts together in the error, such as the hostfile's.
        names: Names of the hosts, as mpirun gets them.
        request: Things that each host must have.

    Returns:
        The facts of each host; see `host_facts`.

    Raises:
        HostsNotReadyError: A host is not ready. The message says for each host what is wrong and what to do.
    """
    answers = ask_hosts(names, remote_shell(request.mpi_family, os.environ), request)
    if problems := find_problems(answers, request):
        raise HostsNotReadyError(title, problems)
    return {name: answer for name, answer in answers.items() if not isinstance(answer, str)}


def ask_hosts(names: Sequence[str], shell: Sequence[str], request: Request) -> dict[str, dict[str, Any] | str]:
    """Ask all hosts at once. Takes `LIMIT_SECONDS` at most.

    Returns:
        For each name the host's facts (see `host_facts`), or a text that says why there are none and what to do.
    """
    deadline = time.monotonic() + LIMIT_SECONDS
    answers: dict[str, dict[str, Any] | str] = {}

    def ask(name: str) -> None:
        answers[name] = _ask(name, shell, request, deadline)

    # The threads are daemons, so that one that still waits for a name server does not keep this process alive.
    threads = [threading.Thread(target=ask, args=(name,), daemon=True) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline + 0.1 - time.monotonic()))
    return {name: answers.get(name, _SILENT.format(shell=shlex.join(shell), name=name)) for name in names}


def _ask(name: str, shell: Sequence[str], request: Request, deadline: float) -> dict[str, Any] | str:
    command = ["sh"] if is_this_machine(name) else [*shell, name, "sh"]
    with tempfile.TemporaryFile() as script, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        # These are files, not pipes: a connection that ssh keeps open for its next call would keep a pipe open, too.
        script.write(_script(request).encode())
        script.seek(0)
        try:
            process = subprocess.Popen(command, stdin=script, stdout=out, stderr=err, start_new_session=True)
        except OSError as error:
            return f"could not be asked ({error}). Install ssh (on Debian `apt install openssh-client`)"
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            pass
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        out.seek(0)
        err.seek(0)
        output, words = out.read(_MAX_BYTES), err.read(_MAX_BYTES).decode(errors="replace").strip()
    return read_answer(output, request) or _why_silent(name, shlex.join(shell), words, process.returncode)


def read_answer(output: bytes, request: Request) -> dict[str, Any] | str | None:
    """Find the result of `host_facts` in the output of a host. Local.

    Returns:
        The facts, or a text that says what is wrong, or None if the output has neither.
    """
    text = output.decode(errors="replace")
    for line in text.splitlines():
        if line.startswith(MARK):
            facts: dict[str, Any] | None
            try:
                facts = json.loads(line[len(MARK) :])
            except (ValueError, RecursionError):
                facts = None
            if host_facts.is_like_facts(facts):
                return facts
            return f"gave a damaged answer ({line[len(MARK) :][:80]!r}). Does a login script print there?"
    if "no-python" in text.split():
        return (
            f"has no {request.python}. The same Python environment must lie at the same path on every host: install it "
            f"there, or share its folder"
        )
    return None


def _script(request: Request) -> str:
    """Return a script for the standard input of `sh`, which avoids the quoting rules of login shells."""
    exports = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in request.environment.items())
    arguments = (request.mpi_path, request.mpi_family, list(request.files), request.module)
    python = shlex.quote(request.python)
    return (
        f"{exports}cd {shlex.quote(request.folder)} 2>/dev/null\n"
        f"[ -x {python} ] || {{ echo no-python; exit; }}\n"
        f"exec {python} - <<'END OF FACTS'\n{inspect.getsource(host_facts)}\n"
        f"import json\nprint({MARK!r} + json.dumps(host_facts(*{arguments!r})))\nEND OF FACTS\n"
    )


# Text in ssh's output, its meaning, and the remedy; NAME stands for the host.
_WORDS_OF_SSH = (
    ("Permission denied", "refuses this user's key", "Let it in: `ssh-copy-id NAME`"),
    (
        "Host key verification failed",
        "has a new or changed host key",
        "Call `ssh NAME` and answer its question; if the key has changed, first call `ssh-keygen -R NAME`",
    ),
    ("Could not resolve hostname", "has an unknown name", "Correct it in the hostfile, or add it to /etc/hosts"),
    ("Connection refused", "runs no ssh server", "Install one there (on Debian `apt install openssh-server`)"),
    ("timed out", "does not answer", "Is it up, and is its port 22 open?"),
    ("No route to host", "does not answer", "Is it up?"),
)


def _why_silent(name: str, shell: str, words: str, exit_code: int) -> str:
    if exit_code == -signal.SIGKILL:  # `_ask` killed it after the timeout
        return _SILENT.format(shell=shell, name=name)
    last = words.splitlines()[-1].strip().rstrip(".") if words else f"exit code {exit_code}"
    for sign, cause, remedy in _WORDS_OF_SSH:
        if sign in words:
            return f"{cause} ({last}). {remedy.replace('NAME', name)}"
    return f"could not be asked ({last}). See `{shell} {name} true`"


def is_this_machine(name: str) -> bool:
    """Return whether a name is this machine's, so that mpirun would start its ranks without ssh."""
    own = os.uname().nodename
    if name in ("localhost", own, own.partition(".")[0]):
        return True
    try:
        kind, _, _, _, address = socket.getaddrinfo(name, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(kind, socket.SOCK_STREAM) as probe:
            probe.bind(address)  # works only for addresses of this machine
    except OSError:
        return False
    return True


def find_problems(answers: Mapping[str, dict[str, Any] | str], request: Request) -> list[str]:
    """Return the problems that keep ranks from running on these hosts together, each with its remedy. Local."""
    problems = [f"{name} {answer}" for name, answer in answers.items() if isinstance(answer, str)]
    facts = {name: answer for name, answer in answers.items() if not isinstance(answer, str)}
    for name, fact in facts.items():
        if fact["missing"]:
            what = ", ".join(fact["missing"])
            problems.append(f"{name} lacks {what}. Copy it there, to the same path, or share the folder.")
        for key, title, remedy in (
            ("torch", "torch", f"{request.python} -m pip install torch"),
            ("package", "distributed_trainer", f"{request.python} -m pip install distributed_trainer"),
        ):
            if fact[key] is None:
                problems.append(f"{name} has no {title} for {request.python}. Install it there: `{remedy}`.")
        # (On this machine `mpirun.home_folder` sets HOME.)
        if request.mpi_family == "openmpi" and not (fact["has_home"] or is_this_machine(name)):
            problems.append(
                f"{name} has no HOME, without which Open MPI's daemon crashes. ssh sets HOME; make the program that "
                f"replaces ssh set it, too."
            )
        if fact["mpi"] is None:
            problems.append(f"{name} has no {request.mpi_path} that loads. Install the same MPI there.")
    problems += _differences(facts, request)
    problems += _equal_names(facts, request)
    return problems


def _differences(facts: Mapping[str, dict[str, Any]], request: Request) -> list[str]:
    problems = []
    pip = f"{request.python} -m pip install"
    for key, path, title, remedy in (
        ("python", "python", "Python", "Use environments of the same Python"),
        ("torch", "torch", "torch", f"Install one version on all, such as `{pip} torch=={{first}}`"),
        ("package", "package", "distributed_trainer", "Install the same one on all, or share its folder"),
        ("engine", "package", "the engine of distributed_trainer", "Install the same wheel on all"),
        ("mpi", "mpi", "the MPI library", "Install the same one on all"),
    ):
        hosts_of: dict[str, list[str]] = {}
        for name, fact in facts.items():
            if (value := fact[key]) is not None:
                # The part of torch's version after the + names the devices that it was built for; it may differ.
                hosts_of.setdefault(value.partition("+")[0] if key == "torch" else value, []).append(name)
        if len(hosts_of) > 1:
            parts = [
                f"{_list(names)} {'has' if len(names) == 1 else 'have'} {value} ({facts[names[0]]['paths'][path]})"
                for value, names in hosts_of.items()
            ]
            problems.append(f"{title} differs: {', '.join(parts)}. {remedy.format(first=next(iter(hosts_of)))}.")
    return problems


def _equal_names(facts: Mapping[str, dict[str, Any]], request: Request) -> list[str]:
    problems = []
    by_machine: dict[tuple[str, ...], list[str]] = {}
    by_name: dict[str, list[str]] = {}
    for name, fact in facts.items():
        machine = by_machine.setdefault(tuple(fact["machine"]), [])
        machine.append(name)
        if len(machine) == 1:
            by_name.setdefault(fact["name"], []).append(name)
    for names in by_machine.values():
        if len(names) > 1:
            problems.append(f"{_list(names)} are names of one machine. Write one of them, with the sum of the slots.")
    for own, names in by_name.items():
        if len(names) > 1 and request.mpi_family == "openmpi":  # MPICH does not mind
            problems.append(
                f"{_list(names)} all have the host name {own} (`uname -n`). Open MPI would take them for one machine "
                f"and wait for ever. Give each its own name: `hostnamectl set-hostname NAME` there."
            )
    return problems


def _list(names: Sequence[str]) -> str:
    shown = ", ".join(names[:8])
    return shown if len(names) <= 8 else f"{shown} and {len(names) - 8} more"
