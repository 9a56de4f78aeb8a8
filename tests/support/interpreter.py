"""Triton's interpreter without a detour, and with masks as 3.9's wants them.

For each call of a device function it looks through all of ``triton.language`` again, to replace what the launch has
replaced already: a sixth of the time that interpreted kernels take. A mask made of a block and a scalar it holds as
32-bit integers, which its own loads and stores refuse since Triton 3.9.
"""

from collections.abc import Callable
from functools import cache

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


def quicken() -> None:
    interpreter._patch_lang = patch_once
    builder = interpreter.InterpreterBuilder
    builder.create_masked_load = with_bools(builder.create_masked_load, 1)
    builder.create_masked_store = with_bools(builder.create_masked_store, 2)
