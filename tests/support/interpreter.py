"""Triton's interpreter without detours, and with masks as 3.9's wants them: in half the time.

For each call of a device function it looks through all of ``triton.language`` again, to replace what the launch has
replaced already. It asks after each sum and product of integers whether it overflowed, works out each type's numpy
dtype from a new table, and each block's shape and name anew. A mask made of a block and a scalar it holds as 32-bit
integers, which its own loads and stores refuse since Triton 3.9.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

from triton import language
from triton.runtime import interpreter

LANGUAGES = language, language.core
honest = interpreter._patch_lang


@cache
def languages(fn: Callable) -> list:
    """Under which names a function knows triton.language."""
    return [one for one in LANGUAGES if any(value is one for value in fn.__globals__.values())]


def patch_once(fn: Callable):
    """For a launch what Triton does, for what it calls nothing."""
    if all(not language.core.is_builtin(one.load) for one in languages(fn)):
        return interpreter._LangPatchScope()
    return honest(fn)


def with_bools(method: Callable, at: int) -> Callable:
    """A load or a store whose argument at this place is a mask."""

    def fn(self, *args, **kwargs):
        if isinstance(args[at], interpreter.TensorHandle):
            args[at].data = args[at].data.astype(bool, copy=False)
        return method(self, *args, **kwargs)

    return fn


def name_of(kind: Any) -> object:
    """What tells apart the types of elements, pointers among them."""
    return type(kind), kind.name, getattr(kind, "address_space", None)


def once_a_type(method: Callable) -> Callable:
    """A numpy dtype, by that of a block's elements."""
    known: dict[object, Any] = {}

    def fn(kind):
        name = name_of(kind.element_ty if isinstance(kind, language.block_type) else kind)
        if name not in known:
            known[name] = method(kind)
        return known[name]

    return fn


def once_a_shape(init: Callable) -> Callable:
    """A block's type: all of one shape and kind of elements have their attributes in common."""
    known: dict[object, dict[str, Any]] = {}

    def fn(self, element_ty, shape):
        key = name_of(element_ty), tuple(map(language.core._unwrap_if_constexpr, shape))
        if key not in known:
            init(self, element_ty, shape)
            known[key] = {**vars(self), "of_tensors": {}}
        vars(self).update(known[key])

    return fn


def once_a_block(init: Callable) -> Callable:
    """A tensor: what follows from a block's type is kept with it."""

    def fn(self, handle, type):
        found = vars(type).get("of_tensors")
        if found:
            self.handle, self.type = handle, type
            vars(self).update(found)
            return
        init(self, handle, type)
        if found is not None:
            found |= {name: value for name, value in vars(self).items() if name not in ("handle", "type")}

    return fn


def quicken() -> None:
    interpreter._patch_lang = patch_once
    interpreter._get_np_dtype = once_a_type(interpreter._get_np_dtype)
    language.block_type.__init__ = once_a_shape(language.block_type.__init__)
    language.tensor.__init__ = once_a_block(language.tensor.__init__)
    builder = interpreter.InterpreterBuilder
    object.__setattr__(interpreter.interpreter_builder.options, "sanitize_overflow", False)
    builder.create_masked_load = with_bools(builder.create_masked_load, 1)
    builder.create_masked_store = with_bools(builder.create_masked_store, 2)
