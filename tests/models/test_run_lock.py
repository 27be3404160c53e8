"""One process at a time in a run directory."""

import multiprocessing
import os
import signal
import sys
from contextlib import closing

import pytest

from models.demo import make_room
from models.files import FileLock
from models.training.checkpoints import load_newest
from models.training.lock import remove_runs, run_lock
from models.training.trainer import NonFiniteError, Trainer
from tests.models.runs import one_thread, start, tiny

HOLD = """
import sys, time
from models.train import parse
from models.training.trainer import Trainer

trainer = Trainer(*parse(sys.argv[1:])[:1])
trainer.save()
print("holds", flush=True)
time.sleep(600)
"""


@pytest.fixture(autouse=True)
def threads():
    with one_thread():
        yield


def test_a_second_process_is_refused_and_a_killed_one_lets_go(tmp_path):
    config = tiny(tmp_path / "run", steps=1)
    process = start(["-c", HOLD], config)
    try:
        assert process.stdout.readline() == "holds\n"
        before = (tmp_path / "run" / "config.yaml").read_bytes()
        with pytest.raises(ValueError, match=f"another process trains into {tmp_path / 'run'}: wait for it"):
            Trainer(tiny(tmp_path / "run", steps=3), resume=True)
        with pytest.raises(ValueError, match="another process trains into"):
            make_room(tmp_path, ["run"], overwrite=True)
        assert (tmp_path / "run" / "config.yaml").read_bytes() == before and load_newest(tmp_path / "run")
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    assert Trainer(config, resume=True).fit().step == 1


def test_a_trainer_lets_go_when_it_ends(tmp_path):
    trainer = Trainer(tiny(tmp_path, steps=1))
    with pytest.raises(ValueError, match="another process trains into"):
        Trainer(tiny(tmp_path, steps=2), resume=True)
    trainer.fit()
    longer = Trainer(tiny(tmp_path, steps=2), resume=True)
    with pytest.raises(ValueError, match="another process trains into"):
        trainer.fit()  # it takes the directory again
    longer.fit()
    failing = Trainer(tiny(tmp_path / "nan", steps=3, warmup_steps=0, learning_rate=1e30, grad_clip=None))
    with pytest.raises(NonFiniteError):
        failing.fit()
    Trainer(failing.config, resume=True)


def test_one_that_trained_meanwhile_is_noticed(tmp_path, monkeypatch):
    """Between the look at the directory and its lock."""
    config = tiny(tmp_path / "run", steps=2)
    monkeypatch.setattr("models.training.trainer.load_dataset", lambda *a, **k: train_first(*a, **k))

    def train_first(*arguments, **options):
        monkeypatch.undo()
        Trainer(config).fit()
        return load_dataset(*arguments, **options)

    from models.data import load_dataset

    with pytest.raises(ValueError, match="another process has trained into .*run meanwhile: resume"):
        Trainer(config)


@pytest.mark.skipif(multiprocessing.get_start_method() != "fork", reason="only what is forked has the file open")
def test_what_loads_images_does_not_hold_the_directory(tmp_path):
    """It may outlive a killed trainer for seconds."""
    trainer = Trainer(tiny(tmp_path, workers=1))
    with closing(trainer._batches()) as batches:
        next(batches)
        trainer.lock.close()
        Trainer(tiny(tmp_path), resume=True)


def test_runs_are_removed_together_or_not_at_all(tmp_path):
    runs = [tmp_path / name for name in "ab"]
    for run in runs:
        run.mkdir()
    with closing(run_lock(runs[1])), pytest.raises(ValueError, match=f"another process trains into {runs[1]}"):
        remove_runs(runs)
    assert all(run.exists() for run in runs)
    remove_runs(runs)
    assert not any(run.exists() for run in runs)


def test_without_locks_there_are_none(tmp_path, monkeypatch):
    """On Windows, and on file systems that do not have them."""
    with monkeypatch.context() as context:
        context.setitem(sys.modules, "fcntl", None)
        with closing(FileLock(tmp_path / "file", "busy")), closing(FileLock(tmp_path / "file", "busy")):
            pass

    def refuse(*_):
        raise OSError("Function not implemented")

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.warns(UserWarning, match="file can't be locked .*Function not implemented"):
        FileLock(tmp_path / "file", "busy").close()
