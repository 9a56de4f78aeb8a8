"""The options that the benchmark scripts share."""

import argparse
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks import common


def parser_of(name: str, doc: str | None) -> argparse.ArgumentParser:
    """That of ``python -m benchmarks.NAME``, whose --help begins with the script's docstring."""
    return argparse.ArgumentParser(
        f"python -m benchmarks.{name}", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected an integer >= 1")
    return int(text)


def only(text: str, kinds: Mapping[str, Callable[[str], Any]]) -> tuple[str, set[Any]]:
    """``r=16,64`` -> ("r", {16, 64})."""
    key, _, values = text.partition("=")
    if key not in kinds or not values:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected KEY=VALUE[,VALUE], KEY one of {', '.join(kinds)}")
    try:
        found = {kinds[key](value) for value in values.split(",")}
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected numbers for {key}") from None
    return key, found


def add_only(
    parser: argparse.ArgumentParser, kinds: Mapping[str, Callable[[str], Any]], more: str = "frozen always runs"
) -> None:
    """--only, any number of times: a list of (key, values) as :func:`only` gives them."""
    parser.add_argument(
        "--only",
        type=functools.partial(only, kinds=kinds),
        action="append",
        default=[],
        metavar="KEY=VALUE[,VALUE]",
        help=f"a part only, may be given several times; KEY is one of {', '.join(kinds)}; {more}",
    )


def add_rounds_of_dtypes(parser: argparse.ArgumentParser) -> None:
    help = "in bf16 (default 24); a third of it, but 3 at least, in fp16 and fp32"
    parser.add_argument("--rounds", type=positive, default=24, help=help)


def add_files(parser: argparse.ArgumentParser, files: str) -> None:
    """--out and --commit. ``files``: what is in the folder, and what becomes of it, in words."""
    parser.add_argument(
        "--out",
        type=Path,
        default=common.RESULTS,
        metavar="DIR",
        help=f"where {files} (default benchmarks/results)",
    )
    parser.add_argument("--commit", help="what to write as the commit where this is not a git checkout")
