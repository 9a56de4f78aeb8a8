"""DoRA's norm is kept in evaluation, as long as it holds."""

import copy
import gc
import pickle

import pytest
import torch
from kept import launched, new_data, norms_made, step, write
from torch import nn

from lora_fast import DoRALinear, set_backend
from lora_fast.fp8 import Fp8Weight
from lora_fast.functional import dora_linear
from lora_fast.kept import Kept

HALF, FLOAT = torch.float16, torch.float32
PARTS = "weight", "lora_A", "lora_B", "lora_magnitude_vector"


@pytest.fixture(autouse=True)
def on_this_path(path):
    torch.manual_seed(0)
    set_backend(path[0])


def made(device, dtype=FLOAT, k=64, n=48, r=5, base_dtype=None):
    """A layer whose every part matters, as after training, in evaluation mode."""
    base = nn.Linear(k, n, device=device, dtype=dtype)
    layer = DoRALinear.from_linear(base, r, 2 * r, init_lora_weights=False, base_dtype=base_dtype)
    with torch.no_grad():
        layer.lora_magnitude_vector *= torch.linspace(-1, 2, n, device=device)
    return layer.eval()


def anew(layer, x):
    """What the layer gives where nothing is kept."""
    parts = (getattr(layer, name) for name in PARTS)
    with torch.no_grad():
        return dora_linear(x, *parts, layer.scaling, layer.bias)


def _same(y, expected):
    """The bits of what is made anew; where more rows than decoding's read copies that are kept, up to rounding."""
    if len(y) > 64 and y.element_size() == 2:
        torch.testing.assert_close(y, expected, rtol=1e-2, atol=1e-2)
    else:
        assert torch.equal(y, expected), "another y than without a kept norm"


def evaluated(layer, x):
    """y without gradients, as what is made anew gives it; and how many norms it took."""
    with torch.no_grad(), norms_made() as norms:
        y = layer(x)
        count = len(norms)
    _same(y, anew(layer, x))
    return count


@pytest.mark.medium
@pytest.mark.parametrize(
    "dtype, r, base_dtype",
    [
        (FLOAT, 5, None),
        (HALF, 16, None),
        (HALF, 5, "float8_e4m3"),
        (HALF, 130, None),
        *(
            pytest.param(torch.bfloat16, r, base_dtype, marks=pytest.mark.gpu)
            for r in (5, 16, 130)
            for base_dtype in (None, "float8_e4m3")
        ),
    ],
)
def test_the_norm_is_made_once(path, dtype, r, base_dtype):
    """Few rows and many, any order: adapters in float32 and in the base's dtype."""
    if path[1] == "cuda" and base_dtype and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no 8-bit matrix units")
    for cast in (False, True):
        layer = made(path[1], dtype, r=r, base_dtype=base_dtype)
        if cast:
            for name in PARTS[1:]:
                setattr(layer, name, nn.Parameter(getattr(layer, name).detach().to(dtype)))
        counts = [evaluated(layer, torch.randn(m, 64, device=path[1], dtype=dtype)) for m in (3, 70, 1, 3)]
        assert counts == [1, 0, 0, 0]


@pytest.mark.interpreted
def test_decoding_reads_the_copies_that_are_kept_too():
    set_backend("triton")
    layer, x = made("cpu", HALF), torch.randn(3, 64, dtype=HALF)
    names = []
    for _ in range(2):
        with torch.no_grad(), launched() as kernels:
            layer(x)
        names.append(kernels)
    assert names == [["_cast_kernel", "_norm_kernel", "_decode_kernel"], ["_decode_kernel"]]


@pytest.mark.interpreted
def test_the_kernels_that_make_it_do_not_depend_on_the_rows():
    """Many ranks, whose parts find room in y or do not: the bits would be others."""
    set_backend("triton")
    layer = made("cpu", HALF, r=130)
    for m in (1, 70):
        with launched() as kernels:
            anew(layer, torch.randn(m, 64, dtype=HALF))
        assert {"_norm_parts_kernel", "_gain_kernel"} <= {*kernels}


def train_and_back(layer, x):
    layer.train()
    layer.eval()


def evaluate_again(layer, x):
    layer.eval()


def to_where_it_is(layer, x):
    layer.to(x.device)


def to_double_and_back(layer, x):
    layer.double().float()


def merge_and_back(layer, x):
    layer.merge()
    layer.unmerge()


def with_gradients(layer, x):
    layer(x)


def load(layer, x):
    layer.load_state_dict({name: 1.5 * t for name, t in layer.state_dict().items()})


def load_in_inference_mode(layer, x):
    with torch.inference_mode():
        load(layer, x)


def load_by_assigning(layer, x):
    layer.load_state_dict({name: t.clone() for name, t in layer.state_dict().items()}, assign=True)


def rescale(layer, x):
    layer.lora_alpha *= 3


def of_each_part(change):
    def of(name):
        def changed(layer, x):
            change(getattr(layer, name))

        changed.__name__ = f"{change.__name__}_{name}"
        return changed

    return [of(name) for name in PARTS]


def another(name):
    def changed(layer, x):
        own = getattr(layer, name)
        setattr(layer, name, nn.Parameter(own.detach(), requires_grad=own.requires_grad))  # in the same memory

    changed.__name__ = f"another_{name}"
    return changed


OF_PARTS = [*of_each_part(write), *of_each_part(new_data), *of_each_part(step), *map(another, PARTS)]
CHANGES = [
    train_and_back,
    evaluate_again,
    to_where_it_is,
    to_double_and_back,
    merge_and_back,
    with_gradients,
    load,
    load_in_inference_mode,
    load_by_assigning,
    rescale,
    *OF_PARTS,
]


@pytest.mark.medium
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_it_is_made_anew(path, change):
    if path == ("triton", "cpu") and change in OF_PARTS and not change.__name__.endswith("lora_B"):
        pytest.skip("one part stands for the others there: the interpreter is slow")
    layer, x = made(path[1]), torch.randn(3, 64, device=path[1])
    assert [evaluated(layer, x) for _ in range(2)] == [1, 0]
    change(layer, x)
    assert [evaluated(layer, x) for _ in range(2)] == [1, 0]


@pytest.mark.medium
def test_other_data_where_the_former_was(path):
    """The same address, as an allocator gives again what was freed."""
    if path[1] != "cpu":
        pytest.skip("memory of the test's own")
    layer, x, memory = made("cpu"), torch.randn(3, 64), bytearray(48 * 64 * 4)
    for _ in range(2):
        layer.weight.data = torch.frombuffer(memory, dtype=FLOAT).view(48, 64)
        torch.frombuffer(memory, dtype=FLOAT).normal_()
        gc.collect()  # Triton's interpreter leaves cycles
        assert [evaluated(layer, x) for _ in range(2)] == [1, 0]


def test_it_is_made_anew_for_another_dtype_of_the_products(path, dtype16):
    layer, x = made(path[1]), torch.randn(3, 64, device=path[1])
    for _ in range(2):
        assert evaluated(layer, x) == 1
        with torch.autocast(path[1], dtype=dtype16):
            evaluated(layer, x)
        layer.drop_kept_norm()


@pytest.mark.interpreted
def test_it_is_made_anew_on_another_path():
    layer, x = made("cpu"), torch.randn(3, 64)
    for backend in ("triton", "reference") * 2:
        set_backend(backend)
        assert evaluated(layer, x) == 1


@pytest.mark.medium
def test_over_an_fp8_base(path):
    """Another base, or what is loaded into this one."""
    layer, x = made(path[1], base_dtype="float8_e4m3"), torch.randn(3, 64, device=path[1])
    for change in (lambda: layer.weight.detach().copy_(2 * layer.weight.dequantise()), lambda: renew(layer)):
        assert [evaluated(layer, x) for _ in range(2)] == [1, 0]
        change()
        assert evaluated(layer, x) == 1
        layer.eval()


def renew(layer):
    layer.weight = nn.Parameter(Fp8Weight.quantise(3 * layer.weight.dequantise()), requires_grad=False)


def test_what_is_written_into_data(path):
    """As docs/peft.md has it: not seen until eval(), but for an adapter's on the CPU."""
    layer, x = made(path[1]), torch.randn(3, 64, device=path[1])
    evaluated(layer, x)
    layer.lora_B.data.mul_(2)
    if path[1] == "cpu":
        assert evaluated(layer, x) == 1
    layer.weight.data.mul_(2)
    with torch.no_grad(), norms_made() as norms:
        layer(x)
    assert len(norms) == 0
    layer.eval()
    assert evaluated(layer, x) == 1


@pytest.mark.medium
def test_nothing_is_kept_where_nobody_counts(path):
    """Tensors of inference mode have no version; with gradients and in training each forward makes its own."""
    with torch.inference_mode():
        layer, x = made(path[1]), torch.randn(3, 64, device=path[1])
        assert [evaluated(layer, x) for _ in range(2)] == [1, 1]
    layer = made(path[1])
    with torch.inference_mode():
        assert [evaluated(layer, x) for _ in range(2)] == [1, 0]
    assert evaluated(layer, x) == 0
    layer.train()
    assert [evaluated(layer, x) for _ in range(2)] == [1, 1]
    layer._is_fsdp_managed_module = True  # as FSDP marks them
    layer.eval()
    assert [evaluated(layer, x) for _ in range(2)] == [1, 1]


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_and_state_dicts_are_without(path, clone):
    layer, x = made(path[1]), torch.randn(3, 64, device=path[1])
    names, size = list(layer.state_dict()), len(pickle.dumps(layer.cpu()))
    layer.to(path[1])
    evaluated(layer, x)
    assert list(layer.state_dict()) == names
    assert len(pickle.dumps(layer)) < size + 200
    assert evaluated(clone(layer), x) == 1 and evaluated(layer, x) == 0


@pytest.mark.medium
def test_a_weight_that_is_replaced_is_freed(path):
    """What is kept knows the layer's tensors, but does not hold them."""
    layer, x = made(path[1]), torch.randn(3, 64, device=path[1])
    evaluated(layer, x)
    mark = vars(layer)["_kept_norm"].found.sources.marks[0]
    layer.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
    gc.collect()  # Triton's interpreter leaves cycles
    assert mark.tensor() is None and mark.storage.expired()


@pytest.mark.medium
def test_compiled(path):
    """One graph, that makes its own; new values compile nothing again."""
    torch._dynamo.reset()
    layer, x = made(path[1]), torch.randn(3, 64, device=path[1])
    run = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            torch.testing.assert_close(run(x), anew(layer, x))
            evaluated(layer, x)
            write(layer.lora_B)


def test_the_functional_form(path):
    layer, x, kept = made(path[1]), torch.randn(3, 64, device=path[1]), Kept()
    parts = [getattr(layer, name) for name in PARTS]
    for grad, count in ((False, 1), (False, 0), (True, 1), (False, 0)):
        with torch.set_grad_enabled(grad), norms_made() as norms:
            y = dora_linear(x, *parts, 2.0, layer.bias, kept=kept)
        assert len(norms) == count and torch.equal(y, anew(layer, x))
    scaling = torch.tensor(2.0, device=path[1])  # nobody reads its value
    with torch.no_grad(), norms_made() as norms:
        for _ in range(2):
            dora_linear(x, *parts, scaling, layer.bias, kept=kept)
    assert len(norms) == 2


def wrapped(net, by, mesh):
    """The net in the hands of a wrapper, and the tensor in which that keeps W."""
    layer = net[0]
    if by == "accelerate":
        net = pytest.importorskip("accelerate").cpu_offload(net, layer.weight.device)
        return net, vars(layer)["_hf_hook"].weights_map.dataset["0.weight"]
    if by == "FSDP1":
        from torch.distributed.fsdp import FullyShardedDataParallel

        net = FullyShardedDataParallel(net, use_orig_params=True, device_id=torch.device("cpu"))
        return net, layer.weight
    from torch.distributed.fsdp import fully_shard

    fully_shard(net, mesh=mesh)
    return net, layer.weight.to_local()


@pytest.mark.medium
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("by", ["FSDP1", "FSDP2", "accelerate"])
def test_where_a_wrapper_keeps_the_weights(path, by, late, mesh):
    """What it brings for a forward is new each time, or counts no versions. ``late``: a norm was kept before."""
    if path[1] != "cpu":
        pytest.skip("one process, gloo")
    layer, x = made("cpu"), torch.randn(3, 64)
    if late:
        evaluated(layer, x)
    expected = copy.deepcopy(layer)
    net, place = wrapped(nn.Sequential(layer), by, mesh)
    for _ in range(3):
        with torch.no_grad():
            assert torch.equal(net(x), expected(x))
            if by == "FSDP2":
                net.reshard()
            place.mul_(2)
            expected.weight.mul_(2)


# On a GPU


@pytest.mark.gpu
def test_on_another_stream():
    """Nobody says that what one stream makes is there when another one reads it."""
    layer, x = made("cuda"), torch.randn(3, 64, device="cuda")
    evaluated(layer, x)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        assert [evaluated(layer, x) for _ in range(2)] == [1, 0]
        torch.cuda.synchronize()


@pytest.mark.gpu
@pytest.mark.parametrize("fixed", [False, True])
def test_graphs(fixed):
    """They make the norm, so that replays see the weights change; or read the kept one, whose memory stays."""
    layer, x = made("cuda", HALF), torch.randn(3, 64, device="cuda", dtype=HALF)
    layer.keep_in_graphs = fixed
    evaluated(layer, x)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), norms_made() as norms, torch.cuda.graph(graph):
        y = layer(x)
    assert len(norms) == (not fixed)
    before = anew(layer, x)
    if fixed:
        layer.drop_kept_norm()
        filled = [torch.full((672,), torch.nan, device="cuda") for _ in range(100)]
    else:
        write(layer.lora_B)
        write(layer.weight)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, before if fixed else anew(layer, x)) and (not fixed or filled)
    assert evaluated(layer, x) == 1
