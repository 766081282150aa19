# SPDX-License-Identifier: Apache-2.0
"""Scripts in processes forked from one that has imported torch, since the import takes nine tenths of a short test.

`mpirun -np 2 *forked.python() train.py` runs train.py as `mpirun -np 2 python train.py` does. What mpirun starts is a
client, this file run by a bare Python. It passes its arguments, environment, CPUs and files to a server, which forks
the process that runs the script. What happens to one happens to the other: the client ends with the exit code or signal
of the script, passes on the signals that it gets, and if it is killed, the server kills the script.

There are two servers, since processes forked from one have the same order of sets of strings. Ranks with an even number
come from one, ranks with an odd number from the other, so that an order that differs between ranks still shows.

A test may see one difference to a real start: libraries other than this package have read their environment variables
before. Tests of such variables start `sys.executable`.
"""

import json
import os
import signal
import socket
import sys

PASSED_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
MAX_REQUEST_BYTES = 1 << 20


# ---- the client: imports little, since each rank of each test starts one


def ask_to_run(folder: str, words: list[str]) -> None:
    """Make a server run a script, and end as the script ends."""
    rank = next((os.environ[name] for name in ("PMIX_RANK", "PMI_RANK") if name in os.environ), "0")
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.connect(f"{folder}/{int(rank) % 2}")
    files = {number: number for number in (0, 1, 2)}
    if "PMI_FD" in os.environ:  # MPICH's connection to its launcher
        files[int(os.environ["PMI_FD"])] = int(os.environ["PMI_FD"])
    request = {
        "words": words,
        "folder": os.getcwd(),
        "environment": dict(os.environ),
        "cpus": sorted(os.sched_getaffinity(0)),
        "pid": os.getpid(),
        "files": list(files),
    }
    text = json.dumps(request).encode()
    socket.send_fds(connection, [len(text).to_bytes(8, "little")], list(files))
    connection.sendall(text)
    reader = connection.makefile()
    pid = int(reader.readline())
    for number in PASSED_SIGNALS:
        signal.signal(number, lambda number, _: os.kill(pid, number))
    code = int(reader.readline() or -signal.SIGKILL)
    if code < 0:
        signal.signal(-code, signal.SIG_DFL) if -code not in (signal.SIGKILL, signal.SIGSTOP) else None
        os.kill(os.getpid(), -code)
    os._exit(code)


# ---- the server


def serve(path: str) -> None:
    """Fork a process for each request, until the pytest that started the server ends, which closes stdin."""
    import gc
    import selectors

    import_all()
    gc.collect()
    gc.freeze()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(path + ".new")
    listener.listen(64)
    os.rename(path + ".new", path)
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ)
    selector.register(0, selectors.EVENT_READ)
    clients: dict[int, socket.socket] = {}  # the client of each process that has not ended
    while True:
        for key, _ in selector.select():
            if key.fileobj == 0:
                os._exit(0)
            elif key.fileobj is listener:
                connection, _ = listener.accept()
                try:
                    request, files = receive(connection)
                except (OSError, EOFError, ValueError):  # the client was killed
                    connection.close()
                    continue
                pid = os.fork()
                if pid == 0:
                    run(request, files, [selector, listener, *clients.values()])
                    return  # to the interpreter's end
                for number in files:
                    os.close(number)
                send(connection, pid)
                clients[pid] = connection
                selector.register(connection, selectors.EVENT_READ, pid)
                selector.register(os.pidfd_open(pid), selectors.EVENT_READ, pid)
            elif isinstance(key.fileobj, int):  # the process has ended
                selector.unregister(key.fileobj)
                os.close(key.fileobj)
                connection = clients.pop(key.data)
                send(connection, os.waitstatus_to_exitcode(os.waitpid(key.data, 0)[1]))
                if connection.fileno() in selector.get_map():
                    selector.unregister(connection)
                connection.close()
            elif key.data in clients:  # the client was killed
                selector.unregister(key.fileobj)
                os.kill(key.data, signal.SIGKILL)


def send(connection: socket.socket, number: int) -> None:
    """Send a number to the client, which may have been killed."""
    try:
        connection.sendall(f"{number}\n".encode())
    except OSError:
        pass


def import_all() -> None:
    """Import what most scripts and tests import."""
    import numpy  # noqa: F401
    import pytest  # noqa: F401
    import torch
    import torch.utils.data
    import torchmetrics  # noqa: F401

    import distributed_trainer  # noqa: F401

    torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)  # imports torch._dynamo


def receive(connection: socket.socket) -> tuple[dict, list[int]]:
    """Return a client's request, and its files."""
    head, files, _, _ = socket.recv_fds(connection, 8, 8)
    left, parts = int.from_bytes(head, "little"), []
    while left:
        parts.append(connection.recv(min(left, MAX_REQUEST_BYTES)))
        if not parts[-1]:
            raise EOFError
        left -= len(parts[-1])
    return json.loads(b"".join(parts)), files


def run(request: dict, files: list[int], of_server: list) -> None:
    """Be the process that the client stands for, and run its script; `of_server` is closed."""
    import types

    import numpy as np
    import torch

    from distributed_trainer.launch import relaunch

    os.setsid()
    for opened in of_server:
        opened.close()
    # Above all numbers that are wanted, so that none is overwritten before it is moved.
    high = [os.dup2(number, 512 + index, inheritable=False) for index, number in enumerate(files)]
    for number in files:
        os.close(number)
    for number, wanted in zip(high, request["files"], strict=True):
        os.dup2(number, wanted)
        os.close(number)
    os.chdir(request["folder"])
    relaunch.START_DIRECTORY = request["folder"]
    os.environ.clear()
    os.environ.update(request["environment"])
    if set(request["cpus"]) != os.sched_getaffinity(0):
        os.sched_setaffinity(0, request["cpus"])
        torch.set_num_threads(len(request["cpus"]))
    np.random.seed()  # others than its siblings'
    own_pid, getppid = os.getpid(), os.getppid
    # A rank finds its launcher by it. A DataLoader's workers, which are forked, see by it that their rank has died.
    os.getppid = lambda: request["pid"] if os.getpid() == own_pid else getppid()
    script, *_ = sys.argv = request["words"]
    sys.orig_argv = [sys.executable, *sys.argv]
    folders = [folder for folder in request["environment"].get("PYTHONPATH", "").split(os.pathsep) if folder]
    sys.path[:1] = [os.path.dirname(os.path.abspath(script)), *folders]
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    main.__file__ = script
    main.__builtins__ = __builtins__
    with open(script) as file:
        source = file.read()
    try:
        exec(compile(source, script, "exec"), main.__dict__)
    except SystemExit:
        raise
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__.tb_next)
        raise SystemExit(1) from None


# ---- in the pytest that was started


_servers: list = []  # the folder of their sockets, then the processes


def python() -> list[str]:
    """Return the words of a command that take the place of `sys.executable`. Waits until the servers are ready."""
    return [sys.executable, "-I", "-S", *client()]


def client() -> list[str]:
    """Return the words that make Python run the script behind them forked. Waits until the servers are ready."""
    import time

    folder, *servers = start_servers()
    while not all(os.path.exists(f"{folder}/{number}") for number in range(2)):
        assert all(server.poll() is None for server in servers), "a server has ended"
        time.sleep(0.01)
    return [__file__, folder]


def start_servers() -> list:
    """Start both servers unless that was done, without waiting until they are ready. They end with this process."""
    import atexit
    import shutil
    import subprocess
    import tempfile

    if _servers:
        return _servers
    folder = tempfile.mkdtemp(prefix="forked-")
    _servers.append(folder)
    for number in range(2):
        command = [sys.executable, __file__, "--serve", f"{folder}/{number}"]
        environment = os.environ | {"PYTHONHASHSEED": str(number + 1)}
        environment.pop("PYTHONUNBUFFERED", None)  # print would write its arguments one by one, and mix ranks' lines
        _servers.append(subprocess.Popen(command, stdin=subprocess.PIPE, env=environment, start_new_session=True))

    def end() -> None:
        for server in _servers[1:]:
            server.kill()
            server.wait()
        shutil.rmtree(folder)

    atexit.register(end)
    return _servers


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        serve(sys.argv[2])
    else:
        ask_to_run(sys.argv[1], sys.argv[2:])
