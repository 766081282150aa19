# SPDX-License-Identifier: Apache-2.0
"""Every operation of torch.distributed on shmpi, against results computed by formula from the ranks' inputs."""

import group_operations
import operations_table
import pytest
import tensor_operations
import torch
import torch.distributed as dist
from ranks import on_ranks

OPERATIONS = [*tensor_operations.OPERATIONS, *group_operations.OPERATIONS]  # test_functional.py tests compiled ones


@on_ranks(1, 4, (3, 2))
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch warns about names that it will drop
def test_operation(world, group, operation):
    for call in operation.calls(group):
        try:
            operation.run(call)
        except BaseException as error:
            raise AssertionError(f"{operation.name} {call}") from error


@on_ranks(2, (3, 2))
def test_refused(world, group):
    """A tensor that can't be reduced is refused by the calling rank before anything is sent; the group stays usable."""
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16):
        own = torch.ones(2).to(dtype)
        for call in (
            lambda own=own: dist.all_reduce(own),
            lambda own=own: dist.reduce(own, 0),
            lambda own=own: dist.reduce_scatter_tensor(own, own.repeat(world.size)),
        ):
            with pytest.raises(TypeError, match=r"reductions take|float8 tensors can be moved but not reduced"):
                call()
    for tensor, op, message in [
        (torch.ones(2), dist.ReduceOp.BAND, "band of float32"),
        (torch.ones(2).bool(), dist.ReduceOp.AVG, "average of bool"),
        (torch.ones(2) * 1j, dist.ReduceOp.PRODUCT, "complex"),
        (torch.eye(2).to_sparse(), dist.ReduceOp.MAX, "only if they are COO"),
        (torch.eye(2).to_sparse_csr(), dist.ReduceOp.SUM, "only if they are COO"),
    ]:
        with pytest.raises(ValueError, match=message):
            dist.all_reduce(tensor, op)
    dist.barrier()


def test_table_in_the_documentation():
    """The table has exactly the operations that are tested. `make docs-table` writes it."""
    names = [operation.name for operation in operations_table.OPERATIONS]
    assert operations_table.rows(operations_table.DOCUMENT.read_text()) == names
