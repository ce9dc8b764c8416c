"""The way into Raylight's workers: Ray's own actors, with a pack whose modules are named by their path."""

import importlib
import shutil
import sys
import tempfile
import time
from importlib import util
from pathlib import Path

import actors_kit
import psutil
import pytest
import torch
from comfyui import find_comfyui

from liteattention.runtime import ErrorBudget, LiteAttentionConfig, Threshold

pytestmark = pytest.mark.skipif(sys.platform != "linux" or util.find_spec("ray") is None,
                                reason="Raylight needs Linux; ray from tools/requirements.txt")
ROOT = Path(__file__).resolve().parents[2]
COMFY = find_comfyui()
CONFIG = LiteAttentionConfig(rule=Threshold(-1.0), min_tokens=128, warmup_steps=1)


@pytest.fixture(scope="module")
def ray():
    """Ray on this machine; its files, and what it writes into the user's folder, are gone with it."""
    folder = tempfile.mkdtemp(prefix="ray")  # a short path: sockets lie in it
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"HOME": folder, "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}.items():
            patch.setenv(name, value)
        before = set(psutil.Process().children(recursive=True))
        started = importlib.import_module("ray")
        started.init(num_cpus=4, include_dashboard=False, log_to_driver=False, _temp_dir=folder,
                     _node_ip_address="127.0.0.1", object_store_memory=100 * 2**20)
        started.cloudpickle.register_pickle_by_value(actors_kit)
        yield started
        started.cloudpickle.unregister_pickle_by_value(actors_kit)
        started.shutdown()
        deadline = time.monotonic() + 20
        while (left := set(psutil.Process().children(recursive=True)) - before) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not left
    shutil.rmtree(folder, ignore_errors=True)
    assert not Path(folder).exists()


@pytest.fixture(scope="module")
def actors():
    """`host/raylight/actors.py` of the pack as ComfyUI loads a custom node."""
    name = str(ROOT).replace(".", "_x_")
    spec = util.spec_from_file_location(name, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    sys.modules[name] = util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    yield importlib.import_module(f"{name}.host.raylight.actors")
    for loaded in [module for module in sys.modules if module.startswith(name)]:
        del sys.modules[loaded]


@pytest.fixture(scope="module")
def workers(ray):
    """Two, as `RAY_ACTORS` has them."""
    actor = ray.remote(actors_kit.Worker)
    model = str(ROOT / "demo" / "model" / "tiny_wan_t2v.safetensors")
    return {"workers": [actor.remote(str(COMFY), model) for _ in range(2)]}


@pytest.fixture
def runner(ray):
    """A worker without a model; none outlives its test."""
    made = []

    def make(kind=actors_kit.Runner):
        made.append(ray.remote(kind).remote())
        return made[-1]

    yield make
    for actor in made:
        ray.kill(actor)


def sampled(ray, workers):
    first, *others = ray.get([worker.sample.remote(seed) for seed, worker in enumerate(workers["workers"])])
    return [first, *others]


def test_settings_arrive_and_the_summary_is_that_of_all_ranks(ray, actors, workers):
    dense = sampled(ray, workers)
    with pytest.raises(ValueError, match="no LiteAttention on their model"):
        actors.last_run(workers)
    actors.apply(workers, CONFIG)
    with pytest.raises(ValueError, match="No sampling run"):
        actors.last_run(workers)
    lite = sampled(ray, workers)
    run = actors.last_run(workers)
    assert run.settings == CONFIG.to_dict() and run.sparse_calls == 2 * 3 * 5 and not run.notes
    assert len(run.ranks) == 2 and run.skipped > 0 and "ranks: skipped" in run.text()
    assert not any(map(torch.equal, dense, lite)) and run.to_dict()["environment"]["model"] == "WanModel"

    actors.apply(workers, LiteAttentionConfig(rule=ErrorBudget(0.2), min_tokens=128))
    sampled(ray, workers)
    assert actors.last_run(workers).rule == "error_budget 0.2", "the last settings count, alone"
    actors.apply(workers, None)
    assert all(map(torch.equal, dense, sampled(ray, workers)))


def test_the_folder_of_the_pack_is_looked_for_on_the_workers_machine(ray, actors, runner, monkeypatch, tmp_path):
    monkeypatch.setattr(actors, "ROOT", str(tmp_path / "elsewhere"))
    with pytest.raises(ValueError, match=r"not at .*elsewhere on the machine of a Raylight worker\. Install the same"):
        actors.apply({"workers": [runner()]}, CONFIG)
    (tmp_path / "second").symlink_to(ROOT)
    actor = runner()
    for root, said in ((ROOT, "No model is loaded"), (tmp_path / "second", "has loaded LiteAttention from")):
        monkeypatch.setattr(actors, "ROOT", str(root))
        with pytest.raises(ValueError, match=said):
            actors.apply({"workers": [actor]}, CONFIG)


def test_a_worker_that_has_ended_is_said(ray, actors, runner):
    actor = runner()
    ray.wait([actor.end.remote()], timeout=20)
    for ask in (lambda: actors.apply({"workers": [actor]}, CONFIG), lambda: actors.last_run({"workers": [actor]})):
        with pytest.raises(RuntimeError) as raised:
            ask()
        assert str(raised.value) == actors.DEAD


@pytest.mark.parametrize("given, said", [(None, "NoneType"), ({}, "dict"), ({"workers": []}, "dict"), ("x", "str")])
def test_something_else_than_workers_is_named(ray, actors, given, said):
    with pytest.raises(ValueError, match=f"no set of Raylight workers but {said}"):
        actors.apply(given, CONFIG)


class Other:
    def greet(self):
        return "hello"


def test_actors_of_another_kind_are_named(ray, actors, runner):
    with pytest.raises(ValueError, match="but a worker without get_parallel_dict"):
        actors.apply({"workers": [runner(Other)]}, CONFIG)


def test_a_worker_with_another_version_is_said(ray, actors, monkeypatch, workers):
    monkeypatch.setattr(actors, "_answers", lambda ray, asked: [("done", {"saved": None})])
    with pytest.raises(ValueError, match="another version"):
        actors.last_run(workers)


def test_without_ray_one_sentence_says_what_is_missing(actors, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    for ask in (lambda: actors.apply({"workers": [1]}, CONFIG), lambda: actors.last_run({"workers": [1]})):
        with pytest.raises(RuntimeError) as raised:
            ask()
        assert str(raised.value) == actors.NO_RAY
