"""What an operator for torch.compile consists of, given to torch."""

from collections.abc import Callable
from typing import Any

import torch


def register(
    library: torch.library.Library,
    name: str,
    *,
    recorded: Callable[..., Any],
    alone: Callable[..., Any],
    forward: Callable[..., Any],
    gradients: Callable[..., Any],
    forward_fake: Callable[..., Any],
    gradients_fake: Callable[..., Any],
) -> None:
    """The kernels of ``name``, which becomes ``name_alone``, or under autograd what ``recorded`` makes of it:
    ``name_fwd`` and ``name_bwd``. y is the first of what ``forward`` gives. All four are defined in the library."""
    unrecorded = getattr(torch.ops.lora_fast, f"{name}_alone")
    library.impl(name, recorded, "Autograd")
    for part, run, fake in (
        ("", unrecorded, lambda *given: forward_fake(*given)[0]),
        ("_alone", alone, lambda *given: forward_fake(*given)[0]),
        ("_fwd", forward, forward_fake),
        ("_bwd", gradients, gradients_fake),
    ):
        library.impl(f"{name}{part}", run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"lora_fast::{name}{part}", fake, lib=library)
