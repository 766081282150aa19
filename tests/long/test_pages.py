# SPDX-License-Identifier: Apache-2.0
"""Scripts of docs/huggingface.md, docs/lightning.md and docs/recipes.md that need other libraries.

`make test-all` installs these. Without them the tests are skipped, except in CI.
"""

import functools
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pages
import pytest
import torch
from one_process import assert_same
from ranks import JobSpec, job_environment, mpirun_path

pytestmark = pytest.mark.timeout(200)

HUGGINGFACE, LIGHTNING = pages.scripts("huggingface.md"), pages.scripts("lightning.md")
FRAMEWORKS = {
    "transformers": HUGGINGFACE["transformers' Trainer"],
    "accelerate": HUGGINGFACE["Accelerate"],
    "fabric": LIGHTNING["Fabric"],
    "lightning": LIGHTNING["Trainer"],
}
PACKAGES = {"fabric": "lightning", "train_step": "peft", "graphs": "torch_geometric"}

# float64 everywhere, also where transformers asks for float32.
BEFORE = """
import torch
torch.set_default_dtype(torch.float64)
torch.Tensor.float = torch.Tensor.double
"""
# Gives each rank another seed, so that the ranks have the same model only if the framework copies that of rank 0.
OTHER_MODEL = "\ntorch.manual_seed(dist.get_rank())\nmodel = "

AFTER = """
assert dist.get_backend() == "shmpi"
torch.save(getattr(model, "module", model).state_dict(), f"{dist.get_rank()}.pt")
"""
AFTER_ACCELERATE = """
size, rank = dist.get_world_size(), dist.get_rank()
assert (accelerator.num_processes, accelerator.process_index) == (size, rank)
assert accelerator.gather(torch.tensor([accelerator.process_index])).tolist() == list(range(size))
accelerator.wait_for_everyone()
"""
AFTER_FABRIC = """
size, rank = dist.get_world_size(), dist.get_rank()
assert (fabric.world_size, fabric.global_rank) == (size, rank)
assert fabric.all_gather(torch.tensor([rank])).flatten().tolist() == list(range(size))
assert fabric.broadcast({"rank": rank}, src=size - 1) == {"rank": size - 1}
assert fabric.all_reduce(torch.tensor(float(rank)), reduce_op="sum") == sum(range(size))
fabric.barrier()
"""
AFTER_LIGHTNING = """
(result,) = trainer.validate(model, DataLoader(dataset, batch_size), verbose=False)
with torch.no_grad():
    expected = F.cross_entropy(model.layers(dataset.tensors[0]), dataset.tensors[1]).item()
assert abs(result["validation_loss"] - expected) < 1e-9
"""
MORE = {"accelerate": AFTER_ACCELERATE, "fabric": AFTER_FABRIC, "lightning": AFTER_LIGHTNING}


def replaced(text, *pairs):
    for old, new in pairs:
        assert text.count(old) == 1, f"the document's script has no {old!r}"
        text = text.replace(old, new)
    return text


def run(tmp_path, name, script, num_ranks, **environ):
    """Run a script on the ranks; return the standard output, which rank 0 prints, and each rank's weights."""
    package = PACKAGES.get(name, name)
    if importlib.util.find_spec(package) is None and "CI" not in os.environ:
        pytest.skip(f"{package} is not installed: `make test-all` installs it")
    (tmp_path / "train.py").write_text(script)
    result = subprocess.run(
        [mpirun_path(), "-np", str(num_ranks), sys.executable, "train.py"],
        cwd=tmp_path,
        env={**job_environment(JobSpec(num_ranks)), "OMP_NUM_THREADS": "1", **environ},
        capture_output=True,
        text=True,
        timeout=190,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout, [torch.load(path) for path in sorted(tmp_path.glob("*.pt"))]


def comparable(name):
    """Return a page's script in float64, without shuffling, and with checks at its end."""
    script = replaced(FRAMEWORKS[name].replace("shuffle=True", "shuffle=False"), ("\nmodel = ", OTHER_MODEL))
    return BEFORE + script + MORE.get(name, "") + AFTER


def check_same(of_ranks, expected, rtol):
    for weights in of_ranks:
        assert_same(weights, expected, rtol)
        assert_same(weights, of_ranks[0], rtol=0)


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("name", ["train_step", "graphs"])
def test_train_step(tmp_path, name, num_ranks):
    """The scripts with this trainer give the weights, and print the losses, of plain torch in one process."""
    texts = {
        "train_step": [HUGGINGFACE["Fine-tune a language model"], HUGGINGFACE["Adapters"]],
        "graphs": [pages.scripts("recipes.md")["Graphs"]],
    }
    # transformers computes norms in float32, and Adam divides by the root of squares of gradients that are near 0.
    script = f"""
import sys
sys.path.append({str(Path(pages.__file__).parent)!r})
import pages
for text in {texts[name]!r}:
    pages.check(text, rtol={1e-9 if name == "graphs" else 1e-4})
"""
    run(tmp_path, name, script, num_ranks)


@pytest.fixture(scope="module")
def of_one_rank(tmp_path_factory):
    """Return a function that returns the weights which a framework trains on one rank."""

    @functools.cache
    def train(name):
        _, (weights,) = run(tmp_path_factory.mktemp(name), name, comparable(name), 1)
        return weights

    return train


@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize("name", FRAMEWORKS)
def test_framework(tmp_path, of_one_rank, name, num_ranks):
    """A framework's script gives the weights that it gives in one process, and rank 0's model to all ranks."""
    _, of_ranks = run(tmp_path, name, comparable(name), num_ranks)
    assert len(of_ranks) == num_ranks
    check_same(of_ranks, of_one_rank(name), 1e-5 if name == "transformers" else 1e-9)


def test_fabric_makes_the_group(tmp_path, of_one_rank):
    """Fabric makes the group, by its strategy's argument, and opens no port: under MPI's launcher `env://` uses MPI."""
    script = replaced(
        comparable("fabric"),
        ('dist.init_process_group("shmpi")\n', "from lightning.fabric.strategies import DDPStrategy\n"),
        ("devices=dist.get_world_size()", "devices=2"),
        ('strategy="ddp"', 'strategy=DDPStrategy(process_group_backend="shmpi")'),
    )
    no_port = """
store = dist.distributed_c10d._get_default_store()
while isinstance(store, dist.PrefixStore):
    store = store.underlying_store
assert not isinstance(store, dist.TCPStore)
"""
    _, of_ranks = run(tmp_path, "fabric", script + no_port, 2)
    check_same(of_ranks, of_one_rank("fabric"), 1e-9)


def test_accelerate_without_variables(tmp_path, of_one_rank):
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
    _, of_ranks = run(
        tmp_path, "accelerate", replaced(comparable("accelerate"), (make_group, make_group + variables)), 2
    )
    check_same(of_ranks, of_one_rank("accelerate"), 1e-9)


def test_accelerate_refuses_the_name(tmp_path):
    """Accelerate refuses the backend's name. If this test fails, the documented way can be made shorter."""
    code = """
import distributed_trainer
from accelerate import Accelerator, InitProcessGroupKwargs
try:
    Accelerator(cpu=True, kwargs_handlers=[InitProcessGroupKwargs(backend="shmpi")])
except ValueError as error:
    assert "Your assigned backend shmpi is not available" in str(error)
else:
    raise AssertionError("not refused")
"""
    run(tmp_path, "accelerate", code, 1, RANK="0", WORLD_SIZE="2", LOCAL_RANK="0")
