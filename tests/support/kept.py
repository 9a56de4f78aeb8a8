"""DoRA's norm kept in evaluation: how often it is made, and what must have it made anew."""

from contextlib import contextmanager

import torch
from devices import TRITON

from lora_fast import reference


@contextmanager
def norms_made():
    """A list that grows with each norm that is made for a gain within, in plain torch or by a kernel."""
    made, honest = [], reference.gain_of

    def gain_of(*args):
        made.append("plain torch")
        return honest(*args)

    reference.gain_of = gain_of
    try:
        with launched() as kernels:
            yield made if kernels is None else _Norms(made, kernels)
    finally:
        reference.gain_of = honest


class _Norms:
    """Those of both lists, as they grow."""

    def __init__(self, made, kernels):
        self.lists = made, kernels

    def clear(self):
        for found in self.lists:
            found.clear()

    def __len__(self):
        made, kernels = self.lists
        return len(made) + sum(name in ("_norm_kernel", "_norm_parts_kernel") for name in kernels)


@contextmanager
def launched():
    """The names of the kernels that are launched within; None without Triton."""
    if not TRITON:
        yield None
        return
    from lora_fast.kernels.program import Program

    names, honest = [], Program.run

    def run(self, bound, first=0, last=None):
        names.extend(launch.kernel.fn.__name__ for launch in self.launches[first:last])
        return honest(self, bound, first, last)

    Program.run = run
    try:
        yield names
    finally:
        Program.run = honest


@torch.no_grad()
def write(t):
    t.mul_(1.5)


def new_data(t):
    """Twice, so that the second may lie where the first one was."""
    for _ in range(2):
        t.data = t.data * 2


def step(t):
    """By an optimizer that counts no version up."""
    t.grad = torch.ones_like(t)
    torch.optim.AdamW([t], 0.1, fused=True).step()
    t.grad = None
