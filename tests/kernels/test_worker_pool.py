"""Threads that share the parts of a call: each part once, errors, interrupts, everybody's number of threads."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from liteattention.kernels import SkipMask, Workspace, lite_attention
from liteattention.kernels.worker_pool import run_parts

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def in_thread(function):
    """What a function returns in a thread of its own."""
    got = []
    thread = threading.Thread(target=lambda: got.append(function()))
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    return got[0]


def test_every_part_is_computed_once_on_one_torch_thread_in_inference_mode():
    seen = []

    def work(part):
        time.sleep(0.001)
        seen.append((part, threading.get_ident(), torch.get_num_threads(), torch.is_inference_mode_enabled()))

    run_parts(lambda: work, range(40), CPU)
    assert sorted(part for part, *_ in seen) == list(range(40))
    assert len({ident for _, ident, *_ in seen} - {threading.get_ident()}) == 2
    assert {(n, inference) for *_, n, inference in seen} == {(1, True)}
    assert not torch.is_inference_mode_enabled()


def test_one_thread_or_another_device_needs_no_other_thread():
    idents = set()
    run_parts(lambda: lambda part: idents.add(threading.get_ident()), range(4), torch.device("meta"))
    torch.set_num_threads(1)
    run_parts(lambda: lambda part: idents.add(threading.get_ident()), range(4), CPU)
    assert idents == {threading.get_ident()}


@pytest.mark.parametrize("number", [1, 3])
def test_nobody_elses_number_of_threads_changes(number):
    """The caller's, that of a thread which used torch before, and that of threads made later."""
    torch.set_num_threads(number)
    ask, answer = threading.Event(), []

    def older():
        torch.get_num_threads()  # before this, torch forgets what is set
        torch.set_num_threads(7)
        ask.wait(60)
        answer.append(torch.get_num_threads())

    thread = threading.Thread(target=older)
    thread.start()
    time.sleep(0.05)
    torch.set_num_threads(number)
    x = torch.randn(1, 2, 300, 64)
    lite_attention(x, x, x, backend="torch")
    ask.set()
    thread.join(60)
    assert torch.get_num_threads() == number and answer == [7]
    assert in_thread(torch.get_num_threads) == number


@pytest.mark.parametrize("number", [1, 2])
def test_an_error_reaches_the_caller_and_the_rest_is_dropped(number):
    torch.set_num_threads(number)
    done = []

    def work(part):
        if part == 3:
            raise KeyError("part 3")
        time.sleep(0.002)
        done.append(part)

    with pytest.raises(KeyError, match="part 3"):
        run_parts(lambda: work, range(1000), CPU)
    finished = len(done)
    assert finished < 100
    time.sleep(0.02)
    assert len(done) == finished, "nothing runs any more"
    run_parts(lambda: done.append, range(3), CPU)
    assert done[finished:] in ([0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]), "and the pool works"


def test_a_worker_that_cannot_be_made_is_an_error():
    def make():
        raise MemoryError("no scratch memory")

    with pytest.raises(MemoryError):
        run_parts(make, range(4), CPU)


def test_a_failed_call_leaves_the_mask(monkeypatch):
    from liteattention.kernels import torch_attention

    def fails(*_):
        raise RuntimeError("no memory")

    monkeypatch.setattr(torch_attention, "scripted", lambda device_type: fails)
    x, mask = torch.randn(1, 2, 300, 64), SkipMask.full(1, 2, 300)
    with pytest.raises(RuntimeError, match="no memory"):
        lite_attention(x, x, x, mask, threshold=-1.0, backend="torch")
    assert mask.density() == 1 and mask.passes == [0]


@pytest.mark.skipif(os.name == "nt", reason="no way to send Ctrl-C to oneself")
def test_an_interrupt_reaches_the_caller_and_the_rest_is_dropped():
    import signal

    started, done = threading.Event(), []

    def work(part):
        started.set()
        time.sleep(0.01)
        done.append(part)

    def interrupt():
        started.wait(60)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        run_parts(lambda: work, range(3000), CPU)
    thread.join(60)
    finished = len(done)
    assert finished < 300
    time.sleep(0.05)
    assert len(done) == finished


def test_calls_from_several_threads_at_once():
    """With one workspace, as a run has it: results as one by one, also with different numbers of threads; nobody waits
    for ever."""
    workspace = Workspace()
    x = torch.randn(4, 1, 2, 700, 64, generator=torch.Generator().manual_seed(0))
    expected = [lite_attention(y, y, y, backend="torch") for y in x]
    got = {}

    def call(i):
        torch.set_num_threads(1 + i % 3)
        for _ in range(3):
            got[i] = lite_attention(x[i], x[i], x[i], backend="torch", workspace=workspace)

    threads = [threading.Thread(target=call, args=(i,), daemon=True) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    assert all(torch.equal(got[i], expected[i]) for i in range(4))


FORK = """
import os, sys
sys.path.insert(0, {tools!r})
from load_pack import load_pack
load_pack()
import torch
from liteattention.kernels import lite_attention
torch.set_num_threads(2)
x = torch.randn(1, 2, 700, 64)
out = lite_attention(x, x, x, backend="torch")
child = os.fork()
if not child:
    os._exit(0 if torch.equal(lite_attention(x, x, x, backend="torch"), out) else 1)
status = os.waitpid(child, 0)[1]
assert torch.equal(lite_attention(x, x, x, backend="torch"), out)
sys.exit(os.waitstatus_to_exitcode(status))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_has_workers_of_its_own():
    tools = Path(__file__).resolve().parents[2] / "tools"
    subprocess.run([sys.executable, "-c", FORK.format(tools=str(tools))], check=True, timeout=120)
