"""What a program hands to Triton's C launchers, which a GPU alone has: here stand-ins note their arguments."""

import re
import shutil
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from checkout import ROOT
from devices import TRITON

if not TRITON:
    pytest.skip("needs Triton", allow_module_level=True)

import triton

from lora_fast.kernels import launchers, program
from lora_fast.kernels.program import OWN, Block, Launch, Program, View


class Maps:
    """Names instead of tensor maps."""

    def __init__(self, encode, meta, block):
        assert encode.startswith("fill_tma_descriptor")
        self.meta, self.block, self.known = meta, block, {}

    def encode(self, address):
        self.known[address] = ("map", self.meta, self.block.tile, address)
        return self.known[address]


HEAD = {
    "flat": ("function", False, False, None, None, "packed", None, None, None),
    "packed": ("function", False, False, "packed", None, None, None, None, None),
}


@pytest.fixture(params=HEAD)
def form(request):
    return request.param


@pytest.fixture
def seen(form, monkeypatch):
    """What was launched: through Triton ("triton" or "again", name, arguments), or by a launcher of this form (name,
    grid and stream, head, arguments but for what stands for constants)."""
    found, known = [], launchers.FLAT if form == "flat" else launchers.PACKED

    def through_triton(self, args):
        found.append(("triton", self.kernel, args))

        def launch(*given):
            size = 4 + len(HEAD[form])
            args = given[size:]
            assert args[-len(self.constants) :] == (None,) * len(self.constants)
            found.append((self.kernel, given[:4], given[4:size], args[: -len(self.constants)]))

        run = SimpleNamespace(
            launch=launch, kernel_signature=self.kernel, arg_annotations=[self.kernel, "BLOCK", "PDL"]
        )
        metadata = SimpleNamespace(launch_pdl=False, tensordesc_meta=[self.kernel] * len(self.blocks))
        return SimpleNamespace(run=run, function="function", packed_metadata="packed", metadata=metadata)

    def one_for_all(*given):
        *given, (name,), signature, args = given
        assert name == signature  # without the constants' annotations
        found.append((name, tuple(given[:4]), tuple(given[4:]), args))

    monkeypatch.setattr(Launch, "start", through_triton)
    monkeypatch.setattr(Launch, "start_again", lambda self, _, args: found.append(("again", self.kernel, args)))
    monkeypatch.setattr(launchers, "known", lambda: known)
    monkeypatch.setattr(program, "_Maps", Maps)
    closure = lambda start: SimpleNamespace(nonlocals={"launcher": start})  # noqa: E731
    monkeypatch.setattr(launchers, "inspect", SimpleNamespace(getclosurevars=closure))
    utils = SimpleNamespace(launch=one_for_all)
    active = SimpleNamespace(get_current_stream=lambda device: "stream", utils=utils)
    monkeypatch.setattr(program.triton.runtime, "driver", SimpleNamespace(active=active))
    return found


def launch(name, *args, ints=(), blocks=None):
    return Launch(name, (2, 3, 1), args, blocks or {}, ints, {"BLOCK": 16, "PDL": 0}, {}, None)


def test_later_launches_take_addresses(seen, form):
    part = View(1, 8, 16, torch.float32)
    first = launch("first", 0, part, None, 2, ints=(7, 8))
    program = Program(4, [first, launch("second", part, 0, 3, blocks={1: Block((4, 4), (4, 1), [2, 2])})])
    x, room = torch.arange(16.0).view(4, 4), torch.arange(32, dtype=torch.uint8)
    program(x, room, 0.5, None)
    (_, _, args), (_, _, others) = seen
    assert args[0] is x and args[2] is None and args[3] == 0.5 and others[2] is None
    assert torch.equal(args[1], room[8:24].view(torch.float32)) and args[1].data_ptr() == room.data_ptr() + 8
    for again in (x, x.clone()):
        seen.clear()
        program(again, room, 0.25, None)
        address, places = again.data_ptr(), ((2, 3, 1, "stream"), HEAD[form])
        assert seen[0] == ("first", *places, (address, room.data_ptr() + 8, None, 0.25, 7, 8))
        mapped = "map", "second", [2, 2], address
        assert seen[1] == ("second", *places, (room.data_ptr() + 8, mapped, 4, 4, 4, 1, None))


def test_a_part_of_a_program(seen):
    """The last step waits for the caller; a program that has not run as a whole still goes through Triton."""
    program = Program(1, [launch("first", 0, 0), launch("second", 0, 0)])
    x = torch.zeros(2)
    early, late = program.bind(x), program.bind(x)
    program.run(early, 0, -1)
    program.run(late, 0, -1)
    program.run(late, -1)
    program.run(early, -1)  # bound before, and so as tensors
    assert [launched[:2] for launched in seen] == [
        ("triton", "first"),
        ("again", "first"),
        ("triton", "second"),
        ("again", "second"),
    ]
    program(x)
    assert [launched[0] for launched in seen[4:]] == ["first", "second"]


def test_what_waits_holds_what_it_reads(seen):
    """A launch that waits has addresses: nobody else may get the memory before it is started."""
    program = Program(2, [launch("first", 0, 0), launch("second", 1, 1)])
    program(torch.zeros(2), torch.zeros(2))
    room = torch.zeros(2)
    bound, there = program.bind(torch.zeros(2), room), weakref.ref(room)
    program.run(bound, 0, -1)
    del room
    assert there() is not None
    program.run(bound, -1)
    del bound
    assert there() is None


def test_memory_of_its_own(seen):
    """Made anew in each run, for the launches' views into it."""
    program = Program(
        2, [launch("writes", 0, View(OWN, 128, 64, torch.float32)), launch("reads", View(OWN, 0, 8, torch.int32), 1)]
    )
    assert (program.own, program.n) == (192, 3)
    x = torch.zeros(2)
    for _ in range(2):
        seen.clear()
        bound = program.bind(x, 3)
        program.run(bound)
    own = bound.held[-1]
    start = own.data_ptr()
    assert own.nbytes == 192
    assert seen[0][-1] == (x.data_ptr(), start + 128) and seen[1][-1] == (start, 3)


def test_an_unknown_launcher_goes_through_triton(seen, monkeypatch):
    """Each time, past the look-up of the kernel after the first."""
    monkeypatch.setattr(launchers, "known", lambda: None)
    alone = Program(2, [launch("alone", 0, 1, ints=(5,))])
    for _ in range(3):
        alone(torch.zeros(2), 1.5)
    assert [how for how, *_ in seen] == ["triton", "again", "again"]


def test_a_kernel_with_scratch_memory_goes_through_triton(seen, monkeypatch):
    """That its own launcher allocates: of a profiler, say."""
    through_triton = Launch.start

    def with_scratch(self, args):
        kernel = through_triton(self, args)
        kernel.metadata.profile_scratch_size = 128
        return kernel

    monkeypatch.setattr(Launch, "start", with_scratch)
    alone = Program(2, [launch("alone", 0, 1, ints=(5,))])
    for _ in range(2):
        alone(torch.zeros(2), 1.5)
    assert [how for how, *_ in seen] == ["triton", "again"]


def test_descriptors_hold_no_tensor():
    """Of a plan that Triton launches, whose descriptors are checked once."""
    mapped = launch("mapped", 0, blocks={0: Block((4, 4), (4, 1), [2, 4])})
    for _ in range(2):
        x = torch.empty(4, 4)
        given = mapped._given(0, x)
        assert given.base is x and given.block_shape == [2, 4] and mapped.descriptors[0].base is None


def test_the_pinned_triton_is_known():
    """A new pin in constraints.txt first needs the GPU tests, then a line in kernels/launchers.py."""
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    pinned = re.search(r"^triton==(.*)$", pins, re.MULTILINE)
    assert pinned is not None
    if triton.__version__ != pinned[1]:
        pytest.skip(f"Triton {triton.__version__} is installed, not the pinned {pinned[1]}")
    assert launchers.digest() in launchers.KNOWN


def test_a_digest_sees_what_a_launch_rests_on(tmp_path):
    """Another launcher has another digest, another comment elsewhere has not."""
    installed = Path(triton.__file__).parent / "backends"
    shutil.copytree(installed, tmp_path / "same", ignore=lambda _, names: [n for n in names if n in ("lib", "bin")])
    found = launchers.digest(tmp_path / "same")
    assert found == launchers.digest()
    driver = tmp_path / "same" / "nvidia" / "driver.c"
    driver.write_text(driver.read_text() + "\n/* new */\n")
    assert launchers.digest(tmp_path / "same") == found
    for path, old in ((driver, "CUtensorMap"), (driver.with_suffix(".py"), "launch_metadata")):
        text = path.read_text()
        path.write_text(text.replace(old, "changed"))
        assert launchers.digest(tmp_path / "same") != found
        path.write_text(text)


def test_why_not_direct(monkeypatch):
    assert launchers.why_not_direct() is None  # known, or the interpreter
    monkeypatch.setattr(launchers, "INTERPRETED", False)
    monkeypatch.setattr(launchers, "known", lambda: None)
    monkeypatch.setattr(launchers.triton, "__version__", "9.9")
    why = launchers.why_not_direct()
    assert "Triton 9.9" in why and "3.6, 3.7, 3.8, 3.9" in why
