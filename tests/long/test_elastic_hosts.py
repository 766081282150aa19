# SPDX-License-Identifier: Apache-2.0
"""`distributed-trainer run --elastic` on two hosts: ranks of both are killed, the others continue, new ones join."""

import re
import subprocess
import sys

import pytest
import torch
from host_shell import Shell
from hosts import Hosts, require
from scripts import NEW_PROCESS

SCRIPT = """
import os, signal, time
import torch
from torch import nn
from distributed_trainer import create_distributed_trainer

torch.manual_seed(1)
model = nn.Sequential(nn.Linear(20, 512), nn.ReLU(), nn.Linear(512, 300), nn.ReLU(), nn.Linear(300, 5))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
trainer = create_distributed_trainer(model, reproducible=8)
inputs = torch.randn(640, 20)
loader = trainer.loader(torch.utils.data.TensorDataset(inputs, inputs[:, :5].argmax(1)), 64, shuffle=True)
step = trainer.resume("none", optimizer=optimizer) or 0
kills = int(os.environ.get("KILLS", "0"))
for epoch in trainer.epochs(15):
    for x, y in loader:
        if kills and step in (40, 80) and trainer.world_size < 4:
            wait_for_process(trainer)
        trainer.train_step(x, y, nn.CrossEntropyLoss(), optimizer)
        step += 1
        time.sleep(0.02 * (kills > 0))
        if (step, trainer.world_size, trainer.rank) in [(20, 4, 3), (60, 4, 0)] and kills:  # a rank of each host
            os.kill(os.getpid(), signal.SIGKILL)
if trainer.rank == 0:
    torch.save([parameter.detach() for parameter in model.parameters()], f"end-{kills}.pt")
print("end", trainer.rank, trainer.world_size, flush=True)
"""


@pytest.mark.timeout(200)
def test_killed_on_both_hosts(tmp_path):
    require()
    with Hosts(2) as hosts:
        shell = Shell(hosts, tmp_path)
        (tmp_path / "train.py").write_text(NEW_PROCESS + SCRIPT)
        (tmp_path / "hosts.txt").write_text("".join(f"{name} slots=2\n" for name in hosts.names))

        def run(command, kills):
            with (tmp_path / "out").open("w") as out, (tmp_path / "err").open("w") as err:
                code = subprocess.call(
                    [*hosts._enter(0, mounts=True), "sh", "-c", f"cd {tmp_path} && {sys.executable} {command}"],
                    env=shell.environment | {"OMP_NUM_THREADS": "1", "KILLS": str(kills)},
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=err,
                    timeout=150,
                )
            out, err = (tmp_path / "out").read_text(), (tmp_path / "err").read_text(errors="replace")
            assert code == 0, out + err
            return out, err

        out, err = run("-m distributed_trainer run --elastic -x KILLS --hostfile hosts.txt train.py", kills=2)
        assert len(re.findall("1 of 4 ranks were killed: training continues with 3", err)) == 2, err
        assert len(re.findall("taken the place of a killed one: training continues with 4 ranks", err)) == 2, err
        assert sorted(re.findall("^end .*", out, re.M)) == [f"end {rank} 4" for rank in range(4)]
        run("train.py", kills=0)
        expected, found = (torch.load(tmp_path / f"end-{kills}.pt") for kills in (0, 2))
        assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))
