"""What was decided once, and is kept for the next call that is alike."""

from typing import Any


class Memo(dict):
    """What was decided, by all that the decision rests on. Emptied when it holds 4096 (batch sizes that never repeat):
    the compiled kernels stay in Triton's cache."""

    def keep(self, key: tuple, value: Any) -> Any:
        if len(self) >= 4096:
            self.clear()
        self[key] = value
        return value
