"""Rows about a model's layers as text: alike ones as one, a reason that most of them share told once."""

from collections import Counter
from collections.abc import Iterable, Sequence

Row = tuple[str, ...]


def grouped(rows: Iterable[Row]) -> list[Row]:
    """(name, count, *rest) of rows (name, *rest): one for all whose names differ in numbers alone and that share the
    rest. A number in which they agree stays."""
    names: dict[Row, list[list[str]]] = {}
    for name, *rest in rows:
        parts = name.split(".")
        pattern = ".".join("*" if part.isdigit() else part for part in parts)
        names.setdefault((pattern, *rest), []).append(parts)
    return [
        (".".join(part[0] if len(set(part)) == 1 else "*" for part in zip(*found, strict=True)), str(len(found)), *rest)
        for (_, *rest), found in names.items()
    ]


def shared(reasons: Iterable[str]) -> str:
    """The reason that is given most often, if more than once; "" otherwise."""
    counts = Counter(filter(None, reasons))
    return next((reason for reason, count in counts.most_common(1) if count > 1), "")


def told_once(reason: str, reasons: Iterable[str]) -> str:
    """The line below a table whose rows leave out the ``reason`` that :func:`shared` found among these."""
    alone = set(filter(None, reasons)) == {reason}
    return f"not fused{'' if alone else ', where no other reason is given'}: {reason}"


def aligned(rows: Sequence[Row]) -> list[str]:
    """A line for each row, all columns but the last as wide as their widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)][:-1]
    return [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]).rstrip()
        for row in rows
    ]
