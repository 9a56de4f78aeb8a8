"""Gated MLPs and layers with one input, joined in models that were not written so: what runs together, what comes
apart, and that numbers, state and copies are as without."""

import contextlib
import copy
import pickle
import threading
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lora_fast import LoRAConfig, SlowPathWarning, add_lora, dispatch, merge_lora, patch_peft, remove_lora, unpatch_peft
from lora_fast.blocks import gated, joining, siblings
from lora_fast.blocks.joining import joined_in

pytestmark = pytest.mark.filterwarnings("ignore:lora_fast takes the plain torch path")


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)
        self.act = nn.SiLU()

    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.up(x))


class Attention(nn.Module):
    """Of another one's states, if there are such."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))
        self.fail = False

    def forward(self, x, other=None):
        q = self.q(x)
        if self.fail:
            raise KeyError("between siblings")
        states = x if other is None else other
        k = self.k(x) if other is None else self.k(states)
        v = self.v(x)
        return self.o(torch.tanh(q * k) + v)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.mlp = Attention(), Mlp()

    def forward(self, x, other=None):
        return self.mlp(x + self.attention(x, other))


def nets(**settings):
    """(layer by layer, joined): the same layers with adapters that are not zero."""
    torch.manual_seed(0)
    config = LoRAConfig(4, 8, target_modules="all-linear", init_lora_weights=False, **settings)
    apart = add_lora(Net(), config, blocks=False)
    joined = copy.deepcopy(apart)
    joining.join(joined)
    return apart, joined


@pytest.fixture
def ran(monkeypatch):
    """How often groups and MLPs ran as one."""
    counts = {"group": 0, "glu": 0}

    def counting(name, run):
        def called(*args, **kwargs):
            counts[name] += 1
            return run(*args, **kwargs)

        return called

    monkeypatch.setattr(siblings, "lora_group", counting("group", siblings.lora_group))
    monkeypatch.setattr(gated, "lora_glu", counting("glu", gated.lora_glu))
    monkeypatch.setattr(gated, "lora_mlp", counting("glu", gated.lora_mlp))
    dispatch._told.clear()
    yield counts
    dispatch._told.clear()


def results(net, x, *args):
    net.zero_grad()
    x = x.clone().requires_grad_()
    y = net(x, *args)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in net.parameters() if p.requires_grad)]


def same(net, expected, *args):
    x = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(1))
    for ours, theirs in zip(results(net, x, *args), results(expected, x, *args), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_numbers_are_those_of_the_layers(ran):
    apart, joined = nets()
    assert isinstance(joined.mlp, Mlp) and type(joined.mlp).__name__ == "Mlp"
    found = joined_in(joined)
    assert list(found.blocks) == ["mlp"] and found.groups == {"attention": (("q", "v"),)} and not found.refused
    assert apart.state_dict().keys() == joined.state_dict().keys()
    same(joined, apart)
    assert ran == {"group": 1, "glu": 1}


@pytest.mark.parametrize("dora", [False, True])
def test_dropout_and_dora(dora, ran):
    apart, joined = nets(lora_dropout=0.5, use_dora=dora)
    assert apart.training
    joined(torch.randn(2, 8))
    assert ran == {"group": 1, "glu": 1}
    same(joined.eval(), apart.eval())


def test_evaluation_runs_layer_by_layer(ran):
    _, joined = nets()
    with torch.no_grad():
        joined.eval()(torch.randn(2, 8))
        assert ran == {"group": 0, "glu": 0}
        joined.train()(torch.randn(2, 8))  # as a reentrant checkpoint's first forward: the same masks must be drawn
    assert ran == {"group": 1, "glu": 1}


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant, ran):
    apart, joined = nets(lora_dropout=0.3)

    def run(net):
        torch.manual_seed(3)
        net.zero_grad()
        x = torch.randn(4, 8, requires_grad=True)
        torch.utils.checkpoint.checkpoint(net, x, use_reentrant=reentrant).square().sum().backward()
        return [p.grad for p in net.parameters() if p.requires_grad]

    found = run(joined)
    assert ran == {"group": 2, "glu": 2}
    torch.manual_seed(3)
    joined.zero_grad()
    joined(torch.randn(4, 8, requires_grad=True)).square().sum().backward()
    for ours, theirs in zip(found, [p.grad for p in joined.parameters() if p.requires_grad], strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_sibling_with_another_input_makes_its_own(ran):
    """The prediction may be wrong: that costs a product, and the report says so."""
    apart, joined = nets()
    changed = lambda module, args: (args[0] * 2,)  # noqa: E731
    apart.attention.v.register_forward_pre_hook(changed)
    joined.attention.v.register_forward_pre_hook(changed)
    same(joined, apart)
    assert joined_in(joined).wasted == {"attention.v": (1, 1)}


class Writes(Attention):
    def forward(self, x, other=None):
        x = x.clone()
        q = self.q(x)
        with torch.no_grad():
            x.mul_(2)
        return q, self.v(x)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_x_changed_in_place_between_siblings(mode):
    torch.manual_seed(0)
    net = add_lora(Writes(), LoRAConfig(4, target_modules=["q", "v"], init_lora_weights=False))
    assert net.q._siblings is net.v._siblings
    x = torch.randn(2, 8)
    with mode():
        q, v = net(x)
    torch.testing.assert_close(q, net.q(x))
    torch.testing.assert_close(v, net.v(2 * x))


AGAIN = partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)


class Checkpoints(Attention):
    """Around some of its siblings."""

    def forward(self, x, other=None):
        run_q, run_v = self.run
        return run_q(lambda x: self.q(x), x) + run_v(lambda x: self.v(x), x)


def _once(f, x):
    return f(x)


@pytest.mark.parametrize(("run", "groups"), [((AGAIN, _once), 0), ((_once, AGAIN), 1), ((AGAIN, AGAIN), 0)])
def test_a_checkpoint_around_siblings(run, groups, ran):
    """Which makes its layer again, and not the others."""
    torch.manual_seed(0)
    apart = add_lora(Checkpoints(), LoRAConfig(4, target_modules=["q", "v"], init_lora_weights=False), blocks=False)
    joined = copy.deepcopy(apart)
    joining.join(joined)
    joined.run = apart.run = run
    assert joined.q._siblings is joined.v._siblings
    same(joined, apart)
    assert ran["group"] == groups


def test_a_checkpoint_within_the_parent_around_its_forward(ran):
    apart, joined = nets()
    for net in (apart, joined):
        net.attention.forward = partial(AGAIN, net.attention.forward)
    same(joined, apart)
    assert ran["group"] == 0


def test_a_layer_called_from_elsewhere(ran):
    apart, joined = nets()
    x = torch.randn(2, 8)
    torch.testing.assert_close(joined.attention.q(x), apart.attention.q(x))
    assert ran["group"] == 0


def test_an_exception_between_siblings_leaves_nothing(ran):
    apart, joined = nets()
    joined.attention.fail = True
    with pytest.raises(KeyError):
        joined(torch.randn(2, 8))
    joined.attention.fail = False
    assert not joined.attention.q._siblings._open
    same(joined, apart)


def test_nothing_is_held_after_the_call():
    _, joined = nets()
    joined(torch.randn(2, 8))
    assert not joined.attention.q._siblings._open


def test_threads():
    apart, joined = nets()
    x = torch.randn(2, 8)
    expected, found = apart(x), {}

    def work(i):
        found[i] = joined(x)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(4):
        torch.testing.assert_close(found[i], expected)


def test_a_parent_inside_of_itself(ran):
    class Twice(Attention):
        def forward(self, x, other=None):
            q = self.q(x)
            if other is None:
                q = q + Twice.__call__(self, x, x)
            return q + self.v(x)

    torch.manual_seed(0)
    net = add_lora(Twice(), LoRAConfig(4, target_modules=["q", "v"], init_lora_weights=False))
    x = torch.randn(2, 8)
    torch.testing.assert_close(net(x), 2 * net.q(x) + 2 * net.v(x))
    assert ran["group"] == 2


class Interrupted(Attention):
    """Whose forward is interrupted between q and v, as by Ctrl-C, where it is told to be."""

    interrupt = False

    def forward(self, x, other=None):
        q = self.q(x)
        if self.interrupt:
            raise KeyboardInterrupt
        return q + self.v(x)


def test_an_interrupt_leaves_nothing_to_the_next_call(ran):
    torch.manual_seed(0)
    net = add_lora(Interrupted(), LoRAConfig(4, target_modules=["q", "v"], init_lora_weights=False))
    x, open_calls = torch.randn(2, 8), net.q._siblings._open
    net.interrupt = True
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            net(x)
        ((left,),) = open_calls.values()  # torch calls no hook then; never more than one call's
    net.interrupt = False
    with torch.no_grad():
        net.q.lora_B.add_(1)
    torch.testing.assert_close(net(x), net.q(x) + net.v(x))
    assert not open_calls and ran["group"] == 3


def test_an_interrupt_within_a_parent_inside_of_itself(ran):
    class Tries(Interrupted):
        def forward(self, x, other=None):
            if other is None:
                q = self.q(x)
                self.interrupt = True
                with contextlib.suppress(KeyboardInterrupt):
                    self(2 * x, x)
                self.interrupt = False
                return q + self(3 * x, x) + self.v(x)
            return super().forward(x)

    torch.manual_seed(0)
    net = add_lora(Tries(), LoRAConfig(4, target_modules=["q", "v"], init_lora_weights=False))
    x = torch.randn(2, 8)
    torch.testing.assert_close(net(x), net.q(x) + net.v(x) + net.q(3 * x) + net.v(3 * x))
    assert not net.q._siblings._open and ran["group"] == 3


def test_hooks_that_somebody_cleared(ran):
    """Without the one that ends a call none begins."""
    apart, joined = nets()
    joined.attention._forward_hooks.clear()
    same(joined, apart)
    assert not joined.attention.q._siblings._open and ran["group"] == 0


APART = {
    "a hook on gate": (lambda net: net.mlp.gate.register_forward_hook(lambda *a: None), "hooks", "glu"),
    "a forward put in place": (lambda net: setattr(net.mlp.up, "forward", net.mlp.up.forward), "hooks", "glu"),
    "an x in 8 bits": (lambda net: setattr(net.attention.v, "save_x", "fp8"), "save_x", "group"),
}


@pytest.mark.parametrize("name", APART)
def test_what_comes_apart_is_told_once(name, ran):
    change, why, what = APART[name]
    apart, joined = nets()
    change(apart)
    change(joined)
    with pytest.warns(SlowPathWarning, match=f"layer by layer: .*{why}"):
        same(joined, apart)
    assert ran[what] == 0


def test_what_is_switched_off_is_not_told(ran, recwarn):
    apart, joined = nets()
    for net in (apart, joined):
        net.mlp.up.disable()
        net.attention.v.merge()
    same(joined, apart)
    assert ran == {"group": 0, "glu": 0} and not [w for w in recwarn if "layer by layer" in str(w.message)]


def test_merge_and_remove():
    apart, joined = nets()
    x = torch.randn(2, 8)
    merge_lora(joined)
    torch.testing.assert_close(joined(x), apart(x))
    plain = remove_lora(joined)
    assert type(plain.mlp) is Mlp and not plain.attention._forward_hooks and not plain.attention._forward_pre_hooks
    assert not any(key in vars(module) for module in plain.modules() for key in (siblings.SIBLINGS, gated.MLP))


def test_copies_are_their_own(ran):
    apart, joined = nets()
    twin = copy.deepcopy(joined)
    assert twin.attention.q._siblings is twin.attention.v._siblings is not joined.attention.q._siblings
    assert type(twin.mlp) is type(joined.mlp)
    same(twin, apart)
    assert ran == {"group": 1, "glu": 1}
    again = pickle.loads(pickle.dumps(joined))
    same(again, apart)
    assert ran == {"group": 2, "glu": 2}
    unpickled = remove_lora(again)
    assert not unpickled.attention._forward_hooks


def test_only_some_outputs_used(ran):
    """The adapters of an output that no loss depends on get no gradient, as without."""

    class Drops(Attention):
        def forward(self, x, other=None):
            self.q(x)
            return self.v(x)

    torch.manual_seed(0)
    net = add_lora(Drops(), LoRAConfig(4, target_modules=["q", "v"], init_lora_weights=False))
    net(torch.randn(2, 8)).sum().backward()
    assert ran["group"] == 1 and net.q.lora_A.grad is None and net.v.lora_A.grad is not None


def test_a_forward_that_tracing_takes_for_another():
    """isinstance of a proxy is False: so two rows are looked at in the first call."""

    class Sly(Mlp):
        def forward(self, x):
            if isinstance(x, torch.Tensor):
                x = x + 1
            return self.down(self.act(self.gate(x)) * self.up(x))

    torch.manual_seed(0)
    net = Sly()
    expected = copy.deepcopy(net)
    add_lora(net, LoRAConfig(4, target_modules="all-linear"))
    assert isinstance(net, gated.FastMlp)
    x = torch.randn(2, 8)
    with pytest.warns(SlowPathWarning, match="gives other numbers"):
        torch.testing.assert_close(net(x), expected(x))


FIRST = {
    "NaN": (torch.full((2, 8), torch.nan), 0),
    "infinite": (torch.full((2, 8), torch.inf), 0),
    "too large": (torch.full((2, 8), 1e38), 0),  # finite, and the output is not
    "empty": (torch.empty(0, 8), 0),
    "one row of NaN": (torch.cat([torch.full((1, 8), torch.nan), torch.ones(2, 8)]), 1),
}


@pytest.mark.parametrize("name", FIRST)
def test_a_first_batch_that_tells_nothing(name, ran, recwarn):
    """Rows that cannot be compared say nothing of the class: the next batch does."""
    first, blocks = FIRST[name]
    apart, joined = nets()
    gated._probed.clear()
    torch.testing.assert_close(joined.mlp(first), apart.mlp(first), equal_nan=True)
    assert ran["glu"] == blocks
    same(joined.mlp, apart.mlp)
    assert ran["glu"] == blocks + 1 and not any(issubclass(w.category, SlowPathWarning) for w in recwarn)


def test_the_probe_draws_nothing():
    _, joined = nets(lora_dropout=0.5)
    gated._probed.clear()
    torch.manual_seed(5)
    first = joined(torch.ones(2, 8))
    torch.manual_seed(5)
    torch.testing.assert_close(joined(torch.ones(2, 8)), first)


@pytest.mark.medium
def test_compiled(ran):
    apart, joined = nets()
    torch._dynamo.reset()
    compiled = torch.compile(joined, fullgraph=True, backend="aot_eager")
    same(compiled, apart)
    assert ran == {"group": 1, "glu": 1} and not joined.attention.q._siblings._open


def test_the_tail_of_a_chain_of_adapters_without_one(ran):
    """A layer without an adapter may be in a block, not in a group."""
    torch.manual_seed(0)
    config = LoRAConfig(4, target_modules=["gate", "up", "q"], init_lora_weights=False)
    net = add_lora(Net(), config)
    apart = add_lora(Net(), config, blocks=False)
    apart.load_state_dict(net.state_dict())
    assert joined_in(net).groups == {}
    same(net, apart)
    assert ran == {"group": 0, "glu": 1}


@pytest.mark.medium
@pytest.mark.parametrize("base_dtype", ["float8_e4m3", "nf4"])
def test_packed_bases(base_dtype, ran):
    torch.manual_seed(0)
    net = nn.Sequential(Mlp())
    for name, (k, n) in {"gate": (64, 128), "up": (64, 128), "down": (128, 64)}.items():
        setattr(net[0], name, nn.Linear(k, n))
    config = LoRAConfig(4, target_modules="all-linear", base_dtype=base_dtype, init_lora_weights=False)
    apart = add_lora(net, config, blocks=False)
    joined = copy.deepcopy(apart)
    joining.join(joined)
    assert list(joined_in(joined).blocks) == ["0"]
    x = torch.randn(3, 5, 64)
    for ours, theirs in zip(results(joined, x), results(apart, x), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert ran == {"group": 0, "glu": 1}
    torch._dynamo.reset()
    compiled = torch.compile(joined, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(results(compiled, x), results(apart, x), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert ran == {"group": 0, "glu": 2}


def test_bad_blocks():
    with pytest.raises(ValueError, match="blocks: got True, expected"):
        add_lora(Net(), LoRAConfig(4), blocks=True)


def peft_net(**settings):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=["gate", "up", "down", "q", "v"], init_lora_weights=False, **settings)
    return peft.get_peft_model(Net(), config)


def test_patch_peft_and_back(ran):
    stock = peft_net()
    model = copy.deepcopy(stock)
    report = patch_peft(model)
    prefix = "base_model.model."
    assert report.blocks == (f"{prefix}mlp",)
    assert report.groups == ((f"{prefix}attention.q", f"{prefix}attention.v"),)
    text = str(report)
    assert "gate, up, down in one step (silu)" in text and "(3 in 1 blocks, 2 in 1 groups)" in text
    same(model, stock)
    assert ran == {"group": 1, "glu": 1}
    with model.disable_adapter():
        with stock.disable_adapter():
            same(model, stock)
    unpatch_peft(model)
    assert type(model.base_model.model.mlp) is Mlp and not model.base_model.model.attention._forward_hooks
    same(model, stock)
    assert not patch_peft(model, blocks=False).blocks
    assert patch_peft(model).blocks and not patch_peft(model, blocks=False).groups


def test_adapters_that_come_later_are_joined(ran):
    peft = pytest.importorskip("peft")
    model = peft_net()
    patch_peft(model)
    more = peft.LoraConfig(r=4, target_modules=["k", "q", "v"], init_lora_weights=False)
    model.add_adapter("more", more)
    stock = copy.deepcopy(model)
    unpatch_peft(stock)
    model.set_adapter("more")
    stock.set_adapter("more")
    same(model, stock)
    assert ran["group"] == 1


def test_refused_modules_are_reported():
    class Clamped(Mlp):
        def forward(self, x):
            return self.down(self.act(self.gate(x)).clamp(max=7) * self.up(x))

    peft = pytest.importorskip("peft")
    net = Net()
    net.mlp = Clamped()
    model = peft.get_peft_model(net, peft.LoraConfig(r=4, target_modules=["gate", "up", "down"]))
    report = patch_peft(model)
    assert report.blocks == () and report.groups == (("base_model.model.mlp.gate", "base_model.model.mlp.up"),)
    assert "no block" in str(report) and "not given act(gate(x)) * up(x)" in str(report)


def test_a_gelu_by_its_type(ran):
    """Both are "gelu" in configurations; the numbers are those of the module."""
    for act in (nn.GELU(), nn.GELU(approximate="tanh")):
        torch.manual_seed(0)
        net = Net()
        net.mlp.act = act
        apart = add_lora(copy.deepcopy(net), LoRAConfig(4, target_modules="all-linear"), blocks=False)
        joined = add_lora(net, LoRAConfig(4, target_modules="all-linear"))
        joined.load_state_dict(apart.state_dict())
        assert joined.mlp._mlp.activation == {"none": "gelu", "tanh": "gelu_tanh"}[act.approximate]
        same(joined, apart)
    assert ran["glu"] == 2


def test_its_own_dropout(ran):
    class Drops(Mlp):
        def __init__(self):
            super().__init__()
            self.drop = nn.Dropout(0.5)

        def forward(self, x):
            return self.down(self.drop(self.act(self.gate(x)) * self.up(x)))

    net = add_lora(Drops(), LoRAConfig(4, target_modules="all-linear"))
    with pytest.warns(SlowPathWarning, match="drops elements itself"):
        net(torch.randn(2, 8))
    assert ran["glu"] == 0
    net.eval()(torch.randn(2, 8, requires_grad=True))
    assert ran["glu"] == 1


class Fc(nn.Module):
    """GPT-2's form, with a dropout between, too, which T5 has."""

    def __init__(self, p=0.0):
        super().__init__()
        self.fc1, self.fc2, self.act = nn.Linear(8, 12), nn.Linear(12, 8), nn.GELU()
        self.inner, self.dropout = nn.Dropout(p), nn.Dropout(0.5)

    def forward(self, x):
        return self.dropout(self.fc2(self.inner(self.act(self.fc1(x)))))


class GateUp(nn.Module):
    """Phi-3's."""

    def __init__(self):
        super().__init__()
        self.gate_up, self.down, self.act = nn.Linear(8, 24, bias=False), nn.Linear(12, 8, bias=False), nn.SiLU()

    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(up * self.act(gate))


def _sequential():
    return nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))


TWO = pytest.mark.parametrize("kind", [Fc, GateUp])


def with_mlp(kind, **settings):
    """As ``nets``, with another MLP."""
    torch.manual_seed(0)
    net = Net()
    net.mlp = kind()
    config = LoRAConfig(4, 8, target_modules="all-linear", init_lora_weights=False, **settings)
    apart = add_lora(net, config, blocks=False)
    joined = copy.deepcopy(apart)
    joining.join(joined)
    return apart, joined


@TWO
@pytest.mark.parametrize("dora", [False, True])
def test_two_layers(kind, dora, ran):
    apart, joined = with_mlp(kind, use_dora=dora, lora_dropout=0.3)
    assert list(joined_in(joined).blocks) == ["mlp"] and type(joined.mlp).__name__ == kind.__name__
    joined(torch.randn(2, 8))
    assert ran == {"group": 1, "glu": 1}
    same(joined.eval(), apart.eval())
    twin = copy.deepcopy(joined)
    again = pickle.loads(pickle.dumps(joined))
    same(twin, apart)
    same(again, apart)
    assert ran == {"group": 4, "glu": 4}
    merge_lora(joined)
    merge_lora(apart)
    same(joined, apart)
    assert ran["glu"] == 4 and type(remove_lora(joined).mlp) is kind
    assert not any(gated.MLP in vars(module) for module in joined.modules())


@TWO
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_of_two_layers(kind, reentrant, ran):
    """The module's own dropout draws the same mask again."""
    _, joined = with_mlp(kind, lora_dropout=0.3)

    def run(step):
        torch.manual_seed(3)
        joined.zero_grad()
        step(torch.randn(4, 8, requires_grad=True)).square().sum().backward()
        return [p.grad for p in joined.parameters() if p.requires_grad]

    found = run(lambda x: torch.utils.checkpoint.checkpoint(joined, x, use_reentrant=reentrant))
    assert ran == {"group": 2, "glu": 2}
    for ours, theirs in zip(found, run(joined), strict=True):
        torch.testing.assert_close(ours, theirs)


@TWO
def test_hooks_on_two_layers(kind, ran):
    apart, joined = with_mlp(kind)
    seen = []
    for net in (apart.eval(), joined.eval()):
        net.mlp.act.register_forward_hook(lambda *given: seen.append(given[2].shape))
    with pytest.warns(SlowPathWarning, match="block layer by layer: act has hooks"):
        same(joined, apart)
    assert ran["glu"] == 0 and len(seen) == 2


class Flagged(Fc):
    """Whose forward rests on the instance's own attributes, too."""

    def __init__(self):
        super().__init__()
        self.residual, self.function, self._private = False, F.gelu, 0.0

    def forward(self, x):
        y = self.fc2(self.inner(self.function(self.fc1(x))))
        y = y + x if self.residual else y
        return 2 * y if self._private else y


LATER = {
    "another activation": (Fc, lambda mlp: setattr(mlp, "act", nn.Tanh()), "its act changed"),
    "an activation's form": (Fc, lambda mlp: setattr(mlp.act, "approximate", "tanh"), "its act changed"),
    "no dropout": (Fc, lambda mlp: setattr(mlp, "inner", nn.Identity()), "its inner changed"),
    "another child there": (Fc, lambda mlp: setattr(mlp, "inner", nn.Tanh()), "its inner changed"),
    "a flag": (Flagged, lambda mlp: setattr(mlp, "residual", True), "its residual changed"),
    "one of its own": (Flagged, lambda mlp: setattr(mlp, "_private", 1.0), "its _private changed"),
    "a function": (Flagged, lambda mlp: setattr(mlp, "function", torch.tanh), "its function changed"),
    "one more step": (_sequential, lambda mlp: mlp.append(nn.Tanh()), "its list of children changed"),
    "a step less": (_sequential, lambda mlp: mlp.pop(1), "its list of children changed"),
    "a step put in": (_sequential, lambda mlp: mlp.insert(2, nn.Tanh()), "its list of children changed"),
}


@pytest.mark.parametrize("name", LATER)
def test_what_changes_later_is_seen(name, ran):
    """After the first call, and after a copy. What comes back is joined again."""
    kind, change, why = LATER[name]
    apart, joined = with_mlp(kind)
    apart, joined = apart.eval(), joined.eval()
    same(joined, apart)
    assert ran["glu"] == 1
    twin = pickle.loads(pickle.dumps(copy.deepcopy(joined)))
    same(twin, apart)
    assert ran["glu"] == 2
    change(apart.mlp)
    for net in (joined, twin):
        change(net.mlp)
    with pytest.warns(SlowPathWarning, match=f"block layer by layer: {why}"):
        same(joined, apart)
    same(twin, apart)
    assert ran["glu"] == 2


def test_a_forward_that_is_replaced_in_the_class(monkeypatch, ran):
    apart, joined = with_mlp(Fc)
    apart, joined = apart.eval(), joined.eval()
    same(joined, apart)
    monkeypatch.setattr(Fc, "forward", lambda self, x: self.fc2(torch.tanh(self.fc1(x))))
    with pytest.warns(SlowPathWarning, match="gives other numbers"):
        same(joined, apart)
    assert ran["glu"] == 1


@pytest.mark.parametrize("order", [(False, True), (True, False)])
def test_a_forward_that_switches_autocast_off(order, ran):
    """Which nobody sees where there is none."""

    class Exact(Fc):
        def forward(self, x):
            with torch.autocast("cpu", enabled=False):
                return self.fc2(self.act(self.fc1(x)))

    apart, joined = with_mlp(Exact)
    for enabled in order:
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            same(joined.mlp, apart.mlp)
    assert ran["glu"] == 1


def _see(seen, module, *_):
    seen.append(type(module))


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_hooks_on_all_modules(kind, ran):
    counts = []
    for net in with_mlp(Fc):
        seen = []
        handle = getattr(torch.nn.modules.module, f"register_module_{kind}_hook")(partial(_see, seen))
        with handle:
            net.eval().mlp(torch.randn(2, 8, requires_grad=True)).sum().backward()
        counts.append(len(seen))
    assert counts[0] == counts[1] > 3 and ran["glu"] == 0


def test_dropout_within_two_layers(ran):
    """Active it comes apart, which is told; with p = 0, or in evaluation with gradients, it is a block. The one behind
    the block is the module's own."""
    apart, joined = with_mlp(lambda: Fc(0.5))
    with pytest.warns(SlowPathWarning, match="drops elements itself"):
        joined(torch.randn(2, 8))
    assert ran["glu"] == 0
    joined.mlp.inner.p = 0.0
    called = []
    joined.mlp.dropout.register_forward_hook(lambda *given: called.append(given))
    joined(torch.randn(2, 8))
    assert ran["glu"] == 1 and called
    same(joined.eval(), apart.eval())
    assert ran["glu"] == 2


@TWO
@pytest.mark.medium
def test_two_layers_compiled(kind, ran):
    apart, joined = with_mlp(kind)
    apart, joined = apart.eval(), joined.eval()
    torch._dynamo.reset()
    same(torch.compile(joined, fullgraph=True, backend="aot_eager"), apart)
    assert ran == {"group": 1, "glu": 1}


@TWO
def test_patched_two_layers(kind, ran):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    net = Net()
    net.mlp = kind()
    names = [name for name, module in net.mlp.named_modules() if isinstance(module, nn.Linear)]
    config = peft.LoraConfig(r=4, target_modules=names, lora_dropout=0.3, init_lora_weights=False)
    stock = peft.get_peft_model(net, config)
    model = copy.deepcopy(stock)
    report = patch_peft(model)
    assert report.blocks == ("base_model.model.mlp",) and report.in_blocks == 2
    again = "activation" if kind is Fc else "product"
    assert f"{', '.join(names)} in one step" in str(report) and f"the {again} is made again" in str(report)
    model(torch.randn(2, 8))
    assert ran["glu"] == 1
    same(model.eval(), stock.eval())
    unpatch_peft(model)
    assert type(model.base_model.model.mlp) is kind
    same(model, stock)


def test_only_one_of_two_layers_adapted(ran):
    torch.manual_seed(0)
    config = LoRAConfig(4, target_modules=["fc2"], init_lora_weights=False)
    net = add_lora(nn.Sequential(Fc()), config).eval()
    apart = add_lora(nn.Sequential(Fc()), config, blocks=False).eval()
    apart.load_state_dict(net.state_dict())
    x = torch.randn(3, 8)
    for ours, theirs in zip(results(net, x), results(apart, x), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert ran["glu"] == 1


def test_a_sequential(ran):
    """And parts of it, which are made by its class."""
    torch.manual_seed(0)
    parts = nn.Linear(8, 12), nn.ReLU(), nn.Dropout(0.0), nn.Linear(12, 8), nn.Dropout(0.5)
    config = LoRAConfig(4, target_modules="all-linear", init_lora_weights=False)
    net = add_lora(nn.Sequential(nn.Sequential(*parts)), config).eval()
    apart = copy.deepcopy(net)
    joining.part(apart)
    assert type(apart[0]) is nn.Sequential and isinstance(net[0], gated.FastMlp)
    x = torch.randn(3, 8)
    for ours, theirs in zip(results(net, x), results(apart, x), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert ran["glu"] == 1
    torch.testing.assert_close(net[0][:2](x), apart[0][:2](x))


def test_masks_drawn_in_another_order(ran):
    """A forward that calls up ahead of gate, with dropout."""

    class Other(Mlp):
        def forward(self, x):
            return self.down(self.up(x) * self.act(self.gate(x)))

    gated._probed.clear()
    net = add_lora(Other(), LoRAConfig(4, lora_dropout=0.5, target_modules="all-linear", init_lora_weights=False))
    net(torch.randn(2, 8))
    assert ran["glu"] == 1


def _models():
    """Tiny ones of transformers: {name: (class, settings, targets, an input)}."""
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    ids = {"input_ids": torch.arange(12).view(2, 6) + 3}
    return {
        "GPT2Model": ({"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 32}, ["c_fc", "c_proj"], ids),
        "Phi3Model": ({**small, "vocab_size": 32, "pad_token_id": 0}, ["gate_up_proj", "down_proj"], ids),
        "ModernBertModel": ({**small, "vocab_size": 32, "pad_token_id": 0}, ["Wi", "Wo"], ids),
        "ViTModel": (
            {**small, "image_size": 8, "patch_size": 4},
            ["fc1", "fc2"],
            {"pixel_values": torch.randn(2, 3, 8, 8)},
        ),
        "DistilBertModel": (
            {"dim": 16, "hidden_dim": 32, "n_layers": 2, "n_heads": 2, "vocab_size": 32},
            ["lin1"],
            ids,
        ),
        "T5EncoderModel": (
            {"d_model": 16, "d_ff": 32, "d_kv": 8, "num_layers": 2, "num_heads": 2, "dropout_rate": 0},
            ["wi", "wo"],
            ids,
        ),
    }


@pytest.mark.medium
@pytest.mark.parametrize("name", _models())
def test_models_of_transformers(name, ran):
    """Each layer's MLP is a block; numbers are those of the layers."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    settings, targets, given = _models()[name]
    kind = getattr(transformers, name)
    torch.manual_seed(0)
    model = kind(kind.config_class(**settings)).eval()
    apart = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
    joined = copy.deepcopy(apart)
    assert len(patch_peft(joined).blocks) == 2 and not patch_peft(apart, blocks=False).blocks
    found = []
    for one in (joined, apart):
        y = one(**given).last_hidden_state
        (y * torch.linspace(-1, 1, 16)).sum().backward()
        found.append([y, *(p.grad for p in one.parameters() if p.requires_grad)])
    assert ran["glu"] == 2
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5)
