"""The functional API: checked inputs, one choice of path, then the fused kernels or the plain torch reference."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.compiler import is_compiling

from lora_fast import dispatch, reference
from lora_fast.bases.packed import PackedWeight, first_of, is_opaque, tensors_of
from lora_fast.kept import Kept

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
Facts = tuple[Any, ...]  # what the choice for a call rests on


def lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    scaling: float | torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    training: bool = True,
    backend: str = "auto",
    save_x: str = "x",
) -> torch.Tensor:
    """A frozen linear layer with a low-rank update: ``y = x W^T + scaling * (drop(x) A^T) B^T + bias``.

    Formula of Hu et al. 2021 (arXiv 2106.09685). The base product sees x undropped. Gradients reach x, lora_A, lora_B
    and bias, each if it asks for one; weight is frozen.

    Args:
        x: [..., K], one dimension or more, any strides, floating point.
        weight: [N, K], x's dtype (outside autocast), must not require a gradient. It may be a view ``stored.t()`` of a
            contiguous [K, N], which is read as it lies. Over a
            :class:`lora_fast.fp8.Fp8Weight` the base products, forward and backward, are made from e4m3 operands; the
            low-rank ones are not (in float16 those of S and B and of dS and A take bfloat16's digits).
        lora_A: [R, K], any floating dtype; computed in x's dtype, its gradient comes in its own.
        lora_B: [N, R], likewise.
        scaling: a number, or a 0-dim floating tensor (never read back to the host). It gets no gradient.
        bias: [N] or None, in x's dtype (outside autocast).
        dropout_p: in [0, 1); elements of x are dropped in the low-rank branch while ``training``. The fused kernels
            round the probability to a multiple of 2^-12, and scale what stays to fit exactly that.
        training: False switches dropout off.
        backend: "auto" (what :func:`lora_fast.set_backend` says), "triton" or "reference".
        save_x: what the backward of lora_A reads: "x", or "fp8": x in e4m3 with a scale for each row, as an fp8
            weight's product reads it, half a 16-bit x's memory; lora_A's gradient then has its rounding, up to 2^-4 of
            each element of x. (The reference keeps x.)

    Returns:
        [..., N] with the dtype of ``F.linear(x, weight, bias)``, autocast included.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: wrong shapes or devices, dropout_p outside [0, 1), scaling not finite (looked at in eager alone, and
            not if it is a tensor), a weight that requires grad, save_x neither "x" nor "fp8".
        RuntimeError: ``backend="triton"`` where the kernels cannot run; an fp8 weight or save_x="fp8" on a GPU without
            8-bit matrix units.
    """
    facts, call = _recall(x, weight, lora_A, lora_B, scaling, bias, None, dropout_p, backend, save_x)
    if call is None:
        dtype = check_linear(x, weight, lora_A, lora_B, scaling, bias, dropout_p)
        _check_save_x(save_x)
        call = _settle(facts, dtype, backend, (x, weight, lora_A, lora_B, bias), save_x=save_x)
    return call(x, weight, lora_A, lora_B, scaling, bias, dropout_p if training else 0.0)


def dora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    magnitude: torch.Tensor,
    scaling: float | torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    training: bool = True,
    detach_norm: bool = True,
    save: str = "auto",
    backend: str = "auto",
    round_norm: bool = False,
    save_x: str = "x",
    kept: Kept | None = None,
) -> torch.Tensor:
    """:func:`lora_linear` with the direction of each output row normalised and its length trained by itself:
    ``y = (magnitude / n) * (x W^T + scaling * (drop(x) A^T) B^T) + bias``, ``n = |W + scaling * B A|`` per row.

    Formula of Liu et al. 2024 (arXiv 2402.09353). n is a constant in the backward (its section 4.3); rows of zero norm
    give 0. Dropout acts on the low-rank branch alone, as in torchtune; PEFT drops x in one more base product, which has
    the same expectation, more noise and twice the work. n is evaluated in every call, unless it is ``kept``.

    Args:
        x, weight, lora_A, lora_B, scaling, bias, dropout_p, training, backend, save_x: as in :func:`lora_linear`; the
            norm is that of an fp8 weight's rows.
        magnitude: [N], floating, any sign; used in float32 or better.
        detach_norm: False lets gradients through n, which takes the dense ``W + scaling * B A``.
        save: what the fused kernels keep for the magnitude's gradient where it asks for one. "z": the output before
            gain and bias, [..., N] of memory. "auto": the output itself where there is no bias and both adapters train,
            else z; an output so kept must not be changed in place (autograd says so).
        round_norm: round n to the weight's dtype, as PEFT does: a magnitude that PEFT made is such a rounded norm. (Not
            over an fp8 weight.)
        kept: where to keep n for the next call, if neither asks for a gradient (see :class:`lora_fast.kept.Kept`).

    Returns:
        [..., N] with the dtype of ``F.linear(x, weight, bias)``, autocast included.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`lora_linear`; a magnitude of another shape, dtype or device;
            ``save`` neither "auto" nor "z".
    """
    # Types beside flags: an int would be found under the bool that it equals.
    facts, call = _recall(
        x,
        weight,
        lora_A,
        lora_B,
        scaling,
        bias,
        magnitude,
        dropout_p,
        backend,
        detach_norm,
        type(detach_norm),
        save,
        round_norm,
        type(round_norm),
        save_x,
    )
    if call is None:
        dtype = check_linear(x, weight, lora_A, lora_B, scaling, bias, dropout_p)
        check_dora(magnitude, weight, detach_norm, round_norm, save)
        _check_save_x(save_x)
        call = _settle(
            facts,
            dtype,
            backend,
            (x, weight, lora_A, lora_B, bias, magnitude),
            detach_norm,
            save_x=save_x,
            save=save,
            round_norm=round_norm,
        )
    return call(x, weight, lora_A, lora_B, scaling, bias, dropout_p if training else 0.0, magnitude, kept)


def dora_norm(
    weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    scaling: float | torch.Tensor,
    backend: str = "auto",
) -> torch.Tensor:
    """Norms of the rows of ``weight + scaling * lora_B lora_A`` (Liu et al. 2024, arXiv 2402.09353), without gradient.

    Args:
        weight: [N, K], lora_A: [R, K], lora_B: [N, R], any floating dtypes, on one device.
        scaling: a number or a 0-dim floating tensor.
        backend: as in :func:`lora_linear`.

    Returns:
        [N] float32, float64 if one of the tensors is.

    Raises:
        TypeError, ValueError: as :func:`lora_linear`.
        RuntimeError: ``backend="triton"`` where the kernels cannot run.
    """
    if not isinstance(weight, torch.Tensor) or weight.dim() != 2:
        got = tuple(weight.shape) if isinstance(weight, torch.Tensor) else type(weight).__name__
        raise (ValueError if isinstance(weight, torch.Tensor) else TypeError)(f"weight: got {got}, expected [N, K]")
    if isinstance(weight, PackedWeight):
        weight = weight.multiplied()
    check_linear(weight.detach()[:0], weight.detach(), lora_A, lora_B, scaling, None, 0.0)
    if isinstance(scaling, torch.Tensor):
        scaling = scaling.detach()
    if dispatch.choose(backend, weight.device, weight.dtype) == "triton":
        from lora_fast.kernels.norm import norm_fwd  # needs Triton

        with torch.no_grad():
            return norm_fwd(weight, lora_A, lora_B, scaling)[0]
    return reference.dora_norm(weight, lora_A, lora_B, scaling)


def check_dora(magnitude: Any, weight: torch.Tensor, detach_norm: Any, round_norm: Any, save: Any) -> None:
    """Raise where what DoRA has beside LoRA does not fit the weight or is none of what it may be."""
    if not isinstance(magnitude, torch.Tensor):
        raise TypeError(f"magnitude: got {type(magnitude).__name__}, expected a tensor")
    if magnitude.dtype not in FLOATS:
        raise TypeError(f"magnitude: got dtype {magnitude.dtype}, expected float16, bfloat16, float32 or float64")
    if magnitude.shape != weight.shape[:1]:
        raise ValueError(f"magnitude: got shape {tuple(magnitude.shape)}, expected {tuple(weight.shape[:1])}")
    if magnitude.device != weight.device:
        raise ValueError(f"magnitude: got a tensor on {magnitude.device}, expected {weight.device}, where weight is")
    for name, flag in (("detach_norm", detach_norm), ("round_norm", round_norm)):
        if not isinstance(flag, bool):
            raise TypeError(f"{name}: got {flag!r}, expected True or False")
    if save not in ("auto", "z"):
        raise ValueError(f'save: got {save!r}, expected "auto" or "z"')


def _check_save_x(save_x: Any) -> None:
    if save_x not in ("x", "fp8"):
        raise ValueError(f'save_x: got {save_x!r}, expected "x" or "fp8"')


def _settle(
    facts: Facts | None,
    dtype: torch.dtype,
    backend: str,
    tensors: tuple[Any, ...],
    detach_norm: bool = True,
    *,
    save_x: str,
    **options: Any,
) -> Callable[..., torch.Tensor]:
    """What takes this call, which passed the checks, and from now on those with the same facts."""
    x, weight, *_ = tensors
    e4m3 = save_x == "fp8" or (isinstance(weight, PackedWeight) and weight.E4M3_PRODUCTS)
    path = dispatch.choose(backend, x.device, dtype, e4m3)
    call: Callable[..., torch.Tensor]
    if path == "triton" and detach_norm:
        from lora_fast.ops.linear import FusedLinear  # needs Triton

        call = FusedLinear(*tensors, save_x=save_x, **options)
    else:
        call = partial(_plain, detach_norm=detach_norm, round_norm=options.get("round_norm", False))
    if facts is not None:
        if len(_calls) >= 4096:  # batch sizes that never repeat
            _calls.clear()
        _calls[facts] = call
    return call


def _plain(
    x: Any,
    weight: Any,
    lora_A: Any,
    lora_B: Any,
    scaling: Any,
    bias: Any,
    p: float,
    magnitude: Any = None,
    kept: Kept | None = None,
    *,
    detach_norm: bool,
    round_norm: bool,
) -> torch.Tensor:
    """The reference, called as the fused form is."""
    if isinstance(scaling, torch.Tensor):
        scaling = scaling.detach()
    if magnitude is None:
        return reference.lora_linear(x, weight, lora_A, lora_B, scaling, bias, p)
    gain = None
    if kept is not None and not (torch.is_grad_enabled() or is_compiling() or torch._C._len_torch_dispatch_stack()):
        held = tensors_of(weight)
        sources = *((weight,) if held is None else held(weight)), lora_A, lora_B, magnitude
        gain = kept.get(
            sources,
            scaling,
            ("reference", detach_norm, round_norm),
            lambda: reference.gain_of(weight, lora_A, lora_B, magnitude, scaling, detach_norm, round_norm),
        )
    return reference.dora_linear(
        x,
        weight,
        lora_A,
        lora_B,
        magnitude,
        scaling,
        bias,
        p,
        detach_norm=detach_norm,
        round_norm=round_norm,
        gain=gain,
    )


_calls: dict[Facts, Callable[..., torch.Tensor]] = {}  # what takes them, by their facts


def facts_of(t: torch.Tensor) -> Facts:
    """What of a tensor the checks and the choice of a path rest on."""
    return type(t), t.dtype, t.shape, t.stride(), t.device, t.requires_grad


def _recall(
    x: Any, weight: Any, lora_A: Any, lora_B: Any, scaling: Any, bias: Any, magnitude: Any, dropout_p: Any, *asked: Any
) -> tuple[Facts | None, Any]:
    """(facts, what takes calls with these facts): all that the checks of a call and the choice of its path rest on, but
    for numbers, which are right here. The host waits for this in every step. No facts where numbers are wrong or
    something is no tensor, which the checks will say, and under compilation."""
    number, base, acts_as = type(scaling) is float, weight, None
    if (
        is_compiling()
        or type(dropout_p) is not float
        or not 0 <= dropout_p < 1
        or (number and not -math.inf < scaling < math.inf)
    ):
        return None, None
    try:
        if isinstance(weight, PackedWeight):
            base, acts_as = first_of(weight), (weight.traits, weight.requires_grad)
        facts = (
            facts_of(x),
            facts_of(base),
            facts_of(lora_A),
            facts_of(lora_B),
            None if bias is None else facts_of(bias),
            None if magnitude is None else facts_of(magnitude),
            acts_as,
            None if number else (scaling.dtype, scaling.shape, scaling.device),
            torch.is_grad_enabled(),
            dispatch.autocast_dtype(x.device) if torch._C._is_any_autocast_enabled() else None,
            dispatch.get_backend(),
            *asked,
        )
        return facts, _calls.get(facts)
    except (AttributeError, RuntimeError, TypeError):
        return None, None


def check_tensors(tensors: dict[str, Any]) -> None:
    """Raise where what goes by these names, "x" first, is no tensor, not floating, or not where x is."""
    for name, t in tensors.items():
        if not isinstance(t, torch.Tensor):
            raise TypeError(f"{name}: got {type(t).__name__}, expected a tensor")
        if t.dtype not in FLOATS:
            raise TypeError(f"{name}: got dtype {t.dtype}, expected float16, bfloat16, float32 or float64")
        if t.device != (device := tensors["x"].device):
            raise ValueError(f"{name}: got a tensor on {t.device}, expected {device}, where x is")


def check_linear(
    x: Any, weight: Any, lora_A: Any, lora_B: Any, scaling: Any, bias: Any, dropout_p: Any, *, adapted: bool = True
) -> torch.dtype:
    """Raise on arguments that do not fit together; return the dtype that the products are made in. Of a layer that is
    not ``adapted`` lora_A and lora_B are not looked at."""
    tensors = {"x": x, "weight": weight}
    if adapted:
        tensors |= {"lora_A": lora_A, "lora_B": lora_B}
    if bias is not None:
        tensors["bias"] = bias
    check_tensors(tensors)
    if isinstance(weight, PackedWeight) and not weight.WHOLE:
        raise TypeError(
            f"weight: got an {type(weight).__name__}, expected the whole weight, as FSDP2 gathers it for a layer's "
            "forward"
        )
    if is_opaque(weight):
        raise TypeError(f"weight: got a {type(weight).__name__}, expected a plain tensor or an Fp8Weight")
    if x.dim() < 1:
        raise ValueError("x: got a tensor without dimensions, expected [..., K]")
    k = x.shape[-1]
    if weight.dim() != 2 or weight.shape[1] != k:
        who = " (DeepSpeed's ZeRO-3 has partitioned it)" if hasattr(weight, "ds_id") else ""
        raise ValueError(f"weight: got shape {tuple(weight.shape)}{who}, expected [N, {k}] to fit x {tuple(x.shape)}")
    n = weight.shape[0]
    if adapted:
        if lora_A.dim() != 2 or lora_A.shape[1] != k or lora_A.shape[0] < 1:
            raise ValueError(f"lora_A: got shape {tuple(lora_A.shape)}, expected [r, {k}] with r >= 1")
        if lora_B.shape != (n, r := lora_A.shape[0]):
            raise ValueError(f"lora_B: got shape {tuple(lora_B.shape)}, expected {(n, r)}")
    if bias is not None and bias.shape != (n,):
        raise ValueError(f"bias: got shape {tuple(bias.shape)}, expected {(n,)}")
    if isinstance(scaling, torch.Tensor):
        if scaling.dim() != 0 or not scaling.dtype.is_floating_point:
            shape = tuple(scaling.shape)
            raise ValueError(f"scaling: got a {scaling.dtype} tensor of shape {shape}, expected a 0-dim floating one")
        if scaling.device != x.device:
            raise ValueError(f"scaling: got a tensor on {scaling.device}, expected {x.device}, where x is")
    elif isinstance(scaling, bool) or not isinstance(scaling, (int, float)):
        if not torch.compiler.is_compiling():  # there a float may be symbolic
            raise TypeError(f"scaling: got {type(scaling).__name__}, expected a number or a 0-dim tensor")
    elif not torch.compiler.is_compiling() and not math.isfinite(scaling):
        raise ValueError(f"scaling: got {scaling}, expected a finite number")
    if isinstance(dropout_p, bool) or not isinstance(dropout_p, (int, float)):
        raise TypeError(f"dropout_p: got {type(dropout_p).__name__}, expected a number")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p: got {dropout_p}, expected a probability in [0, 1)")
    if weight.requires_grad:
        raise ValueError("weight: requires grad, expected a frozen base weight (weight.requires_grad_(False))")
    autocast = dispatch.autocast_dtype(x.device)
    if autocast is not None and x.dtype != torch.float64:
        if weight.dtype == torch.float64:
            raise TypeError(f"weight: got dtype {weight.dtype}, which autocast leaves alone, expected x's {x.dtype}")
        return autocast
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None and t.dtype != x.dtype:
            raise TypeError(f"{name}: got dtype {t.dtype}, expected x's {x.dtype} (or autocast)")
    return x.dtype
