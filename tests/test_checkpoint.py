"""Files are whole or not there; damage is seen; the newest whole checkpoint is found after a crash at any point."""

import contextlib
import json
import os
import shutil

import pytest
import torch

from safer_fast import checkpoint
from safer_fast.checkpoint import Corrupt

OLD = {"w": torch.arange(6.0).view(2, 3), "n": torch.tensor(3, dtype=torch.int64)}
NEW = {"w": torch.ones(2, 3, dtype=torch.bfloat16), "n": torch.tensor(4, dtype=torch.int64)}


def same(tensors, expected):
    return tensors.keys() == expected.keys() and all(
        t.dtype == expected[n].dtype and torch.equal(t, expected[n]) for n, t in tensors.items()
    )


def test_round_trip(tmp_path):
    state = {"epoch": 3, "loss": 0.1 + 0.2, "layers": ["a", "b"]}
    checkpoint.save(tmp_path / "last", OLD, state)
    tensors, back = checkpoint.load(tmp_path / "last")
    assert same(tensors, OLD)
    assert back == state
    assert checkpoint.load(tmp_path / "other") is None


def test_views_and_gradients_are_stored_as_plain_values(tmp_path):
    base = torch.arange(12.0)
    tensors = {"a": base[2:8].view(2, 3), "b": base[4:10].view(3, 2).T, "c": torch.nn.Parameter(base)}
    checkpoint.save_tensors(tmp_path / "f.safetensors", tensors)
    assert same(checkpoint.load_tensors(tmp_path / "f.safetensors"), {n: t.detach() for n, t in tensors.items()})
    assert (tmp_path / "f.safetensors").stat().st_size < 500  # not the whole base with each view


class Crash(BaseException):
    """The process is gone: nothing catches it."""


def crash_at(monkeypatch, call):
    """The n-th call that changes the disk never returns. Returns the counter."""
    count = [0]

    def wrap(function):
        def counted(*args, **kwargs):
            count[0] += 1
            if count[0] == call:
                raise Crash
            return function(*args, **kwargs)

        return counted

    monkeypatch.setattr(os, "replace", wrap(os.replace))
    monkeypatch.setattr(os, "fsync", wrap(os.fsync))
    monkeypatch.setattr(shutil, "rmtree", wrap(shutil.rmtree))
    return count


def test_a_crash_anywhere_in_save_leaves_the_old_or_the_new_checkpoint(tmp_path, monkeypatch):
    outcomes = []
    for call in range(1, 100):
        folder = tmp_path / str(call) / "last"
        checkpoint.save(folder, OLD, {"epoch": 1})
        with monkeypatch.context() as patch:
            count = crash_at(patch, call)
            try:
                checkpoint.save(folder, NEW, {"epoch": 2})
            except Crash:
                pass
            else:
                assert count[0] == call - 1
                break
        tensors, state = checkpoint.load(folder)
        assert same(tensors, OLD if state["epoch"] == 1 else NEW)
        outcomes.append(state["epoch"])
        checkpoint.save(folder, NEW, {"epoch": 3})  # and life goes on
        assert checkpoint.load(folder)[1] == {"epoch": 3}
    assert len(outcomes) > 8
    assert outcomes == sorted(outcomes)  # once the new one is there, it stays
    assert set(outcomes) == {1, 2}


def test_a_crash_in_the_first_save_leaves_none_or_a_whole_one(tmp_path, monkeypatch):
    for call in range(1, 12):
        folder = tmp_path / str(call) / "last"
        with monkeypatch.context() as patch:
            crash_at(patch, call)
            with contextlib.suppress(Crash):
                checkpoint.save(folder, NEW, {"epoch": 2})
        found = checkpoint.load(folder)
        assert found is None or same(found[0], NEW)


def test_a_crash_in_write_leaves_the_old_content(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    checkpoint.write_json(path, {"a": 1})
    for call in (1, 2):
        with monkeypatch.context() as patch:
            crash_at(patch, call)
            with pytest.raises(Crash):
                checkpoint.write_json(path, {"a": 2})
        assert json.loads(path.read_text()) == {"a": 1}
        assert [p.name for p in tmp_path.iterdir()] == ["results.json"]
    checkpoint.write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 2}


def test_a_full_disk_leaves_the_old_content(tmp_path, monkeypatch):
    path = tmp_path / "log.jsonl"
    checkpoint.write(path, "old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            checkpoint.write(path, "new")
        with pytest.raises(OSError, match="No space"):
            checkpoint.save(tmp_path / "last", NEW, {})
    assert path.read_text() == "old"
    assert checkpoint.load(tmp_path / "last") is None


def test_every_flipped_byte_is_detected(tmp_path):
    folder = tmp_path / "last"
    checkpoint.save(folder, NEW, {"epoch": 2})
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        for place in range(len(content)):
            for bit in (1, 128):
                path.write_bytes(content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :])
                try:
                    tensors, state = checkpoint.load(folder)
                except Corrupt:
                    continue
                # A flip in the white space of the manifest says the same.
                assert path.name == "manifest.json"
                assert same(tensors, NEW)
                assert state == {"epoch": 2}
        path.write_bytes(content)
    assert same(checkpoint.load(folder)[0], NEW)


def test_every_cut_tail_is_detected(tmp_path):
    folder = tmp_path / "last"
    checkpoint.save(folder, NEW, {"epoch": 2})
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        for size in range(len(content)):
            path.write_bytes(content[:size])
            try:
                tensors, state = checkpoint.load(folder)
            except Corrupt:
                continue
            assert path.name == "manifest.json"
            assert (same(tensors, NEW), state) == (True, {"epoch": 2})
        path.write_bytes(content)


@pytest.mark.parametrize("sibling", ["last.new", "last.old"])
@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_a_whole_sibling_takes_the_place_of_a_damaged_one(tmp_path, sibling, damage):
    checkpoint.save(tmp_path / "last", OLD, {"epoch": 1})
    shutil.copytree(tmp_path / "last", tmp_path / sibling)
    checkpoint.save(tmp_path / "x", NEW, {"epoch": 2})
    shutil.rmtree(tmp_path / "last")
    (tmp_path / "x").rename(tmp_path / "last")
    path = tmp_path / "last" / "tensors.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 4
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(content if damage == "flip" else content[:-1])
    tensors, state = checkpoint.load(tmp_path / "last")
    assert (same(tensors, OLD), state) == (True, {"epoch": 1})


def test_damage_without_a_sibling_is_said(tmp_path):
    checkpoint.save(tmp_path / "last", OLD, {"epoch": 1})
    (tmp_path / "last" / "state.json").write_text('{"epoch": 2}')
    with pytest.raises(Corrupt, match=r"state\.json is missing or does not match its checksum"):
        checkpoint.load(tmp_path / "last")


def test_safetensors_bytes_are_reproducible_with_one_metadata_key(tmp_path):
    metadata = {"model": "vit", "classes": ["a", "b"], "z": 1, "data": "digits"}
    paths = [tmp_path / f"{i}.safetensors" for i in range(6)]
    for i, path in enumerate(paths):
        keys = sorted(metadata, reverse=bool(i % 2))
        checkpoint.save_tensors(path, OLD, {k: metadata[k] for k in keys})
    assert len({p.read_bytes() for p in paths}) == 1
    header = json.loads(paths[0].read_bytes()[8 : 8 + int.from_bytes(paths[0].read_bytes()[:8], "little")])
    assert list(header["__metadata__"]) == ["safer_fast"]
    assert checkpoint.metadata_of(paths[0]) == metadata
    checkpoint.save_tensors(tmp_path / "bare.safetensors", OLD)
    assert checkpoint.metadata_of(tmp_path / "bare.safetensors") == {}


def test_files_that_are_not_whole_are_refused(tmp_path):
    path = tmp_path / "m.safetensors"
    with pytest.raises(FileNotFoundError, match="no file"):
        checkpoint.load_tensors(path)
    checkpoint.save_tensors(path, OLD, {"a": 1})
    whole = path.read_bytes()
    for content in (b"", b"hello", whole[:20], whole[:-1], whole + b"x"):
        path.write_bytes(content)
        with pytest.raises(Corrupt, match="not a whole safetensors file"):
            checkpoint.load_tensors(path)
        with pytest.raises(Corrupt, match="not a whole safetensors file"):
            checkpoint.metadata_of(path)


def test_nan_is_not_json(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        checkpoint.write_json(tmp_path / "results.json", {"robust": float("nan")})
    assert list(tmp_path.iterdir()) == []
