"""lora_linear under torch.compile, on every path, without a graph break."""

import pytest
import torch
from accuracy import check_one_mask, eager, error, gradients
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint


def close(ours, expected):
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.fixture
def compiled(path):
    """torch.compile without graph breaks: the whole compiler on a GPU, on a CPU all of it but code generation."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor" if path[1] == "cuda" else "aot_eager")

    def compiled(function):
        return torch.compile(function, backend=counter, fullgraph=True)

    compiled.counter = counter
    return compiled


@pytest.mark.medium
@pytest.mark.parametrize("scaling", ["float", "tensor"])
def test_compiled(call, inputs, compiled, scaling):
    scaling = 1.5 if scaling == "float" else torch.tensor(1.5, device=inputs.x.device)
    fn = compiled(lambda *a: call(*a, scaling=scaling).relu())
    ours = gradients(fn, inputs)
    expected = gradients(lambda *a: eager(*a, 1.5).relu(), inputs)
    for name in expected:
        close(ours[name], expected[name])
    with torch.no_grad():
        close(fn(inputs.x, inputs.weight, inputs.lora_A, inputs.lora_B, inputs.bias), expected["y"])


@pytest.mark.medium
@pytest.mark.parametrize("with_checkpoint", [None, False, True], ids=["plain", "checkpoint", "reentrant"])
def test_compiled_with_dropout_uses_one_mask(call, inputs, compiled, with_checkpoint):
    inputs.weight, inputs.bias = torch.zeros_like(inputs.weight), None

    def plain(*a):
        return call(*a, p=0.5)

    def checkpointed(*a):
        return checkpoint(plain, *a, use_reentrant=with_checkpoint)

    fn = compiled(plain if with_checkpoint is None else checkpointed)
    seen = [gradients(lambda x, w, a, b, _: fn(x, w, a, b), inputs) for _ in range(3)]
    for ours in seen:
        check_one_mask(inputs, ours)
    assert not torch.equal(seen[0]["y"], seen[1]["y"])


def test_new_scalings_hardly_recompile(call, inputs, compiled):
    leaves = (inputs.x, inputs.weight, inputs.lora_A, inputs.lora_B, inputs.bias)
    fn = compiled(lambda scaling: call(*leaves, scaling=scaling))
    for value in (0.5, 1.5, 2.5):
        close(fn(torch.tensor(value, device=inputs.x.device)), eager(*leaves, value))
    assert compiled.counter.frame_count == 1
    for value in (0.5, 1.5, 2.5, 3.5):
        close(fn(value), eager(*leaves, value))
    assert compiled.counter.frame_count <= 3  # the first float, and at most once again


@pytest.mark.medium
def test_new_batch_sizes_hardly_recompile(call, inputs, compiled):
    x, rest = inputs.x, (inputs.weight, inputs.lora_A, inputs.lora_B, inputs.bias)
    fn = compiled(lambda x: call(x, *rest))
    for m in (5, 7, 9, 12):
        close(fn(x[:m]), eager(x[:m], *rest, 2.0))
    assert compiled.counter.frame_count <= 2


def test_compiled_under_autocast(call, inputs, compiled, path, dtype16):
    fn = compiled(lambda *a: call(*a))
    with torch.autocast(path[1], dtype=dtype16):
        ours = gradients(fn, inputs)
    expected = gradients(lambda *a: eager(*a, 2.0), inputs)
    assert ours["y"].dtype == dtype16 and all(ours[name].dtype == torch.float32 for name in ("dx", "dA", "dB", "dbias"))
    for name in expected:
        assert error(ours[name], expected[name].double()) < 0.01, name
