"""Files written whole or not at all, and what counts as a checkpoint."""

import io
import shutil
import threading
import zipfile

import pytest
import torch

from models.files import write_atomically
from models.train import main
from models.training.checkpoints import CheckpointError, list_checkpoints, load_checkpoint, save_checkpoint
from models.training.trainer import Trainer
from tests.models.runs import command_line, tiny


def test_what_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail(file):
        file.write(b"half of it")
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, fail)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_two_writers_of_one_file_do_not_mix(tmp_path):
    path, both_write = tmp_path / "file", threading.Barrier(2, timeout=60)

    def write(content: bytes) -> None:
        def write_slowly(file):
            file.write(content[:1000])
            file.flush()
            both_write.wait()
            file.write(content[1000:])

        write_atomically(path, write_slowly)

    writers = [threading.Thread(target=write, args=(letter * 2000,)) for letter in (b"a", b"b")]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert path.read_bytes() in (b"a" * 2000, b"b" * 2000) and list(tmp_path.iterdir()) == [path]


def test_a_full_disk_ends_training_with_a_word(tmp_path, monkeypatch, capsys):
    """torch raises a RuntimeError for it, as for an archive whose file takes no more."""

    def save(state, file):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 320 vs 214")

    monkeypatch.setattr(torch, "save", save)
    run = tmp_path / "run"
    assert main(command_line(tiny(run, steps=1))) == 1
    error = capsys.readouterr().err
    assert f"error: {run / 'checkpoints' / 'step-00000001.pt'} can't be written: [enforce fail" in error
    assert not list((run / "checkpoints").iterdir())


def test_copies_of_checkpoints_are_the_users_own(tmp_path):
    trainer = Trainer(tiny(tmp_path, steps=9, keep_checkpoints=1))
    trainer.save()
    first = trainer.checkpoint
    copies = [first.with_name(name) for name in ("step-best.pt", "step-00000000-keep.pt", "step-1.pt")]
    for copy in copies:
        shutil.copy(first, copy)
    trainer.step = 2
    trainer.save()
    assert list_checkpoints(tmp_path) == [trainer.checkpoint] and not first.exists()
    assert all(copy.exists() for copy in copies)


def test_checkpoints_are_in_the_order_of_their_steps(tmp_path):
    paths = [save_checkpoint(tmp_path, {"step": step}, keep=3) for step in (99_999_998, 99_999_999, 100_000_000)]
    assert list_checkpoints(tmp_path) == paths[::-1]
    paths.append(save_checkpoint(tmp_path, {"step": 100_000_001}, keep=3))
    assert list_checkpoints(tmp_path) == paths[:0:-1]


def test_damage_that_the_unpickler_stumbles_over(tmp_path):
    """Which exception comes depends on the byte that is wrong."""
    path, whole = tmp_path / "file.pt", io.BytesIO()
    torch.save({"step": 1}, whole)
    with zipfile.ZipFile(whole) as good, zipfile.ZipFile(path, "w") as damaged:
        for name in good.namelist():
            damaged.writestr(name, b"\x80\x02a." if name.endswith("data.pkl") else good.read(name))
    with pytest.raises(CheckpointError, match="IndexError.*truncated, damaged or another kind"):
        load_checkpoint(path)
