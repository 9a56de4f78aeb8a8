"""The functional API: checked inputs, one choice of path, then the fused kernels or the plain torch reference."""

import torch

from lora_fast import dispatch, reference
from lora_fast.bases.packed import PackedWeight
from lora_fast.checks import FLOATS as FLOATS
from lora_fast.checks import check_dora, check_linear, check_save_x
from lora_fast.kept import Kept
from lora_fast.paths import recall, settle


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
    kept: Kept | None = None,
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
        kept: where to keep copies of lora_A and lora_B in x's dtype, if they are of another, for the next call; if
            neither asks for a gradient (see :class:`lora_fast.kept.Kept`).

    Returns:
        [..., N] with the dtype of ``F.linear(x, weight, bias)``, autocast included.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: wrong shapes or devices, dropout_p outside [0, 1), scaling not finite (looked at in eager alone, and
            not if it is a tensor), a weight that requires grad, save_x neither "x" nor "fp8".
        RuntimeError: ``backend="triton"`` where the kernels cannot run; an fp8 weight or save_x="fp8" on a GPU without
            8-bit matrix units.
    """
    facts, call = recall(x, weight, lora_A, lora_B, scaling, bias, None, dropout_p, backend, save_x)
    if call is None:
        dtype = check_linear(x, weight, lora_A, lora_B, scaling, bias, dropout_p)
        check_save_x(save_x)
        call = settle(facts, dtype, backend, (x, weight, lora_A, lora_B, bias), save_x=save_x)
    return call(x, weight, lora_A, lora_B, scaling, bias, dropout_p if training else 0.0, None, kept)


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
    facts, call = recall(
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
        check_save_x(save_x)
        call = settle(
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
