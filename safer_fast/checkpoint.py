"""Files that are there whole or not at all: safetensors and JSON, checksummed, free of pickle.

A checkpoint is a folder: `tensors.safetensors`, `state.json`, and `manifest.json` with their sha256. It is written
under a temporary name, synced, and renamed; at every moment one complete checkpoint lies on the disk.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

_FILES = ("tensors.safetensors", "state.json")


class Corrupt(ValueError):
    """A file of ours that is not what its checksum says."""


def write(path: Path, content: bytes | str) -> None:
    """Writes a file atomically: a reader sees the old content or the new one, also after a crash."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        _write_synced(temporary, content.encode() if isinstance(content, str) else content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """JSON, indented, keys in the order given, NaN refused."""
    write(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any] | None = None) -> None:
    """One safetensors file, the same bytes for the same tensors.

    metadata is stored as sorted JSON under one key: safetensors writes several keys in random order.
    """
    write(path, _serialise(tensors, metadata))


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises FileNotFoundError, or Corrupt if it is not a whole one."""
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    try:
        return safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise _not_whole(path, error) from None


def metadata_of(path: Path) -> dict[str, Any]:
    """What `save_tensors` was given as metadata; {} for a file written by others."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return json.loads((file.metadata() or {}).get("safer_fast", "{}"))
    except safetensors.SafetensorError as error:
        raise _not_whole(path, error) from None


def save(folder: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Writes a checkpoint folder, replacing the one of that name only after the new one is complete."""
    new, old = _siblings(folder)
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    contents = {_FILES[0]: _serialise(tensors, None), _FILES[1]: json.dumps(state, indent=1).encode()}
    for name, content in contents.items():
        _write_synced(new / name, content)
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    _write_synced(new / "manifest.json", json.dumps(sums, indent=1).encode())
    _sync_folder(new)
    _swap_in(new, folder, old)


def load(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """A complete checkpoint of that name, the settled one first, or None where there is none.

    After a crash between two renames it may lie under the temporary name; a damaged one is passed over if another
    is whole, else Corrupt is raised.
    """
    new, old = _siblings(folder)
    errors = []
    for candidate in (folder, new, old):
        try:
            _verify(candidate)
            state = json.loads((candidate / _FILES[1]).read_text())
            return load_tensors(candidate / _FILES[0]), state
        except FileNotFoundError:
            continue
        except Corrupt as error:
            errors.append(str(error))
    if errors:
        raise Corrupt("; ".join(errors))
    return None


def _not_whole(path: Path, error: Exception) -> Corrupt:
    return Corrupt(f"{path} is not a whole safetensors file ({error}); fetch or write it again")


def _siblings(folder: Path) -> tuple[Path, Path]:
    return folder.with_name(f"{folder.name}.new"), folder.with_name(f"{folder.name}.old")


def _swap_in(new: Path, folder: Path, old: Path) -> None:
    """A folder cannot be renamed over a full one, so the old one steps aside first."""
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(new, folder)
    _sync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _verify(folder: Path) -> None:
    try:
        sums = dict(json.loads((folder / "manifest.json").read_text()))
    except (ValueError, TypeError):  # not JSON, not UTF-8, not an object
        raise Corrupt(f"{folder}/manifest.json is damaged") from None
    for name in _FILES:
        path = folder / name
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != sums.get(name):
            raise Corrupt(f"{path} is missing or does not match its checksum")


def _serialise(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any] | None) -> bytes:
    plain = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    text = {"safer_fast": json.dumps(metadata, sort_keys=True)} if metadata else None
    return safetensors.torch.save(plain, text)


def _write_synced(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
