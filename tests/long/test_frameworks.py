# SPDX-License-Identifier: Apache-2.0
"""Accelerate and Lightning Fabric on shmpi: the scripts of docs/torch-distributed.md, compared with one process.

`make test-all` installs both packages. Without them these tests are skipped, except in CI.
"""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ranks import JobSpec, job_environment, mpirun_path
from sklearn.datasets import load_digits

DOCUMENT = (Path(__file__).parents[2] / "docs" / "torch-distributed.md").read_text()
SECTION = DOCUMENT.split("## Accelerate and Lightning Fabric\n")[1].split("\n## ")[0]
ACCELERATE, FABRIC = re.findall(r"^```python\n(.*?)^```", SECTION, re.DOTALL | re.MULTILINE)
NUM_RANKS = 2

pytestmark = pytest.mark.timeout(150)

# Sets float64 and a seed, so that the result can be compared with one process that trains on the whole batches.
BEFORE = """
import torch
torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
"""

# Gives each rank another seed, so that the ranks have the same model only if the framework copies that of rank 0.
OTHER_MODEL = "torch.manual_seed(dist.get_rank())\n"

AFTER_ACCELERATE = """
assert dist.get_backend() == "shmpi"
assert (accelerator.num_processes, accelerator.process_index) == (dist.get_world_size(), dist.get_rank())
assert accelerator.gather(torch.tensor([accelerator.process_index])).tolist() == list(range(dist.get_world_size()))
accelerator.wait_for_everyone()
torch.save(accelerator.unwrap_model(model).state_dict(), f"{dist.get_rank()}.pt")
"""

AFTER_FABRIC = """
assert dist.get_backend() == "shmpi"
assert (fabric.world_size, fabric.global_rank) == (dist.get_world_size(), dist.get_rank())
assert fabric.all_gather(torch.tensor(fabric.global_rank)).tolist() == list(range(fabric.world_size))
assert fabric.broadcast({"rank": fabric.global_rank}, src=1) == {"rank": 1}
assert fabric.all_reduce(torch.tensor(float(fabric.global_rank)), reduce_op="sum") == sum(range(fabric.world_size))
fabric.barrier()
torch.save(model.module.state_dict(), f"{dist.get_rank()}.pt")
"""


def replaced(text, *pairs):
    for old, new in pairs:
        assert text.count(old) == 1, f"the document's script has no {old!r}"
        text = text.replace(old, new)
    return text


def comparable(script):
    pairs = ("shuffle=True", "shuffle=False"), (".float()", ".double()")
    return BEFORE + replaced(script, *pairs, ("model = torch", OTHER_MODEL + "model = torch"))


def fabric_script():
    """Return Accelerate's script with Fabric's lines in the places where the document says that the two differ."""
    importing, make, launch, set_up, set_up_loader, backward = filter(None, FABRIC.splitlines())
    return replaced(
        ACCELERATE,
        ("from accelerate import Accelerator", importing),
        ("accelerator = Accelerator(cpu=True)", f"{make}\n{launch}"),
        ("model, optimizer, loader = accelerator.prepare(model, optimizer, loader)", f"{set_up}\n{set_up_loader}"),
        ("accelerator.backward(loss)", backward),
        ("accelerator.print", "fabric.print"),
    )


def run(tmp_path, package, script, **environ):
    """Run a script on 2 ranks; return the standard output, which rank 0 prints, and each rank's weights."""
    if importlib.util.find_spec(package) is None and "CI" not in os.environ:
        pytest.skip(f"{package} is not installed: `make test-all` installs it")
    (tmp_path / "train.py").write_text(script)
    result = subprocess.run(
        [mpirun_path(), "-np", str(NUM_RANKS), sys.executable, "train.py"],
        cwd=tmp_path,
        env={**job_environment(JobSpec(NUM_RANKS)), "OMP_NUM_THREADS": "1", **environ},
        capture_output=True,
        text=True,
        timeout=140,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout, [torch.load(tmp_path / f"{rank}.pt") for rank in range(NUM_RANKS)]


@pytest.fixture(scope="module")
def expected():
    """Weights that one process has trained on the batches of all ranks together."""
    torch.manual_seed(0)
    layers = [torch.nn.Linear(64, 64, dtype=torch.float64), torch.nn.ReLU()]
    model = torch.nn.Sequential(*layers, torch.nn.Linear(64, 10, dtype=torch.float64))
    optimizer = torch.optim.Adam(model.parameters())
    digits = load_digits()
    dataset = torch.utils.data.TensorDataset(torch.tensor(digits.data / 16), torch.tensor(digits.target))
    for _ in range(5):
        for images, labels in torch.utils.data.DataLoader(dataset, batch_size=32 * NUM_RANKS, drop_last=True):
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
    return model.state_dict()


def check(found, expected):
    """Compare each rank's weights with those of one process, and exactly with those of rank 0.

    The tolerance is for Adam: it divides by the root of squares, which loses more of a sum's last digits where
    gradients are near zero.
    """
    output, of_ranks = found
    assert re.fullmatch(r"0\.[0-9]{4}", output.split("Loss: ")[1].strip())
    for weights in of_ranks:
        for name, tensor in weights.items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-9, atol=1e-9)
    for name, tensor in of_ranks[0].items():
        assert all(torch.equal(weights[name], tensor) for weights in of_ranks)


def test_accelerate(tmp_path, expected):
    check(run(tmp_path, "accelerate", comparable(ACCELERATE) + AFTER_ACCELERATE), expected)


def test_fabric(tmp_path, expected):
    check(run(tmp_path, "lightning_fabric", comparable(fabric_script()) + AFTER_FABRIC), expected)


def test_fabric_makes_the_group(tmp_path, expected):
    """Fabric makes the group, by its strategy's argument, and opens no port: under MPI's launcher `env://` uses MPI."""
    script = replaced(
        comparable(fabric_script()),
        ('dist.init_process_group("shmpi")\n', "from lightning_fabric.strategies import DDPStrategy\n"),
        ("devices=dist.get_world_size()", "devices=2"),
        ('strategy="ddp"', 'strategy=DDPStrategy(process_group_backend="shmpi")'),
    )
    no_port = """
store = dist.distributed_c10d._get_default_store()
while isinstance(store, dist.PrefixStore):
    store = store.underlying_store
assert not isinstance(store, dist.TCPStore)
"""
    check(run(tmp_path, "lightning_fabric", script + AFTER_FABRIC + no_port), expected)


def test_accelerate_without_variables(tmp_path, expected):
    """Accelerate needs no variables of mpirun, as under srun; LOCAL_WORLD_SIZE puts each rank on its own machine."""
    variables = """
import os
for name in list(os.environ):
    if name.startswith(("OMPI_", "PMI", "MPI_")):
        del os.environ[name]
os.environ |= {"RANK": str(dist.get_rank()), "WORLD_SIZE": str(dist.get_world_size())}
os.environ |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "anything"}
"""
    make_group = 'dist.init_process_group("shmpi")\n'
    script = replaced(comparable(ACCELERATE) + AFTER_ACCELERATE, (make_group, make_group + variables))
    check(run(tmp_path, "accelerate", script), expected)


def test_accelerate_refuses_the_name(tmp_path):
    """Accelerate refuses the backend's name. If this test fails, the documented way can be made shorter."""
    if importlib.util.find_spec("accelerate") is None and "CI" not in os.environ:
        pytest.skip("accelerate is not installed: `make test-all` installs it")
    code = """
import distributed_trainer
from accelerate import Accelerator, InitProcessGroupKwargs
Accelerator(cpu=True, kwargs_handlers=[InitProcessGroupKwargs(backend="shmpi")])
"""
    environ = {**os.environ, "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    result = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, timeout=100)
    assert "Your assigned backend shmpi is not available" in result.stderr
