"""However many rows a layer is given: few kernels are compiled, and the same inputs give the same bits, in memory full
of NaN, too."""

import importlib
import inspect
import pkgutil
from collections import Counter
from itertools import product

import pytest
import torch
from accuracy import draw
from devices import TRITON
from torch.utils._python_dispatch import TorchDispatchMode

if not TRITON:
    pytest.skip("needs Triton", allow_module_level=True)

from crossed import crossed, named
from dora_forms import magnitude
from triton.runtime.jit import JITFunction

import lora_fast.kernels
from lora_fast import functional, paths
from lora_fast.kernels import operands
from lora_fast.kernels.chip import Chip, assume
from lora_fast.kernels.program import Program
from lora_fast.timing import graphed

HALF, BF16, FLOAT = torch.float16, torch.bfloat16, torch.float32
BOTH = pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
TRAINING = pytest.mark.parametrize("train", [True, False], ids=["training", "decoding"])


def step_of(inputs, dora, p=0.0, train=True):
    """A step that gives y and, in training, all gradients."""
    leaves = [inputs.x, inputs.lora_A, inputs.lora_B, *([magnitude(inputs)] if dora else [])]
    leaves = [leaf.detach().requires_grad_(train) for leaf in leaves]
    function = functional.dora_linear if dora else functional.lora_linear

    def step():
        if p:
            torch.manual_seed(1)
        y = function(leaves[0], inputs.weight, *leaves[1:], 2.0, inputs.bias, dropout_p=p, backend="triton")
        return [y.detach(), *(torch.autograd.grad(y, leaves, inputs.dy) if train else ())]

    return step


# Few variants: what is compiled depends on the rows in few steps only.

MOST = 10  # variants of a kernel; the product, with four tiles for each of its two uses, has the most


def rows_given():
    gen = torch.Generator().manual_seed(0)
    return [m for most in (4096, 128) for m in torch.randint(1, most + 1, (100,), generator=gen).tolist()]


def kind_of(name, value, unspecialised):
    """What of an argument Triton compiles in."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.data_ptr() % 16
    return type(value) if type(value) is not int or name in unspecialised else (value == 1, value % 16 == 0)


def variant(launch, args):
    """What Triton would compile for a launch."""
    names = inspect.signature(launch.kernel.fn).parameters
    values = zip(names, (*args, *launch.ints), strict=False)
    kinds = [kind_of(name, value, launch.kernel.kwargs["do_not_specialize"] or ()) for name, value in values]
    tiles = [block.tile for block in launch.blocks.values()]
    return launch.kernel.fn.__name__, str((kinds, tiles, launch.constants, launch.options))


@pytest.mark.medium
@pytest.mark.interpreted
@BOTH
@TRAINING
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("dtype, k, n", [(HALF, 512, 768), (BF16, 4096, 1024)], ids=str)
def test_few_variants_are_planned(dtype, k, n, dora, train, p, monkeypatch):
    """As for an H200, whose launches are looked at instead of being started."""
    found = set()

    def look(program, bound, first=0, last=None):
        for launch, places in list(zip(program.launches, program.places, strict=True))[first:last]:
            found.add(variant(launch, [bound.values[place] for place in places]))

    monkeypatch.setattr(Program, "run", look)
    monkeypatch.setattr(operands, "INTERPRETED", False)  # dependent launches are planned, too
    monkeypatch.setattr(paths, "calls", {})
    x, dy = torch.empty(4096, k, dtype=dtype), torch.empty(4096, n, dtype=dtype)
    inputs = draw(1, k, n, 16, dtype)
    with assume(Chip(90, 132)):
        for m in rows_given():
            inputs.x, inputs.dy = x[:m], dy[:m]
            step_of(inputs, dora, p, train)()
    counted = Counter(name for name, _ in found)
    assert train or p > 0 or "_decode_kernel" in counted
    assert len(counted) >= 2 and max(counted.values()) <= MOST, counted


def compiled():
    """How many variants of each kernel there are."""
    names = [f"lora_fast.kernels.{module.name}" for module in pkgutil.iter_modules(lora_fast.kernels.__path__)]
    found = {name: it for module in names for name, it in vars(importlib.import_module(module)).items()}
    kernels = {name: it for name, it in found.items() if isinstance(it, JITFunction)}
    return Counter({name: sum(len(cache[0]) for cache in it.device_caches.values()) for name, it in kernels.items()})


@pytest.mark.gpu
@BOTH
@TRAINING
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_few_variants_are_compiled(dora, train, p):
    inputs = draw(4096, 512, 768, 16, BF16, "cuda")
    x, dy, before = inputs.x, inputs.dy, compiled()
    for m in rows_given():
        inputs.x, inputs.dy = x[:m], dy[:m]
        step_of(inputs, dora, p, train)()
    grown = compiled() - before
    assert compiled().total() > 0 and max(grown.values(), default=0) <= MOST, grown


# The same bits.

SHAPES = [
    (m, k, n) for k, n in ((2048, 2048), (4096, 1024), (520, 776)) for m in (1, 2, 17, 63, 64, 65, 127, 256, 511, 1023)
]


@pytest.mark.medium
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    "device, shape, dora, train, p",
    crossed(
        [
            ((m, 72, 136), dora, train, 0.2 * ((i + dora + train) % 2))
            for i, m in enumerate((1, 2, 17, 65))
            for dora, train in product((False, True), repeat=2)
        ],
        SHAPES,
        (False, True),
        (True, False),
        (0.0, 0.2),
    ),
    ids=named,
)
def test_two_runs_give_the_same_bits(device, shape, dora, train, p):
    step = step_of(draw(*shape, 8, HALF if device == "cpu" else BF16, device), dora, p, train)
    first, again = step(), step()
    assert not any(t.isnan().any() for t in first)
    assert all(map(torch.equal, first, again))


class Fresh(TorchDispatchMode):
    """Within, memory that is made is kept; with ``spoils`` it is full of NaN."""

    def __init__(self, spoils=False):
        super().__init__()
        self.spoils, self.made = spoils, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if "empty" in func.name():
            self.made.append(torch.empty(0, dtype=torch.uint8, device=out.device).set_(out.untyped_storage()))
            if self.spoils:
                self.made[-1].fill_(255)
        return out

    def spoil(self):
        """With bytes that are NaN in every dtype."""
        for memory in self.made:
            memory.fill_(255)

    def has(self, tensors):
        """Whether all of them lie in memory that was made within."""
        return {t.untyped_storage().data_ptr() for t in tensors} <= {memory.data_ptr() for memory in self.made}


@pytest.mark.interpreted
@BOTH
@pytest.mark.parametrize("adapter", [None, FLOAT], ids=str)
def test_a_step_in_spoilt_memory(dora, adapter):
    """What the next test spoils before each replay is all that a step makes: room, scratch and results."""
    step = step_of(draw(17, 72, 136, 8, HALF, adapter=adapter), dora)
    expected = step()
    with Fresh(spoils=True) as fresh:
        found = step()
    assert all(map(torch.equal, found, expected))
    assert fresh.has(found) and len(fresh.made) >= len(found) + 2, "and room and scratch"


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(256, 2048, 2048, 16), (512, 4096, 1024, 16), (1024, 2048, 4096, 16)], ids=str)
@pytest.mark.parametrize("adapter", [None, FLOAT], ids=str)
@BOTH
def test_graph_replays_in_spoilt_memory(shape, adapter, dora):
    """Kernels that start while the one before them ends wait for what it makes: 10,000 replays of two graphs on two
    streams at once, give the same bits, though all that they do not read as inputs is NaN before each."""
    steps = []
    for seed in range(2):
        step, held = step_of(draw(*shape, BF16, "cuda", seed, adapter=adapter), dora), []

        def kept(step=step, held=held):
            with Fresh() as fresh:
                held[:] = step(), fresh

        replay = graphed(kept)  # the last call is the graph's
        replay()
        out, fresh = held
        assert fresh.has(out)
        wrong = torch.zeros((), dtype=torch.int64, device="cuda")
        steps.append((step, replay, out, fresh, [t.clone() for t in out], wrong, torch.cuda.Stream()))
    torch.cuda.synchronize()
    for _ in range(10_000):
        for _, replay, out, fresh, expected, wrong, stream in steps:
            with torch.cuda.stream(stream):
                fresh.spoil()
                replay()
                for t, want in zip(out, expected, strict=True):
                    wrong += (t != want).any()
        torch.cuda.synchronize()
    assert not any(t.isnan().any() for *_, expected, _, _ in steps for t in expected)
    assert [wrong.item() for *_, wrong, _ in steps] == [0, 0]
