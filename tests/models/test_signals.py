"""Ctrl-C and SIGTERM: training ends with a checkpoint, and the processes that load images with it."""

import multiprocessing
import os
import signal
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from models.training.checkpoints import load_newest
from models.training.interrupt import StopOnSignal
from models.training.logs import read_metrics
from models.training.trainer import NonFiniteError, Trainer
from tests.models.runs import one_thread, start, tiny


@pytest.fixture(autouse=True)
def threads():
    with one_thread():
        yield


@pytest.mark.parametrize(("signal_number", "workers"), [(signal.SIGINT, 0), (signal.SIGINT, 2), (signal.SIGTERM, 2)])
def test_a_signal_ends_cleanly_with_a_checkpoint(signal_number, workers, tmp_path):
    """A terminal's Ctrl-C and `timeout` reach all processes, the loading ones among them."""
    run = tmp_path / "run"
    config = tiny(run, steps=10**6, workers=workers)
    process = start(["-m", "models.train"], config)
    deadline = time.monotonic() + 60
    while not ((run / "metrics.jsonl").exists() and read_metrics(run)):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal_number)
    out, _ = process.communicate(timeout=60)

    assert process.returncode == 130
    path, state = load_newest(run)
    assert state["step"] == read_metrics(run)[-1]["step"] >= 1
    assert f"ended by signal; newest checkpoint {path}" in out
    assert f"continue with: python -m models.train --resume --output {run}" in out
    result = Trainer(replace(config, steps=state["step"] + 1), resume=True).fit()
    assert result.step == state["step"] + 1


@pytest.fixture
def usual_interrupt():
    """Python's own reaction to Ctrl-C, which a process that a shell started in the background lacks."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_sigterm_finishes_the_step_and_a_second_signal_is_not_held_back(usual_interrupt):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with StopOnSignal() as stop:
        assert not stop.requested
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


@pytest.mark.skipif(multiprocessing.get_start_method() != "fork", reason="only what is forked takes a mask along")
def test_no_signal_reaches_the_loading_processes(tmp_path):
    """From their first moment on: one between their start and their first line would end them, too."""
    before = set(multiprocessing.active_children())
    with closing(Trainer(tiny(tmp_path / "run", workers=2))._batches()) as batches:
        next(batches)
        workers = set(multiprocessing.active_children()) - before
        assert len(workers) == 2
        for worker in workers:
            status = dict(line.split(":\t", 1) for line in Path(f"/proc/{worker.pid}/status").read_text().splitlines())
            for number in StopOnSignal.SIGNALS:
                assert int(status["SigBlk"], 16) >> (number - 1) & 1
        assert not signal.pthread_sigmask(signal.SIG_BLOCK, []) & {*StopOnSignal.SIGNALS}
    assert not workers & set(multiprocessing.active_children())


def test_what_ends_training_ends_the_loading_processes(tmp_path):
    before = set(multiprocessing.active_children())
    trainer = Trainer(tiny(tmp_path / "run", steps=10, warmup_steps=0, learning_rate=1e30, grad_clip=None, workers=2))
    with pytest.raises(NonFiniteError) as raised:
        trainer.fit()
    assert not set(multiprocessing.active_children()) - before
    assert raised.tb  # which keeps what it passed through


class Stuck:
    """Images on a disk that does not answer."""

    def __len__(self):
        return 64

    def __getitem__(self, index):
        time.sleep(1000)


def test_a_loading_process_that_is_stuck_is_ended(tmp_path):
    """torch's own way, SIGTERM, does not reach it."""

    def stop(*_):
        raise TimeoutError

    before, handler = set(multiprocessing.active_children()), signal.signal(signal.SIGALRM, stop)
    trainer = Trainer(tiny(tmp_path / "run", workers=1))
    trainer.data = replace(trainer.data, train=Stuck())
    signal.alarm(3)
    try:
        with pytest.raises(TimeoutError):
            trainer.fit()
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
    deadline = time.monotonic() + 30
    while set(multiprocessing.active_children()) - before:
        assert time.monotonic() < deadline
        time.sleep(0.1)
