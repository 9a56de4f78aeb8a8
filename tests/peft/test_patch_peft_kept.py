"""A patched layer keeps DoRA's norm in evaluation, with PEFT's DoraCaching and without."""

import copy
import pickle

import pytest
import torch
from devices import PATHS
from kept import new_data, norms_made, step, write
from peft_nets import inputs, patched, stock_model

from lora_fast import patch_peft, set_backend, unpatch_peft

peft = pytest.importorskip("peft")
LORA, DORA = dict[str, bool](), {"use_dora": True}
OTHERS = LORA, DORA


@pytest.fixture(params=[False, True], ids=["", "DoraCaching"])
def caching(request):
    helpers = pytest.importorskip("peft.helpers")
    if request.param and not hasattr(helpers, "DoraCaching"):
        pytest.skip("this PEFT keeps no norms")
    if request.param:
        helpers.DoraCaching()(enabled=True)
    yield request.param
    if request.param:
        helpers.DoraCaching()(enabled=False)


def model(path, dtype=torch.float32, more=OTHERS, **kwargs):
    """With "default", which is DoRA, "more0", which is not, and "more1", which is."""
    ours = patched(stock_model(path[1], dtype, more, use_dora=True), path).eval()
    if kwargs:
        patch_peft(ours, **kwargs)
    return ours


def activate(ours, *names):
    ours.base_model.set_adapter(list(names))


def evaluated(ours, x):
    """y without gradients, the bits of a copy's, which has nothing kept; and how many norms the two layers made."""
    with torch.no_grad(), norms_made() as norms:
        y = ours(x)
        count = len(norms)
        assert torch.equal(y, copy.deepcopy(ours)(x)), "another y than without a kept norm"
    return count


def up(ours):
    return ours.base_model.model.up


@pytest.mark.medium
@pytest.mark.parametrize(
    "dtype, base_dtype",
    [
        (torch.float32, None),
        (torch.float16, "float8_e4m3"),
        pytest.param(torch.bfloat16, None, marks=pytest.mark.gpu),
        pytest.param(torch.bfloat16, "float8_e4m3", marks=pytest.mark.gpu),
    ],
)
def test_the_norm_is_made_once(path, caching, dtype, base_dtype):
    if path[1] == "cuda" and base_dtype and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no 8-bit matrix units")
    ours = model(path, dtype, **({} if base_dtype is None else {"base_dtype": base_dtype}))
    assert [evaluated(ours, inputs(path, *shape, 16, dtype=dtype)) for shape in ((3,), (2, 40), (1, 1))] == [2, 0, 0]


def train_and_back(ours, x):
    ours.train()
    ours.eval()


def to_where_it_is(ours, x):
    ours.to(x.device)


def merge_and_back(ours, x):
    ours.merge_adapter()
    ours.unmerge_adapter()


def with_gradients(ours, x):
    ours(x)


def with_gradients_in_stock_peft(ours, x):
    activate(ours, "default", "more1")
    ours(x)
    activate(ours, "default")


def load(ours, x):
    ours.load_state_dict({name: 1.5 * t for name, t in ours.state_dict().items()})


def load_an_adapter(ours, x):
    values = peft.get_peft_model_state_dict(ours)
    peft.set_peft_model_state_dict(ours, {name: 1.5 * t for name, t in values.items()})


def add_an_adapter_that_changes_the_base(ours, x):
    ours.add_adapter("late", peft.LoraConfig(target_modules=["up", "down"], init_lora_weights="olora"))


def another_adapter(ours, x):
    activate(ours, "more1")


def rescale(ours, x):
    for layer in (up(ours), ours.base_model.model.down):
        layer.scaling["default"] *= 3


def of_each_part(change):
    def of(name):
        def changed(ours, x):
            for layer in (up(ours), ours.base_model.model.down):
                change(PARTS[name](layer).weight)

        changed.__name__ = f"{change.__name__}_{name}"
        return changed

    return map(of, PARTS)


PARTS = {
    "base": lambda layer: layer.base_layer,
    "A": lambda layer: layer.lora_A["default"],
    "B": lambda layer: layer.lora_B["default"],
    "magnitude": lambda layer: layer.lora_magnitude_vector["default"],
}
CHANGES = [
    train_and_back,
    to_where_it_is,
    merge_and_back,
    with_gradients,
    with_gradients_in_stock_peft,
    load,
    load_an_adapter,
    add_an_adapter_that_changes_the_base,
    another_adapter,
    rescale,
    *of_each_part(write),
    *of_each_part(new_data),
    *of_each_part(step),
]


@pytest.mark.versions
@pytest.mark.medium
@pytest.mark.parametrize(
    "path, change",
    [
        pytest.param(path[:2], change, marks=path[2], id=f"{'-'.join(path[:2])}-{change.__name__}")
        for path in PATHS
        for change in (CHANGES[::3] if path[:2] == ("triton", "cpu") else CHANGES)  # a change is seen before any path
    ],
)
def test_it_is_made_anew(path, change):
    ours, x = model(path), inputs(path)
    assert [evaluated(ours, x) for _ in range(2)] == [2, 0]
    change(ours, x)
    assert [evaluated(ours, x) for _ in range(2)] == [2, 0]


@pytest.mark.medium
def test_between_calls_with_several_adapters(path, caching):
    """These are stock PEFT's, or sums of adapters that are LoRA's: neither reads what is kept, nor does it outlive a
    change."""
    ours, x = model(path, more=(LORA, DORA, LORA)), inputs(path)
    for several in (["default", "more1"], ["more0", "more2"]):
        activate(ours, "default")
        evaluated(ours, x)
        activate(ours, *several)
        for change in (lambda: None, lambda: write(up(ours).lora_B["default"].weight)):
            change()
            with torch.no_grad():
                assert torch.equal(ours(x), copy.deepcopy(ours)(x))
        activate(ours, "default")
        assert [evaluated(ours, x) for _ in range(2)] == [1, 0]


def test_files_copies_and_the_stock_layer_are_without(path):
    ours, x = model(path), inputs(path)
    names = list(ours.state_dict())
    evaluated(ours, x)
    assert list(ours.state_dict()) == names
    again = pickle.loads(pickle.dumps(ours))
    assert evaluated(again, x) == 2
    up(again).keep_in_graphs = True
    set_backend("auto")
    unpatch_peft(again)
    assert not {"_kept_norm", "keep_in_graphs"} & vars(up(again)).keys()


@pytest.mark.medium
def test_compiled(path, caching):
    torch._dynamo.reset()
    ours, x = model(path), inputs(path)
    run = torch.compile(ours, backend="aot_eager", fullgraph=True)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            torch.testing.assert_close(run(x), ours(x))
            write(up(ours).lora_B["default"].weight)


@pytest.mark.gpu
def test_graphs(caching):
    """A graph makes the norm, as stock PEFT's does; under DoraCaching it reads the kept one, as stock's does."""
    ours, x = model(("triton", "cuda"), torch.float16), inputs(("triton", "cuda"), dtype=torch.float16)
    evaluated(ours, x)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), norms_made() as norms, torch.cuda.graph(graph):
        ours(x)
    assert len(norms) == (0 if caching else 2)
