"""Several adapters in one batch as functions: checked inputs, one choice of path, then the fused kernels or the plain
torch reference."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch.compiler import is_compiling

from lora_fast import dispatch
from lora_fast.bases.packed import PackedWeight, first_of
from lora_fast.batch import reference
from lora_fast.batch.form import Adapter
from lora_fast.checks import check_dora, check_linear
from lora_fast.paths import Facts, facts_of, remember

_calls: dict[Facts, Callable[..., torch.Tensor]] = {}  # what takes them, by their facts
NUMBERS = {float, int}
FORM = attrgetter("__class__", "dtype", "shape", "device", "requires_grad")  # with strides all of ``facts_of``
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def lora_linear_batch(
    x: torch.Tensor,
    weight: torch.Tensor,
    adapters: Sequence[Adapter],
    which: torch.Tensor,
    bias: torch.Tensor | None = None,
    training: bool = True,
    backend: str = "auto",
) -> torch.Tensor:
    """A frozen linear layer, each of whose rows has an adapter of its own: row i of y is what
    :func:`lora_fast.functional.lora_linear` makes of row i of x with ``adapters[which[i]]``.

    Gradients reach x, bias and all adapters, each as if its rows had been a batch of their own. An adapter that no row
    names gets zeros. What is not finite in a row stays in that row and its adapter's gradients, and what is not finite
    in an adapter in the rows that name it (all of which are NaN on the kernels). Dropout draws one mask for all rows,
    each with the rate of its adapter: not the mask that a batch of these rows alone would draw.

    ``which`` is not looked at by the host, and may change from call to call: nothing is compiled or captured anew.

    Args:
        x: [..., K], two dimensions or more, any strides, floating point.
        weight, bias: as in ``lora_linear``.
        adapters: :class:`lora_fast.Adapter`, one or more, without magnitudes. Ranks, scalings and dropout may differ.
        which: integers on x's device, one a row or one a sample: their shape is the first of x's leading dimensions,
            or all of them. -1 is no adapter (so are numbers that no adapter has, which on the CPU are an error).
        training: False switches dropout off.
        backend: "auto" (what :func:`lora_fast.set_backend` says), "triton" or "reference".

    Returns:
        [..., N] with the dtype of ``F.linear(x, weight, bias)``, autocast included.

    Raises:
        TypeError, ValueError, RuntimeError: as ``lora_linear``; the message begins with the adapter's place, as in
            ``adapters[1].lora_A``. ``which`` of a wrong shape, dtype or device; an adapter with a magnitude.
    """
    return _call("lora", x, weight, adapters, which, bias, training, backend)


def dora_linear_batch(
    x: torch.Tensor,
    weight: torch.Tensor,
    adapters: Sequence[Adapter],
    which: torch.Tensor,
    bias: torch.Tensor | None = None,
    training: bool = True,
    backend: str = "auto",
    round_norm: bool = False,
    save: str = "auto",
) -> torch.Tensor:
    """:func:`lora_linear_batch` for adapters with magnitudes, each as
    :func:`lora_fast.functional.dora_linear` has it, and ``round_norm`` and ``save``; a row without an adapter has the
    base's output.

    Raises:
        TypeError, ValueError, RuntimeError: as ``lora_linear_batch``; an adapter without a magnitude; ``save`` neither
            "auto" nor "z".
    """
    return _call("dora", x, weight, adapters, which, bias, training, backend, round_norm, save)


def _call(
    form: str,
    x: Any,
    weight: Any,
    adapters: Any,
    which: Any,
    bias: Any,
    training: Any,
    backend: str,
    *options: Any,
) -> torch.Tensor:
    """``options``: DoRA's round_norm and save."""
    facts, call = _recall(x, weight, adapters, which, bias, training, backend, form, *options)
    if call is None:
        dtype = _check(form, x, weight, adapters, which, bias, *options)
        call = _settle(form, (x, weight, which, bias), adapters, training, backend, dtype, *options)
        remember(_calls, facts, call)
    if which.device.type == "cpu" and not is_compiling() and dispatch.has_data(which):
        _check_numbers(which, len(adapters))
    return call(x, weight, adapters, which, bias, training)


def _settle(
    form: str,
    tensors: tuple[Any, ...],
    adapters: Sequence[Adapter],
    training: bool,
    backend: str,
    dtype: torch.dtype,
    *options: Any,
) -> Callable[..., torch.Tensor]:
    """What takes this call, which passed the checks, and from now on those with the same facts."""
    x, weight, which, bias = tensors
    plain: Callable[..., torch.Tensor] = reference.lora_linear_batch
    if form == "dora":
        plain = partial(reference.dora_linear_batch, round_norm=options[0])
    e4m3 = isinstance(weight, PackedWeight) and weight.E4M3_PRODUCTS
    if dispatch.choose(backend, x.device, dtype, e4m3) == "reference":
        return plain
    from lora_fast.batch import custom_op  # needs Triton, as the next
    from lora_fast.batch.fused import FusedBatch, why_apart

    why = why_apart(weight)
    if why:
        dispatch.tell("runs the adapters of a batch one after the other", why)
        return plain
    if is_compiling():
        return partial(custom_op.linear_batch, **dict(zip(("round_norm", "save"), options, strict=False)))
    return FusedBatch(x, weight, adapters, bias, *options)


def _check(form: str, x: Any, weight: Any, adapters: Any, which: Any, bias: Any, *options: Any) -> torch.dtype:
    """Raise where an argument does not fit; return the dtype that the products are made in."""
    if not isinstance(adapters, (list, tuple)) or isinstance(adapters, Adapter):
        raise TypeError(f"adapters: got {type(adapters).__name__}, expected a list of lora_fast.Adapter")
    if not adapters:
        raise ValueError("adapters: got none, expected one or more")
    dtype = None
    for i, one in enumerate(adapters):
        name = f"adapters[{i}]"
        if not isinstance(one, Adapter):
            raise TypeError(f"{name}: got {type(one).__name__}, expected a lora_fast.Adapter")
        magnitude, wanted = one.lora_magnitude_vector, form == "dora"
        if (magnitude is not None) != wanted:
            got, expected = ("None", "a tensor [N]") if wanted else ("a tensor", "None (dora_linear_batch takes them)")
            raise ValueError(f"{name}.lora_magnitude_vector: got {got}, expected {expected}")
        try:
            dtype = check_linear(x, weight, one.lora_A, one.lora_B, one.scaling, bias, one.dropout_p)
            if wanted:
                check_dora(magnitude, weight, True, *options)
        except (TypeError, ValueError) as error:
            message = str(error).replace("magnitude: ", "lora_magnitude_vector: ")
            shared = message.startswith(("x: ", "weight: ", "bias: ", "round_norm: ", "save: "))
            raise type(error)(message if shared else f"{name}.{message}") from None
    _check_which(x, which)
    assert dtype is not None
    return dtype


def _check_which(x: torch.Tensor, which: Any) -> None:
    if not isinstance(which, torch.Tensor):
        raise TypeError(f"which: got {type(which).__name__}, expected a tensor of integers")
    if which.dtype not in INTEGERS:
        raise TypeError(f"which: got dtype {which.dtype}, expected integers")
    if which.device != x.device:
        raise ValueError(f"which: got a tensor on {which.device}, expected {x.device}, where x is")
    if x.dim() < 2:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected two dimensions or more: rows, and [K]")
    if not 1 <= which.dim() < x.dim() or which.shape != x.shape[: which.dim()]:
        lead = tuple(x.shape[:-1])
        raise ValueError(f"which: got shape {tuple(which.shape)}, expected {lead} of x's rows, or the first of these")


def _check_numbers(which: torch.Tensor, n: int) -> None:
    """Where the host can look at them for nothing."""
    if which.numel() and not (-1 <= int(which.min()) and int(which.max()) < n):
        raise ValueError(f"which: got {int(which.min())} to {int(which.max())}, expected -1 (no adapter) to {n - 1}")


def _recall(
    x: Any, weight: Any, adapters: Any, which: Any, bias: Any, training: Any, *asked: Any
) -> tuple[Facts | None, Any]:
    """(facts, what takes calls with these facts), as for a single layer; no facts where numbers are wrong or something
    is no tensor, which the checks will say, and under compilation and transforms of torch.func."""
    if is_compiling() or torch._C._are_functorch_transforms_active() or type(training) is not bool:
        return None, None
    try:
        a, b, scalings, rates, magnitudes = zip(*adapters, strict=True)
        if not {*map(type, rates)} <= NUMBERS or not all(0 <= p < 1 for p in rates):
            return None, None
        tensors, base, acts_as = None, weight, None
        if isinstance(weight, PackedWeight):
            base, acts_as = first_of(weight), (weight.traits, weight.requires_grad)
        if {*map(type, scalings)} <= NUMBERS:
            if not all(map(math.isfinite, scalings)):
                return None, None
        else:
            tensors = tuple(None if type(one) in NUMBERS else facts_of(one) for one in scalings)
            if not all(math.isfinite(one) for one in scalings if type(one) in NUMBERS):
                return None, None
        found = (
            facts_of(x),
            facts_of(base),
            acts_as,
            (which.dtype, which.shape, which.device),
            None if bias is None else facts_of(bias),
            *map(FORM, a),
            *map(FORM, b),
            *map(torch.Tensor.stride, a),
            *map(torch.Tensor.stride, b),
            tensors,
            rates if training else None,
            None if {*magnitudes} == {None} else tuple(map(facts_of, magnitudes)),
            torch.is_grad_enabled(),
            dispatch.autocast_dtype(x.device) if torch._C._is_any_autocast_enabled() else None,
            dispatch.get_backend(),
            *asked,
        )
        return found, _calls.get(found)
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return None, None
