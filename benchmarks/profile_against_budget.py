"""Is a clip made with a calibrated profile closer to the dense one than with an error budget that skips as much?

    python benchmarks/profile_against_budget.py [--targets 0.02 0.05] --out FILE

Calibrates the demo model once per target on one prompt, then runs every case dense, with the profile and with budgets
that bracket the profile's skipped share, and interpolates the budgets' PSNR at that share. Rule, decided before the
run: profiles stay if they lead by at least 1 dB in the least of the unseen cases.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "benchmarks")]
from load_pack import load_pack  # noqa: E402

WARMUP_STEPS = 1
TRIES = 3
"""Budgets tried between two that bracket the profile's share."""
# (prompt, seed, latent size, steps, shift, seen by the calibration)
CASES = (
    ((0, 2, 1), 3, (9, 32, 32), 20, 3.0, True),
    ((1, 3, 2), 11, (9, 32, 32), 20, 3.0, False),
    ((0, 4, 0), 12, (9, 32, 32), 20, 5.0, False),
    ((1, 1, 1), 29, (9, 24, 24), 20, 3.0, False),
    ((0, 3, 2), 41, (9, 24, 24), 20, 5.0, False),
    ((1, 2, 0), 53, (9, 32, 32), 8, 3.0, False),
    ((0, 1, 2), 67, (9, 32, 32), 8, 5.0, False),
    ((1, 4, 1), 71, (9, 24, 24), 8, 3.0, False),
    ((0, 2, 2), 83, (9, 24, 24), 8, 5.0, False),
)


def name(case: tuple) -> str:
    from support.quality_runs import Case

    prompt, seed, size, steps, shift, _ = case
    return f"{Case(prompt, seed, size).name}, {steps} steps, shift {shift:g}"


def run(case: tuple, session: object | None) -> tuple[object, object]:
    """(clip, receipt or None) of one run; without a session dense."""
    import torch
    from support.quality_runs import CFG, model

    from liteattention.demo.pixels import decode, empty_prompt, prompt_tokens
    from liteattention.demo.sampler import comfy_noise, euler_flow, flow_sigmas
    from liteattention.runtime import AttentionCall, LayerId

    prompt, seed, size, steps, shift, _ = case
    wan = model("cpu")

    def on_evaluation(step, sigma, latent_shape, rows):
        if session is None:
            return None
        evaluation = session.evaluation(model=0, rows=rows, latent_tokens=wan.token_count(latent_shape))

        def attention(q, k, v, heads, layer):
            def dense():
                split = [x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v)]
                return torch.nn.functional.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2)

            return evaluation.attend(AttentionCall.from_hook(q, k, v, heads),
                                     LayerId("block", layer, wan.config.num_layers), dense)

        return attention

    with torch.inference_mode():
        latent = euler_flow(wan, comfy_noise((1, 16, *size), seed), flow_sigmas(steps, shift), prompt_tokens(*prompt),
                            empty_prompt(), CFG, on_evaluation=on_evaluation,
                            callback=lambda step, *_: session and session.end_step(step))
    return decode(latent.float()), session.close() if session else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", type=float, nargs="+", default=[0.02, 0.05])
    parser.add_argument("--cases", type=int, default=len(CASES))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    load_pack()
    import torch

    torch.set_num_threads(1)
    from support.quality_metrics import interpolate, ssim
    from support.report import Report, environment

    from liteattention.demo.pixels import psnr
    from liteattention.runtime import LiteAttentionConfig, Session
    from liteattention.runtime.calibration import CalibrationSession, CalibrationTarget

    def config(**changes):
        return LiteAttentionConfig(warmup_steps=WARMUP_STEPS, min_tokens=128, never_slower=False, **changes)

    report = Report(args.out, {**environment("profile_against_budget.py", torch.device("cpu")),
                               "command": "python " + " ".join(["benchmarks/profile_against_budget.py", "--targets",
                                                                *map(str, args.targets), "--out FILE"]),
                               "rule": "profiles stay if the least lead over the unseen cases is at least 1 dB"})
    profiles, dense, tried = {}, {}, {}
    for target in args.targets:
        session = CalibrationSession(config(), CASES[0][3], target=CalibrationTarget(target))
        start = time.time()
        run(CASES[0], session)
        profiles[target], problem = session.calibrated("TinyWan")
        print(f"calibrated to {target}: {problem or 'ok'}, {time.time() - start:.0f} s", flush=True)

    def measured(case, session):
        clip, receipt = run(case, session)
        return {"skipped": receipt.skipped, "psnr_db": psnr(clip, dense[case]), "ssim": ssim(clip, dense[case])}

    def budget(case, value):
        points = tried.setdefault(case, {})
        if value not in points:
            points[value] = measured(case, Session(config(error_budget=value), case[3]))
        return points[value]

    for case in CASES[:args.cases]:
        dense[case] = run(case, None)[0]
        for target in args.targets:
            with_profile = measured(case, Session(config(), case[3], profile=profiles[target]))
            share = with_profile["skipped"]
            low, high = (0.1, 0.3) if target < 0.04 else (0.2, 0.6)
            while budget(case, low)["skipped"] > share and low > 0.01:
                low, high = low / 2, low
            while budget(case, high)["skipped"] < share and high < 1:
                low, high = high, min(1.0, high * 2)
            for _ in range(TRIES):
                below, above = budget(case, low)["skipped"], budget(case, high)["skipped"]
                if not below < share < above:
                    break
                # Shares grow almost linearly with the budget; stay away from the ends.
                middle = round(low + (high - low) * min(max((share - below) / (above - below), 0.15), 0.85), 4)
                low, high = (middle, high) if budget(case, middle)["skipped"] <= share else (low, middle)
            points = [{"error_budget": b, **p} for b, p in sorted(tried[case].items())]
            at = interpolate([(p["skipped"], p["psnr_db"]) for p in points], share)
            report.add({"case": name(case), "unseen": not case[5], "steps": case[3], "shift": case[4], "target": target,
                        "skipped": share, "profile": with_profile, "budget_psnr_db_at_the_same_share": at,
                        "lead_db": None if at is None else with_profile["psnr_db"] - at, "budgets": points})
            row = report.rows[-1]
            print(f"{target}: {row['case']}: {share:.1%} profile {with_profile['psnr_db']:.1f} budget {at} "
                  f"lead {row['lead_db']}", flush=True)
    verdict = {}
    for target in args.targets:
        leads = [r["lead_db"] for r in report.rows
                 if r["unseen"] and r["target"] == target and r["lead_db"] is not None]
        verdict[f"target {target:g}"] = {"cases": len(leads), "least": min(leads), "mean": sum(leads) / len(leads),
                                         "largest": max(leads)}
    report.finish(verdict=verdict)
    print(verdict)


if __name__ == "__main__":
    main()
