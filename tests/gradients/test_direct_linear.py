# SPDX-License-Identifier: Apache-2.0
"""torch.nn.functional.linear during steps: it has the bits of autograd for all callers, and others do not notice it."""

import copy
import io
import pickle
import sys
import threading
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from distributed_trainer.gradients import direct_linear

TORCH_LINEAR = torch._C._nn.linear


@pytest.fixture(autouse=True)
def any_size(monkeypatch):
    monkeypatch.setattr(direct_linear, "MIN_BYTES", 0)
    yield
    assert F.linear is TORCH_LINEAR
    assert not direct_linear._active


class Places:
    """Stand-in for a GradientReducer in DirectLinear: memory for each gradient, given once."""

    def __init__(self, model):
        self.views = {id(parameter): torch.full_like(parameter, torch.nan) for parameter in model.parameters()}
        self.given = set()
        self.hooks = [p.register_post_accumulate_grad_hook(lambda p: None) for p in model.parameters()]

    def place_of(self, parameter):
        if id(parameter) in self.given:
            return None
        self.given.add(id(parameter))
        return self.views[id(parameter)].detach()


def normal(*shape, dtype=torch.float32, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def step(model, inputs, call, context):
    """Return the results of a step: the output, the gradients of the inputs, the gradients of the parameters."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    with context:
        output = call(model, *inputs)
        output = output[0] if isinstance(output, tuple) else output
        output.backward(normal(*output.shape, dtype=output.dtype, seed=2))
    return {
        "output": output,
        **{f"input {index}": x.grad for index, x in enumerate(inputs)},
        **{name: parameter.grad for name, parameter in model.named_parameters()},
    }


def strides(tensor):
    return [stride for stride, length in zip(tensor.stride(), tensor.shape, strict=True) if length > 1]


def check(model, names, *inputs, call=lambda model, *inputs: model(*inputs), twin=None):
    """Check that the named parameters' gradients are computed in place, and that a step has the bits of plain torch."""
    expected = step(twin or copy.deepcopy(model), inputs, call, nullcontext())
    places = Places(model)
    actual = step(model, inputs, call, direct_linear.DirectLinear(model, places).active())
    for name, value in expected.items():
        assert (value is None) == (actual[name] is None), name
        assert value is None or torch.equal(value, actual[name]), name
        assert value is None or strides(value) == strides(actual[name]), name
    in_place = {
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and parameter.grad.data_ptr() == places.views[id(parameter)].data_ptr()
    }
    assert in_place == set(names)
    return places


# At the sizes 65 and 130, products of transposed operands round differently.
INPUTS = {
    "2-D": normal(7, 130),
    "column-major": normal(130, 7).t(),
    "one column-major row": normal(130, 1).t(),
    "columns of more": normal(7, 200)[:, 3:133],
    "3-D": normal(5, 7, 130),
    "4-D": normal(3, 5, 7, 130),
    "transposed": normal(5, 7, 130).transpose(0, 1),
    "transposed column-major": normal(5, 130, 7).transpose(1, 2),
    "4-D transposed": normal(3, 5, 7, 130).transpose(0, 2),
    "one column-major matrix": normal(1, 130, 7).transpose(1, 2),
    "expanded": normal(1, 7, 130).expand(5, 7, 130),
    "no rows": normal(0, 130),
    "no samples": normal(0, 7, 130),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", INPUTS)
def test_inputs(name, bias, dtype):
    check(nn.Linear(130, 65, bias=bias, dtype=dtype), {"weight"}, INPUTS[name].to(dtype))


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize(
    ("use", "options", "names"),
    [
        ("self", {}, {"in_proj_weight", "out_proj.weight"}),
        ("self", {"bias": False}, {"in_proj_weight", "out_proj.weight"}),
        ("self", {"add_bias_kv": True}, {"in_proj_weight", "out_proj.weight"}),
        ("decoder", {}, {"out_proj.weight"}),  # views of the packed weight, as with three weights
        ("three", {}, {"out_proj.weight"}),
        ("three", {"kdim": 65, "vdim": 39}, {f"{k}_proj_weight" for k in "qkv"} | {"out_proj.weight"}),
    ],
)
def test_attention(use, options, names, batch_first, need_weights):
    model = nn.MultiheadAttention(130, 5, batch_first=batch_first, **options)
    widths = (130, options.get("kdim", 130), options.get("vdim", 130))
    inputs = [normal(7, 9, width, seed=index) for index, width in enumerate(widths)]

    def call(model, q, k, v):
        q, k, v = {"self": (q, q, q), "decoder": (q, k, k), "three": (q, k, v)}[use]
        return model(q, k, v, need_weights=need_weights)

    check(model, names, *inputs, call=call)


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_transformer_layer(batch_first, norm_first):
    model = nn.TransformerEncoderLayer(130, 5, 65, dropout=0.0, batch_first=batch_first, norm_first=norm_first)
    names = {"self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight"}
    check(model, names, normal(7, 9, 130))


class Bare(nn.Module):
    """Module with parameters but without layers."""

    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(normal(65, 130))
        self.vector = nn.Parameter(normal(130))
        self.bias = nn.Parameter(normal(65))


@pytest.mark.parametrize(
    ("call", "names"),
    [
        (lambda own, x: F.linear(x, own.matrix, own.bias), {"matrix"}),
        (lambda own, x: F.linear(bias=own.bias, weight=own.matrix, input=x), {"matrix"}),
        (lambda own, x: F.linear(x, own.matrix[:30]), set()),
        (lambda own, x: F.linear(x, own.vector) * own.bias[0], set()),
        (lambda own, x: F.linear(x[0], own.matrix, own.bias), set()),
        (lambda own, x: F.linear(x, own.matrix) + x @ own.matrix.t() + x.sin() @ own.matrix.t(), set()),
        (lambda own, x: F.linear(x, own.matrix) + F.linear(x.sin(), own.matrix) + F.linear(x.cos(), own.matrix), set()),
        (lambda own, x: F.linear(own.matrix, own.matrix), set()),
        (lambda own, x: F.linear(own.matrix * 1, own.matrix), set()),
        (lambda own, x: torch.func.vmap(lambda row: F.linear(row[None], own.matrix, own.bias))(x), set()),
    ],
)
def test_calls(call, names):
    check(Bare(), names, normal(7, 130), call=call)


@pytest.mark.parametrize("wrap", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.orthogonal])
def test_parametrization(wrap):
    check(wrap(nn.Linear(130, 65)), set(), normal(7, 130))


def test_nested_tensor():
    def call(model, x):
        ragged = torch.nested.as_nested_tensor([x[:3], x[3:]], layout=torch.strided)
        return torch.cat(model(ragged).unbind())

    check(nn.Linear(130, 65), set(), normal(7, 130), call=call)


class Constant(torch.autograd.Function):
    """Function that returns None, not zeros, as the gradient of its input."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad_output):
        return None


def test_no_gradient():
    model = nn.Sequential(nn.Linear(130, 65), nn.Linear(130, 65))
    check(model, {"1.weight"}, normal(7, 130), call=lambda model, x: Constant.apply(model[0](x)) + model[1](x))


def test_weight_changed_after_forward():
    """Plain torch allows the change where the input needs no gradient."""

    def call(model, x):
        y = model(x.detach())
        with torch.no_grad():
            model.weight.mul_(2)
        return y

    check(nn.Linear(130, 65), {"weight"}, normal(7, 130), call=call)


def test_hook():
    """A hook may keep the gradient, which must not change when it is summed over the ranks."""
    model, kept = nn.Linear(130, 65), []
    twin = copy.deepcopy(model)
    model.weight.register_hook(kept.append)
    places = check(model, set(), normal(7, 130), twin=twin)
    assert [gradient.data_ptr() == places.views[id(model.weight)].data_ptr() for gradient in kept] == [False]


def test_forward_mode():
    def call(model, x):
        with forward_ad.dual_level():
            y = model(forward_ad.make_dual(x, torch.ones_like(x)))
            primal, tangent = forward_ad.unpack_dual(y)
            return primal + tangent

    check(nn.Linear(130, 65), set(), normal(7, 130), call=call)


def test_functional_gradient():
    """A loss that contains a gradient computed by functorch."""

    def call(model, x):
        slopes = torch.func.grad(lambda x: torch.func.functional_call(model, dict(model.named_parameters()), x).sum())(
            x
        )
        return model(x).sum(1) + slopes.sum(1)

    check(nn.Sequential(nn.Linear(130, 65), nn.Tanh()), set(), normal(7, 130), call=call)


# ---- other code that runs in a step


def make_mixed(wrap):
    torch.manual_seed(0)
    model = nn.Module()
    model.plain, model.other = nn.Linear(130, 130), wrap(nn.TransformerEncoderLayer(130, 5, 65, dropout=0.0))
    return model


def call_mixed(model, x):
    return model.other(model.plain(x))


@pytest.mark.parametrize(
    "wrap", [lambda m: torch.compile(m, backend="aot_eager"), torch.jit.script], ids=["compile", "script"]
)
def test_compiled_module(wrap):
    check(make_mixed(wrap), {"plain.weight"}, normal(7, 9, 130), call=call_mixed, twin=make_mixed(wrap))


def test_compiled_beside_steps():
    """A compiled model is used in steps and outside of them, in turn: it is compiled at most once for each."""
    counter = torch._dynamo.testing.CompileCounter()
    model = nn.Linear(130, 65)
    compiled = torch.compile(model, backend=counter)
    x = normal(7, 130)
    steps = direct_linear.DirectLinear(model, Places(model))
    for _ in range(5):
        assert torch.equal(compiled(x), TORCH_LINEAR(x, model.weight, model.bias))
        with steps.active():
            assert torch.equal(compiled(x), TORCH_LINEAR(x, model.weight, model.bias))
    assert counter.frame_count <= 2
    assert counter.op_count == counter.frame_count


def test_compiler_in_a_step():
    """Scripting, tracing and FX find torch's function."""
    model = nn.Linear(130, 65)
    x = normal(7, 130)

    def function(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.linear(x, weight)

    class Tracer(fx.Tracer):
        def is_leaf_module(self, module, name):
            return False

    with direct_linear.DirectLinear(model, Places(model)).active():
        scripted = torch.jit.script(function)
        traced = torch.jit.trace(model, x)
        graph = Tracer().trace(model)
    assert [node.target for node in graph.nodes if node.op == "call_function"] == [TORCH_LINEAR]
    assert "aten::linear" in str(traced.inlined_graph)
    assert torch.equal(traced(x), model(x))
    assert torch.equal(scripted(x, model.weight), F.linear(x, model.weight))


def test_pickle_in_a_step():
    model = nn.TransformerEncoderLayer(130, 5, 65)
    with direct_linear.DirectLinear(model, Places(model)).active():
        saved = pickle.dumps(model)
        torch.save(model, file := io.BytesIO())
        function = pickle.dumps(F.linear)
        copied = copy.deepcopy(model)
    file.seek(0)
    for other in (pickle.loads(saved), torch.load(file, weights_only=False), copied):
        assert type(other.linear1) is nn.Linear
    x = normal(7, 130)
    assert torch.equal(pickle.loads(function)(x, model.linear1.weight), F.linear(x, model.linear1.weight))


def test_torch_function_mode():
    """A mode of torch functions sees the call of linear, with torch's function."""
    seen = []

    class Mode(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    def call(model, x):
        with Mode():
            return model(x)

    check(nn.Linear(130, 65), set(), normal(7, 130), call=call)
    assert seen == [TORCH_LINEAR, TORCH_LINEAR]


# ---- begin and end of the replacement


def is_in_place(model, steps):
    model.zero_grad()
    model(normal(7, 130)).sum().backward()
    return model.weight.grad.data_ptr() == steps._gradients.views[id(model.weight)].data_ptr()


def make_steps(model):
    return direct_linear.DirectLinear(model, Places(model))


def test_two_trainers():
    """The trainer whose step began first is the first to end it."""
    models = [nn.Linear(130, 65) for _ in range(2)]
    first, second = (make_steps(model) for model in models)
    first_block, second_block = first.active(), second.active()
    first_block.__enter__()
    second_block.__enter__()
    first_block.__exit__(None, None, None)
    assert F.linear is direct_linear.linear
    assert not is_in_place(models[0], first)
    assert is_in_place(models[1], second)
    second_block.__exit__(None, None, None)


def test_two_trainers_of_one_model():
    model = nn.Linear(130, 65)
    outer, inner = make_steps(model), direct_linear.DirectLinear(model, None)
    with outer.active():
        with inner.active():
            pass
        for hook in outer._gradients.hooks[1:]:
            hook.remove()
        assert is_in_place(model, outer)


def test_error():
    model = nn.Linear(130, 65)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), make_steps(model).active():
        model(normal(7, 129))


def test_threads():
    """Steps of many threads begin and end at any time."""
    failures = []

    def run(seed):
        model = nn.Linear(130, 65)
        for _ in range(300):
            steps = make_steps(model)
            with steps.active():
                if F.linear is not direct_linear.linear or not is_in_place(model, steps):
                    failures.append(seed)
            for hook in steps._gradients.hooks:
                hook.remove()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not failures


def test_replaced_by_somebody(monkeypatch):
    """A function that other code has put there stays, if it was there before the step or was put there in it."""
    model = nn.Linear(130, 65)
    steps = make_steps(model)

    def own(*args):
        return 2 * before(*args)

    before = F.linear
    with monkeypatch.context() as patch:
        patch.setattr(F, "linear", own)
        with steps.active():
            assert F.linear is own
        assert F.linear is own
    with steps.active():
        before, F.linear = F.linear, own
    for _ in range(2):
        with steps.active():
            assert F.linear is own
            assert torch.equal(model(normal(7, 130)), 2 * TORCH_LINEAR(normal(7, 130), model.weight, model.bias))
    F.linear = before  # `linear` of direct_linear.py, as found in the step
    with steps.active():
        assert is_in_place(model, steps)
