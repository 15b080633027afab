"""How well the parts of a model predict the latency of every route: the record of ``profile``.

    python -m benchmarks.profile_accuracy --out benchmarks/results/profile/cpu.json

profiles DeiT3 pairs with random weights at batch 1, runs all routes whole to compare, and writes a
record, a table (.md) and a plot (.png) beside it. Run it on a machine that does nothing else; on 2
cores it takes about ten minutes.
"""

import argparse
import dataclasses
import datetime
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import snkernels
from benchmarks import machine
from benchmarks.model import make
from benchmarks.schema import RESULTS
from snkernels.routing.latency import Profile

WITHIN = 0.1


def pair(name: str) -> snkernels.StitchedViT:
    """The stitched model of a pair such as ``"S-L"``, with random weights, in eval mode."""
    return make(name.replace("-", ""))


def within(profile: Profile) -> float:
    """The share of routes whose latency is predicted well enough."""
    return sum(abs(check.error) <= WITHIN for check in profile.checks) / len(profile.checks)


def markdown(record: dict[str, Any]) -> str:
    """The record as a table, one line per pair."""
    commit = "no commit" if record["commit"] is None else f"commit {record['commit'][:10]}"
    if record["dirty"]:
        commit += " with changes"
    lines = [
        f"{record['machine']['cpu']}, {record['threads']} threads, float32; "
        f"torch {record['versions']['torch']}; {commit}; "
        f"{record['date'][:10]}; load before the run {record['machine']['load_average']}. "
        f"`{record['command']}`",
        "",
        "**Latency of every route, predicted from its parts, against its own runs** "
        f"(DeiT3 shapes at 224², batch 1, medians of {record['rounds']} rounds; each run is set "
        "against the parts as they were right before and after it)",
        "",
        f"| pair | routes | S alone, ms | L alone, ms | within {WITHIN:.0%} "
        "| median error | 95 % within | worst |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, result in record["pairs"].items():
        small, large = (1e3 * result["anchors_seconds"][i] for i in (0, 1))
        errors = (f"{100 * result['error'][k]:.1f} %" for k in ("median", "p95", "worst"))
        lines.append(
            f"| {name} | {result['routes']} | {small:.1f} | {large:.1f} "
            f"| {100 * result['within']:.1f} % | {' | '.join(errors)} |"
        )
    return "\n".join(lines) + "\n"


def plot(profiles: dict[str, Profile], path: Path) -> None:
    """Draws predicted over measured latency, one panel per pair, with the band of 10 %."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(
        1, len(profiles), figsize=(5 * len(profiles), 4.6), squeeze=False, layout="constrained"
    )
    for axes, (name, profile) in zip(grid.flat, profiles.items(), strict=True):
        points: dict[str, list[tuple[float, float]]] = {}
        for check in profile.checks:
            direction = profile.space.route(check.route).direction
            points.setdefault(direction, []).append((check.measured * 1e3, check.predicted * 1e3))
        for direction, pairs in points.items():
            axes.plot(*zip(*pairs, strict=True), "o", markersize=4, alpha=0.7, label=direction)
        ends = [0, 1.05e3 * max(check.measured for check in profile.checks)]
        axes.plot(ends, ends, color="0.4", linewidth=1)
        axes.fill_between(
            ends,
            [(1 - WITHIN) * end for end in ends],
            [(1 + WITHIN) * end for end in ends],
            color="0.9",
            label=f"within {WITHIN:.0%}",
            zorder=0,
        )
        axes.set_title(f"{name}: {100 * within(profile):.0f} % of routes within {WITHIN:.0%}")
        axes.set_xlabel("measured, ms")
        axes.set_ylabel("predicted from parts, ms")
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 1 where fewer than 95 % of a pair's routes are predicted well enough."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profile_accuracy")
    parser.add_argument("--pairs", nargs="+", default=["S-L", "S-B"])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/profile/cpu.json")
    options = parser.parse_args(arguments)

    now = datetime.datetime.now(datetime.timezone.utc).replace(microsecond=0)
    out = options.out or RESULTS / "profile" / "cpu.json"
    (commit, dirty), described = machine.commit(), machine.describe()
    profiles = {
        name: snkernels.profile(pair(name), [1], check="all", rounds=options.rounds, seconds=0)
        for name in options.pairs
    }
    record = {
        "date": now.isoformat(),
        "command": shlex.join(["python", "-m", "benchmarks.profile_accuracy", *arguments]),
        "commit": commit,
        "dirty": dirty,
        "threads": torch.get_num_threads(),
        "machine": described,
        "versions": machine.versions(),
        "rounds": options.rounds,
        "pairs": {
            name: {
                "routes": len(profile.checks),
                "anchors_seconds": [profile.seconds(anchor, 1) for anchor in (0, 1)],
                "within": within(profile),
                "error": {
                    "median": profile.error(),
                    "p95": profile.error(0.95),
                    "worst": profile.error(1),
                },
                "parts_seconds": dataclasses.asdict(profile.parts[1]),
                "checks": [
                    {**dataclasses.asdict(check), "error": check.error} for check in profile.checks
                ],
            }
            for name, profile in profiles.items()
        },
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    out.with_suffix(".md").write_text(markdown(record), encoding="utf-8")
    plot(profiles, out.with_suffix(".png"))
    for name, profile in profiles.items():
        print(f"{name}: {profile.summary()}")
    print(f"\n{markdown(record)}\nWrote {out}, and beside it the table (.md) and the plot (.png).")
    return 0 if all(within(profile) >= 0.95 for profile in profiles.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
