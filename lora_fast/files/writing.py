"""Files of an adapter, written whole or not at all."""

import json
import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from lora_fast.files.format import CONFIG, TENSORS


def write_adapter(
    directory: str | os.PathLike[str], tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]
) -> None:
    """Put both files into the directory. ImportError without safetensors."""
    save_file = safetensors_or_raise("torch").save_file
    text = json.dumps(config, indent=2) + "\n"
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"format": "pt", "adapter_config": text}  # the config again, so that a mixture of two saves is seen
    _replace(
        folder,
        {
            TENSORS: lambda path: save_file(dict(tensors), path, metadata),
            CONFIG: lambda path: path.write_text(text, encoding="utf-8"),
        },
    )


def _replace(folder: Path, files: dict[str, Callable[[Path], Any]]) -> None:
    """Write every file in full under another name, then put them all in place."""
    token = secrets.token_hex(4)  # processes on several hosts may share the folder, and a number
    written = {folder / name: folder / f".{name}.{token}.part" for name in files}
    try:
        for (path, part), write in zip(written.items(), files.values(), strict=True):
            write(part)
            with open(part, "rb+") as file:
                os.fsync(file.fileno())
            if path.exists():
                part.chmod(path.stat().st_mode)
        for path, part in written.items():
            os.replace(part, path)
    finally:
        for part in written.values():
            part.unlink(missing_ok=True)


def safetensors_or_raise(module: str) -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError("adapters on disk need safetensors: pip install safetensors") from error
    return safetensors.torch if module else safetensors
