# SPDX-License-Identifier: Apache-2.0
"""Scripts in the pages of the documentation: run on the ranks, and by plain torch in one process."""

import contextlib
import io
import random
import re
import sys
from pathlib import Path
from types import ModuleType
from unittest import mock

import numpy as np
import plain_trainer
import torch
from one_process import assert_same

import distributed_trainer

DOCS = Path(__file__).parents[2] / "docs"


def scripts(page: str) -> dict[str, str]:
    """Return the Python block of each section of a page that has one, by the section's heading."""
    found = {}
    for section in (DOCS / page).read_text().split("\n## ")[1:]:
        blocks = re.findall(r"^```python\n(.*?)^```", section, re.DOTALL | re.MULTILINE)
        if blocks:
            (found[section.split("\n", 1)[0]],) = blocks
    return found


def check(script: str, rtol: float = 1e-9) -> None:
    """Run a script on this rank and by plain torch in one process; compare what they print, and their models.

    In float64, and without shuffling, since a loader of the trainer draws another order than torch's.
    """
    script = script.replace("shuffle=True", "shuffle=False")
    expected, plain_output = run(script, plain_trainer)
    found, output = run(script, distributed_trainer)
    trainers = [value for value in found.values() if isinstance(value, distributed_trainer.DistributedTrainer)]
    if trainers[0].is_main:
        assert output.endswith(plain_output)  # after the line with which the trainer starts
        assert plain_output
    for name, model in expected.items():
        if isinstance(model, torch.nn.Module):
            assert_same(found[name], model, rtol)
    for trainer in trainers:
        trainer.close()


def run(script: str, module: ModuleType) -> tuple[dict[str, object], str]:
    """Run a script with a module as `distributed_trainer`; return its variables, and what it has printed."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    variables: dict[str, object] = {}
    with contextlib.ExitStack() as stack:
        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float64)
        stack.enter_context(mock.patch.object(torch.Tensor, "float", torch.Tensor.double))  # as in transformers' losses
        stack.callback(sys.modules.__setitem__, "distributed_trainer", distributed_trainer)
        sys.modules["distributed_trainer"] = module
        output = stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        exec(compile(script, "script", "exec"), variables)
    return variables, output.getvalue()
