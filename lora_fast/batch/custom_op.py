"""Several adapters in one batch as an operator for torch.compile: ``torch.ops.lora_fast.lora_batch``, y of a layer, of
LoRA and of DoRA.

Under autograd it becomes ``lora_batch_fwd``, and its gradients ``lora_batch_bwd``, else ``lora_batch_alone``, as
``lora_linear`` does (ops/custom_op.py).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from lora_fast.bases.packed import rounds_norm, tensors_of
from lora_fast.batch.form import Adapter
from lora_fast.dispatch import autocast_dtype
from lora_fast.kernels.bases import PLAIN
from lora_fast.kernels.batch.problem import Problem
from lora_fast.kernels.batch.ranks import Ranks, numbers_of
from lora_fast.kernels.batch.run import Call, Made, backward, forward, to_save
from lora_fast.kernels.memo import Memo
from lora_fast.kernels.problem import Kinds, MaybeTensor, Needs
from lora_fast.ops.linear import draw_seed
from lora_fast.ops.parts import addressable, base_of, contiguous, dtype_of, on, saved_by
from lora_fast.ops.registering import register

_GIVEN = """(Tensor x, Tensor? bias, Tensor[] small, Tensor which, Tensor[] held, Tensor[] scalings, Tensor? seed,
    float[] rates, bool round_norm, str base, bool keep_z)"""
_library = torch.library.Library("lora_fast", "FRAGMENT")
_library.define(f"lora_batch{_GIVEN} -> Tensor")
_library.define(f"lora_batch_alone{_GIVEN} -> Tensor")
_library.define(f"lora_batch_fwd{_GIVEN} -> Tensor[]")
_library.define("""lora_batch_bwd(Tensor dy, Tensor?[] saved, SymInt k, int[] ranks, ScalarType a_kind,
    ScalarType b_kind, ScalarType bias_kind, ScalarType m_kind, bool[] needs, bool dora, str base,
    bool keep_z) -> Tensor[]""")
_problems = Memo()


class _Given(NamedTuple):
    """The arguments of ``lora_batch``; ``small``: all A's, then all B's, then DoRA's magnitudes."""

    x: torch.Tensor
    bias: MaybeTensor
    small: Sequence[torch.Tensor]
    which: torch.Tensor
    held: Sequence[torch.Tensor]  # by the base
    scalings: Sequence[torch.Tensor]
    seed: MaybeTensor
    rates: Sequence[float]
    round_norm: bool
    base: str
    keep_z: bool

    @property
    def groups(self) -> list[Sequence[torch.Tensor]]:
        """A's, B's and magnitudes."""
        n = len(self.rates)
        return [self.small[:n], self.small[n : 2 * n], self.small[2 * n :]]

    def problem(self, *needs: bool) -> Problem:
        a, b, m = self.groups
        return problem_of(
            self.x.shape,
            self.x.dtype,
            a,
            b,
            self.bias,
            Needs(*needs),
            m,
            self.round_norm,
            self.base,
            keep_z=self.keep_z,
        )


def problem_of(
    shape: Sequence[int],
    kind: torch.dtype,
    a: Sequence[torch.Tensor],
    b: Sequence[torch.Tensor],
    bias: MaybeTensor,
    needs: Needs,
    m: Sequence[torch.Tensor] = (),
    round_norm: bool = False,
    base: str = PLAIN.name,
    *,
    keep_z: bool = False,
) -> Problem:
    """For x of this shape, and products in this dtype."""
    kinds = Kinds(kind, common(a), common(b), dtype_of(bias), common(m) if m else None)
    ranks = Ranks(tuple(t.shape[0] for t in a))
    return Problem(
        tuple(shape[:-1]), shape[-1], b[0].shape[0], ranks, kinds, needs, len(m) > 0, round_norm, base, keep_z
    )


def held_by(weight: torch.Tensor, kind: torch.dtype) -> tuple[torch.Tensor, ...]:
    """The tensors of a base, a plain one in the dtype of the products."""
    inner = tensors_of(weight)
    return (weight.to(kind),) if inner is None else inner(weight)


def needs_of(
    x: torch.Tensor,
    a: Sequence[torch.Tensor],
    b: Sequence[torch.Tensor],
    bias: MaybeTensor,
    m: Sequence[torch.Tensor],
    save: str,
) -> tuple[Needs, bool]:
    """What asks for gradients, and whether z is kept for those of the magnitudes. As for one adapter (ops/linear.py): y
    lacks what a bias drowns, and z again takes all that A's and B's keep."""
    train = torch.is_grad_enabled()

    def asks(*tensors: MaybeTensor) -> bool:
        return train and any(t is not None and t.requires_grad for t in tensors)

    needs = Needs(asks(x), asks(*a), asks(*b), asks(bias), asks(*m))
    return needs, needs.m and not (save == "auto" and bias is None and needs.a and needs.b)


def common(tensors: Sequence[torch.Tensor]) -> torch.dtype:
    """The dtype that all fit in."""
    found = tensors[0].dtype
    for t in tensors[1:]:
        found = torch.promote_types(found, t.dtype)
    return found


def beside(small: Sequence[torch.Tensor], n: int) -> tuple[torch.Tensor, torch.Tensor, MaybeTensor]:
    """Of n adapters A's one below the other, [sum of R, K], B's one after the other, [N * sum of R], and magnitudes
    [n, N], if there are any."""
    a, b, m = small[:n], small[n : 2 * n], small[2 * n :]
    if len({t.shape for t in b}) > 1:
        b = [t.reshape(-1) for t in b]
    magnitudes = torch.cat(m).view(n, -1) if m else None  # type: ignore[arg-type]
    return torch.cat(a), torch.cat(b).view(-1), magnitudes  # type: ignore[arg-type]


def each(
    problem: Problem,
    grads: Sequence[MaybeTensor],
    kinds: Sequence[torch.dtype] | None,
    needs: Sequence[bool],
) -> list[MaybeTensor]:
    """The gradients of all A's, all B's and all magnitudes that lie one after the other in ``grads``, where they are
    needed, in these dtypes (None: as they are). The host's time: a view for each, and little more."""
    grad_a, grad_b, *rest = grads
    ranks, n = problem.ranks.of, problem.n
    found: list[MaybeTensor] = [None] * (len(grads) * len(ranks))
    if grad_a is not None:
        found[: len(ranks)] = grad_a.view(-1, problem.k).split_with_sizes(ranks)  # past the Python of ``split``
    if grad_b is not None and len(set(ranks)) == 1:
        found[len(ranks) : 2 * len(ranks)] = grad_b.view(-1, ranks[0]).split_with_sizes((n,) * len(ranks))
    elif grad_b is not None:
        parts = zip(grad_b.split_with_sizes([n * r for r in ranks]), ranks, strict=True)
        found[len(ranks) : 2 * len(ranks)] = [part.view(n, r) for part, r in parts]
    if rest and rest[0] is not None:
        found[2 * len(ranks) :] = rest[0].unbind()
    if kinds is not None:
        found = [t if t is None else t.to(kind) for t, kind in zip(found, kinds, strict=True)]
    return found if all(needs) else [t if need else None for t, need in zip(found, needs, strict=True)]


def kinds_of(*groups: Sequence[torch.Tensor]) -> list[torch.dtype] | None:
    """The dtypes of all A's, B's and so on; None where they are those that ``common`` finds for each."""
    kinds = [[t.dtype for t in group] for group in groups]
    return None if all(len(set(some)) <= 1 for some in kinds) else [kind for some in kinds for kind in some]


def gradients(problem: Problem, dy: torch.Tensor, saved: Sequence[MaybeTensor]) -> tuple[MaybeTensor, ...]:
    """What ``backward`` gives, of tensors as autograd has them."""
    if not dy.is_contiguous():
        dy = addressable(dy)
        if dy.stride(1) != 1 or dy.stride(0) < dy.shape[1]:
            dy = dy.contiguous()
    scales, x, *others = saved
    return backward(problem, dy, (scales, None if x is None else addressable(x), *others))


def linear_batch(
    x: torch.Tensor,
    weight: torch.Tensor,
    adapters: Sequence[Adapter],
    which: torch.Tensor,
    bias: MaybeTensor,
    training: bool,
    round_norm: bool = False,
    save: str = "auto",
) -> torch.Tensor:
    """y, by way of the operator; DoRA's where the adapters have magnitudes."""
    dtype = autocast_dtype(x.device)
    if dtype is not None and x.dtype != torch.float64:
        x = x.to(dtype)
    held = held_by(weight, x.dtype)
    rates = [float(one.dropout_p) if training else 0.0 for one in adapters]
    number = torch.ones((), device=x.device, dtype=torch.float32)  # torch.full would recompile
    scalings = [one.scaling if isinstance(one.scaling, torch.Tensor) else number * one.scaling for one in adapters]
    a, b = [one.lora_A for one in adapters], [one.lora_B for one in adapters]
    m = [one.lora_magnitude_vector for one in adapters if one.lora_magnitude_vector is not None]
    keep_z = needs_of(x, a, b, bias, m, save)[1]
    seed = draw_seed(x.device) if any(rates) else None
    given = (
        x,
        bias,
        [*a, *b, *m],
        which,
        held,
        scalings,
        seed,
        rates,
        round_norm and rounds_norm(weight),
        base_of(weight),
        keep_z,
    )
    return torch.ops.lora_fast.lora_batch(*given)


def _alone(*args: Any) -> torch.Tensor:
    return _forward(*args)[0]


def _forward(*args: Any) -> list[torch.Tensor]:
    """y, the scales, the room, and what there is of the mask's bits and z."""
    given = _Given(*args)
    x, bias, small, which, held, scalings, seed, rates, *flags = given
    forms = [(t.dtype, t.shape) for t in small]
    key = (
        x.device,
        x.dtype,
        x.shape,
        x.stride(),
        *forms,
        dtype_of(bias),
        *(t.stride() for t in held),
        len(rates),
        *flags,
    )
    problem = _problems.get(key) or _problems.keep(key, given.problem())
    with on(x.device):
        numbers = numbers_of(problem.ranks, scalings, rates, problem.lifted, x.device)
        call = Call(tuple(held), which.contiguous(), numbers, seed)
        a, b, m = beside(small, len(rates))
        y, made = forward(problem, call, addressable(x), a, b, contiguous(bias), m)
    return [t for t in (y, numbers.scales, made.room, made.bits, made.z) if t is not None]


def _forward_fake(*args: Any) -> list[torch.Tensor]:
    given = _Given(*args)
    x, problem = given.x, given.problem()
    found = [
        x.new_empty(*x.shape[:-1], problem.n),
        x.new_empty(3, problem.ranks.total, dtype=torch.float32),
        x.new_empty(problem.bytes, dtype=torch.uint8),
    ]
    if given.seed is not None:
        found.append(x.new_empty(problem.m, -(-problem.k // 32), dtype=torch.int32))
    if given.keep_z:
        found.append(torch.empty_like(found[0]))
    return found


def _gradients(dy: torch.Tensor, saved: Sequence[MaybeTensor], k: int, *rest: Any) -> list[torch.Tensor]:
    """dx and the gradients of A's, B's, bias and magnitudes that are needed, in this order."""
    ranks, *kinds, needs, dora, base, keep_z = rest
    strides = (None if t is None else (t.dtype, t.stride()) for t in saved)
    key = dy.device, dy.dtype, dy.shape, k, *ranks, *kinds, *needs, dora, base, keep_z, *strides
    problem = _problems.get(key)
    if problem is None:
        every, asks = Kinds(dy.dtype, *kinds), Needs(*needs)
        problem = Problem(dy.shape[:-1], k, dy.shape[-1], Ranks(tuple(ranks)), every, asks, dora, False, base, keep_z)
        _problems.keep(key, problem)
    with on(dy.device):
        grads = gradients(problem, dy, saved)
    return [grad for grad in grads if grad is not None]


def _gradients_fake(dy: torch.Tensor, saved: Any, k: int, *rest: Any) -> list[torch.Tensor]:
    ranks, *kinds, needs, _, _, _ = rest
    n = dy.shape[-1]
    shapes = (*dy.shape[:-1], k), (sum(ranks) * k,), (sum(ranks) * n,), (n,), (len(ranks), n)
    made = zip(shapes, (dy.dtype, *kinds), needs, strict=True)
    return [dy.new_empty(shape, dtype=kind) for shape, kind, need in made if need]


class _Batch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, bias: MaybeTensor, *rest: Any) -> torch.Tensor:
        *small, which, held, scalings, seed, rates, round_norm, base, keep_z = rest
        given = _Given(x, bias, small, which, held, scalings, seed, rates, round_norm, base, keep_z)
        n, (asks_x, asks_bias, *asks) = len(rates), ctx.needs_input_grad[: 2 + len(small)]
        needs = asks_x, any(asks[:n]), any(asks[n : 2 * n]), asks_bias, any(asks[2 * n :])
        problem = given.problem(*needs)
        y, scales, room, *others = torch.ops.lora_fast.lora_batch_fwd(*given)
        bits = None if seed is None else others.pop(0)
        made = Made(room, bits, others.pop() if keep_z else None)
        ctx.save_for_backward(*to_save(problem, held, scales, x, made, y))
        kinds = [kind or x.dtype for kind in problem.kinds[1:]]
        ctx.rest = problem.k, list(problem.ranks.of), *kinds, list(needs), problem.dora, base, keep_z
        ctx.problem, ctx.asks, ctx.small = problem, asks, kinds_of(*given.groups)
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
        found = torch.ops.lora_fast.lora_batch_bwd(dy, saved_by(ctx), *ctx.rest)
        dx, grad_a, grad_b, grad_bias, grad_m = (found.pop(0) if need else None for need in ctx.problem.needs)
        grads = (grad_a, grad_b, grad_m) if ctx.problem.dora else (grad_a, grad_b)
        return dx, grad_bias, *each(ctx.problem, grads, ctx.small, ctx.asks), *(None,) * 8


def _recorded(*args: Any) -> torch.Tensor:
    given = _Given(*args)
    if torch.is_grad_enabled() and torch._C._any_requires_grad(given.x, given.bias, *given.small):
        return _Batch.apply(given.x, given.bias, *given.small, *given[3:])
    return torch.ops.lora_fast.lora_batch_alone(*args)


register(
    _library,
    "lora_batch",
    recorded=_recorded,
    alone=_alone,
    forward=_forward,
    gradients=_gradients,
    forward_fake=_forward_fake,
    gradients_fake=_gradients_fake,
)
