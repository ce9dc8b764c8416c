"""In ComfyUI: what the nodes ask of Raylight's workers. Ray is imported by the functions that need it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...runtime import LiteAttentionConfig, RunSummary
from ...runtime.merged_summary import from_plain, merged
from . import bootstrap

ROOT = str(Path(__file__).resolve().parents[2])

NO_RAY = ("Ray is not installed in ComfyUI's Python, so there are no Raylight workers. Install Raylight and what it "
          "needs (Linux); on one GPU use the LiteAttention node.")
NOT_ACTORS = "ray_actors is no set of Raylight workers but {}. Connect the ray_actors output of a Raylight loader."
DEAD = ("A Raylight worker has ended; ComfyUI's log has its last lines. Restart ComfyUI, or change an input of "
        "Raylight's initializer, so that new workers start.")
OTHER_VERSION = "A Raylight worker has another version of LiteAttention. Install the same one everywhere, and restart."
NOT_ATTACHED = ("Raylight's workers have no LiteAttention on their model. Put LiteAttention (Raylight), enabled, "
                "between the loader and the sampler.")
NO_RUN = ("No sampling run of these workers has finished yet. Connect the ray_actors output of the sampler to "
          "ray_actors, so that this node waits for it.")


def apply(ray_actors: Any, config: LiteAttentionConfig | None) -> None:
    """Put LiteAttention on the model in every worker, or with None take it off.

    Raises:
        RuntimeError: Ray is missing, or a worker has ended. ValueError: anything else, in one sentence.
    """
    ray = _ray()
    workers = _workers(ray_actors)
    plain = None if config is None else settings(config)
    parallel = _answers(ray, [_method(worker, "get_parallel_dict").remote() for worker in workers])
    _answers(ray, [_method(worker, "model_function_runner").remote(bootstrap.apply, ROOT, plain, dict(known or {}))
                   for worker, known in zip(workers, parallel, strict=True)])


def last_run(ray_actors: Any) -> RunSummary:
    """The last run of the workers, merged over them.

    Raises:
        RuntimeError, ValueError: as `apply`; there is no run.
    """
    ray = _ray()
    answers = _answers(ray, [_method(worker, "model_function_runner_get_values").remote(bootstrap.last_run, ROOT)
                             for worker in _workers(ray_actors)])
    for sentence, state in ((NOT_ATTACHED, "not attached"), (NO_RUN, "no run")):
        if any(found == state for found, _ in answers):
            raise ValueError(sentence)
    try:
        return merged([from_plain(summary) for _, summary in answers])
    except (KeyError, TypeError):
        raise ValueError(OTHER_VERSION) from None


def settings(config: LiteAttentionConfig) -> dict:
    """A node's settings as plain values."""
    value, = vars(config.rule).values()
    return {**vars(config), "rule": (type(config.rule).__name__, value)}


def _ray() -> Any:
    try:
        import ray
    except ImportError:
        raise RuntimeError(NO_RAY) from None
    ray.cloudpickle.register_pickle_by_value(bootstrap)
    return ray


def _workers(ray_actors: Any) -> list:
    workers = ray_actors.get("workers") if isinstance(ray_actors, dict) else None
    if not workers:
        raise ValueError(NOT_ACTORS.format(type(ray_actors).__name__))
    return list(workers)


def _method(worker: Any, name: str) -> Callable:
    try:
        return getattr(worker, name)
    except AttributeError:
        raise ValueError(NOT_ACTORS.format(f"a worker without {name}")) from None


def _answers(ray: Any, asked: list) -> list:
    """What the workers answer, once all have answered: one that is still at it would meet the next request."""
    ray.wait(asked, num_returns=len(asked))
    try:
        return ray.get(asked)
    except ray.exceptions.RayTaskError as error:
        raise ValueError(str(error.cause)) from None
    except ray.exceptions.RayError:
        raise RuntimeError(DEAD) from None
