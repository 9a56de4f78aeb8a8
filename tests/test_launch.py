"""What a program hands to Triton's C launchers, which a GPU alone has: here stand-ins note their arguments."""

from types import SimpleNamespace

import pytest
import torch
from conftest import TRITON

if not TRITON:
    pytest.skip("needs Triton", allow_module_level=True)

from lora_fast.kernels import launch
from lora_fast.kernels.launch import Block, Plan, Program, View


class Maps:
    """Names instead of tensor maps."""

    def __init__(self, meta, block):
        self.meta, self.block, self.known = meta, block, {}

    def encode(self, address):
        self.known[address] = ("map", self.meta, self.block.tile, address)
        return self.known[address]


@pytest.fixture
def seen(monkeypatch):
    """What was launched: through Triton ("triton", name, arguments), or by its launchers (name, *arguments)."""
    found = []

    def through_triton(plan, args):
        found.append(("triton", plan.kernel, args))
        run = SimpleNamespace(launch=lambda *args: found.append((plan.kernel, *args)))
        metadata = SimpleNamespace(launch_pdl=False, tensordesc_meta=[plan.kernel] * len(plan.blocks))
        return SimpleNamespace(run=run, function="function", packed_metadata="packed", metadata=metadata)

    monkeypatch.setattr(Plan, "launch", through_triton)
    monkeypatch.setattr(launch, "DIRECT", True)
    monkeypatch.setattr(launch, "_Maps", Maps)
    closure = lambda start: SimpleNamespace(nonlocals={"launcher": start})  # noqa: E731
    monkeypatch.setattr(launch, "inspect", SimpleNamespace(getclosurevars=closure))
    driver = SimpleNamespace(active=SimpleNamespace(get_current_stream=lambda device: "stream"))
    monkeypatch.setattr(launch.triton.runtime, "driver", driver)
    return found


def plan(name, ints=(), blocks=None):
    return Plan(name, (2, 3), {"BLOCK": 16}, {}, torch.empty(4, 4), ints, blocks)


HEAD = "function", False, False, None, None, "packed", None, None, None


def test_later_launches_take_addresses(seen):
    first, second = plan("first", (7, 8)), plan("second", (), {1: Block((4, 4), (4, 1), [2, 2])})
    part = View(1, 8, 16, torch.float32)
    program = Program(4, [(first, (0, part, None, 2)), (second, (part, 0, 3))])
    x, room = torch.arange(16.0).view(4, 4), torch.arange(32, dtype=torch.uint8)
    program(x, room, 0.5, None)
    (_, _, args), (_, _, others) = seen
    assert args[0] is x and args[2] is None and args[3] == 0.5 and others[2] is None
    assert torch.equal(args[1], room[8:24].view(torch.float32)) and args[1].data_ptr() == room.data_ptr() + 8
    for again in (x, x.clone()):
        seen.clear()
        program(again, room, 0.25, None)
        address, places = again.data_ptr(), (2, 3, 1, "stream", *HEAD)
        assert seen[0] == ("first", *places, address, room.data_ptr() + 8, None, 0.25, 7, 8, None, None)
        mapped = "map", "second", [2, 2], address
        assert seen[1] == ("second", *places, room.data_ptr() + 8, mapped, 4, 4, 4, 1, None, None, None)


def test_a_part_of_a_program(seen):
    """The last step waits for the caller; a program that has not run as a whole still goes through Triton."""
    program = Program(1, [(plan("first"), (0, 0)), (plan("second"), (0, 0))])
    x = torch.zeros(2)
    early, late = program.bind(x), program.bind(x)
    program.run(early, 0, -1)
    program.run(late, 0, -1)
    program.run(late, -1)
    program.run(early, -1)  # bound before, and so as tensors
    assert [launched[:2] for launched in seen] == [("triton", name) for name in ("first", "first", "second", "second")]
    program(x)
    assert [launched[0] for launched in seen[4:]] == ["first", "second"]


def test_a_plan_alone(seen):
    alone = plan("alone", (5,))
    x = torch.zeros(2)
    alone(x, None, 3)
    alone(x, None, 4)
    assert seen[1][-6:] == (x.data_ptr(), None, 4, 5, None, None)
