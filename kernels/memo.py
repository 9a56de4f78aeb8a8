"""What was decided once, and is kept for the next call that is alike."""

from typing import Any
from weakref import WeakValueDictionary


class Memo(dict[Any, Any]):
    """What was decided, by all that the decision rests on. Emptied when it holds 4096 (batch sizes that never repeat):
    the compiled kernels stay in Triton's cache."""

    def __init__(self) -> None:
        _memos[id(self)] = self

    def keep(self, key: tuple[Any, ...], value: Any) -> Any:
        if len(self) >= 4096:
            self.clear()
        self[key] = value
        return value


_memos: WeakValueDictionary[int, Memo] = WeakValueDictionary()  # all that there are


def forget_all() -> None:
    """Empty every memo: something that decisions rest on without having it in their keys has changed."""
    for memo in list(_memos.values()):
        memo.clear()
