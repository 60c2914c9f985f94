"""The proof by many faults: `python tests/faults.py --seed 0 --kills 500 --damages 500 --bucket`.

Runs are killed and their files damaged, side by side in lanes of one, two and four processes, on the disk and in buckets of
loopback servers; every number of every run must be that of an undisturbed one. Prints a table, and JSON on the last line; exits
with 1 where there was a problem, whose run folder is kept.
"""

from __future__ import annotations

import argparse
import collections
import json
import math
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

from fault_damages import damage_runs  # noqa: E402
from fault_kills import Lane, kill_runs  # noqa: E402

PROBLEMS = {"losses": "differing losses", "documents": "lost or doubled documents", "parameters": "differing parameters",
            "evaluations": "differing evaluations", "checkpoints": "bad checkpoints reported good",
            "hang": "hangs over 2 minutes", "late": "processes that outlived a lost one by 30 s", "traceback": "tracebacks",
            "status": "wrong exit statuses"}  # by the first word of a problem
WEIGHTS = {1: 12, 2: 3, 4: 1}  # of the kills, by processes; a bucket counts as 1


def faults(seed: int, kills: int, damages: int, processes: tuple[int, ...] = (1, 2), hosts: int = 0, bucket: bool = False,
           folder: Path | None = None, minutes: float = math.inf, at_once: int = 4) -> dict[str, Any]:
    """Lets that many faults happen, or as many as there is time for, in lanes of which so many run at once. Returns counts, and
    all that went wrong."""
    folder, began = Path(folder or tempfile.mkdtemp(prefix="emo_jax_faults_")), time.monotonic()
    environment = _buckets() if bucket else {}
    lanes = [Lane(f"{n} process{'es' if n > 1 else ''}", n) for n in (*processes, *([hosts] if hosts else []))]
    lanes += [Lane(f"{scheme} bucket", 1, f"{scheme}://bucket-of-tests/faults", environment)
              for scheme in ("s3", "gs") if bucket]
    weights = [1 if lane.bucket else WEIGHTS.get(lane.processes, 1) for lane in lanes]
    jobs = [(kill_runs, lane, _share(kills, weights, i)) for i, lane in enumerate(lanes)]
    on = [lane for lane in lanes if lane.processes == 1]
    jobs += [(damage_runs, lane, _share(damages, [1 if x.bucket else 12 for x in on], i)) for i, lane in enumerate(on)]
    waiting = [(n, job) for n, job in enumerate(jobs) if job[2]]
    started, outcomes = {}, []
    while started or waiting:
        while waiting and len(started) < at_once:
            n, job = waiting.pop(0)
            where = folder / f"lane{n}"
            started[_in_lane(job, f"{seed}-{n}", where, began + 60 * minutes)] = job, where
        pid, status = os.wait()
        if pid not in started:
            continue
        (_, lane, _), where = started.pop(pid)
        found = [json.loads(line) for line in (where / "outcomes.jsonl").read_text().splitlines()]
        found += [{"kind": "lane", "problems": ["status: the lane failed"]}] if status else []
        outcomes += [outcome | {"lane": lane.name} for outcome in found]
    summary = _summary(outcomes) | {"seed": seed, "seconds": round(time.monotonic() - began), "folder": str(folder)}
    if not summary["failed"]:
        shutil.rmtree(folder)
    return summary


def _share(total: int, weights: list[int], i: int) -> int:
    return total * sum(weights[:i + 1]) // sum(weights) - total * sum(weights[:i]) // sum(weights)


def _in_lane(job: tuple, seed: str, folder: Path, until: float) -> int:
    """The process id of one that does it and leaves `outcomes.jsonl` in `folder`."""
    function, lane, count = job
    folder.mkdir(parents=True)
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        if lane.bucket:
            lane = lane._replace(bucket=f"{lane.bucket}/{function.__name__}-{os.getpid()}")
        with (folder / "outcomes.jsonl").open("w", buffering=1) as file:
            for outcome in function(lane, count, seed, folder, until):
                file.write(json.dumps(outcome) + "\n")
        status = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(status)


def _buckets() -> dict[str, str]:
    """The environment that leads to the servers, which a process of their own runs until this one ends."""
    import aiobotocore.session  # noqa: F401  here, so that no child imports them
    import gcsfs  # noqa: F401
    import s3fs  # noqa: F401

    reading, writing = os.pipe()
    ends, keep = os.pipe()
    if not os.fork():
        os.close(keep)
        import servers

        os.write(writing, json.dumps(servers.with_buckets().environment).encode())
        os.close(writing)
        os.read(ends, 1)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as file:
        return json.loads(file.read())


def _summary(outcomes: list[dict[str, Any]]) -> dict[str, Any]:
    kinds = collections.Counter(o["kind"] for o in outcomes)
    problems = collections.Counter(problem.partition(":")[0] for o in outcomes for problem in o["problems"])
    by = collections.Counter((o["lane"], o["kind"], o.get("signal") or o.get("ending") or "") for o in outcomes)
    waits = [o["seconds"] for o in outcomes if o["kind"] == "kill" and "process" in o["lane"] and len(o["statuses"]) > 1
             and o["signal"] != "SIGTERM"]
    return {
        "kills": kinds["kill"], "damages": kinds["damage"], "finished_runs": kinds["run"],
        "counts": {" / ".join(key): n for key, n in sorted(by.items())},
        "moments": dict(collections.Counter(o["moment"] for o in outcomes if o.get("moment"))),
        "longest_end_of_survivors": max(waits, default=0.0),
        "problems": {name: problems[kind] for kind, name in PROBLEMS.items()},
        "failed": [o for o in outcomes if o["problems"]]}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[2])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--damages", type=int, default=500)
    parser.add_argument("--processes", default="1,2", help="of the runs that are killed, e.g. 1,1,2: two lanes of one process")
    parser.add_argument("--hosts", type=int, default=4, help="also runs of so many processes, a device each; 0: none")
    parser.add_argument("--bucket", action="store_true", help="also in buckets of loopback servers")
    parser.add_argument("--folder", type=Path, help="for the runs; default: a temporary one")
    parser.add_argument("--minutes", type=float, default=math.inf, help="after which no more faults come")
    parser.add_argument("--at-once", type=int, default=4, help="lanes that run at once")
    a = parser.parse_args(argv)
    found = faults(a.seed, a.kills, a.damages, tuple(int(n) for n in a.processes.split(",") if n), a.hosts, a.bucket, a.folder,
                   a.minutes, a.at_once)
    for key in ("counts", "moments", "problems"):
        print(f"\n{key}")
        for name, n in found[key].items():
            print(f"  {name:<60}{n:>6}")
    for o in found["failed"][:20]:
        print(f"\n{o['lane']}: {o.get('fault')}: {'; '.join(o['problems'])}")
    print(f"\n{found['kills']} kills and {found['damages']} damages with seed {found['seed']} in {found['seconds']} s; "
          f"{found['finished_runs']} runs finished after kills; survivors of a lost process ended within "
          f"{found['longest_end_of_survivors']} s" + (f"; all of it in {found['folder']}" if found["failed"] else ""))
    print(json.dumps(found))
    return 1 if found["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
