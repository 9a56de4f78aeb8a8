"""Triton's interpreter without a detour.

For each call of a device function it looks through all of ``triton.language`` again, to replace what the launch has
replaced already: a sixth of the time that interpreted kernels take.
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


def quicken() -> None:
    interpreter._patch_lang = patch_once
