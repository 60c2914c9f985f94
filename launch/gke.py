"""A run on TPU slices of a GKE cluster, as a JobSet (0.10 or later), or as the command of XPK for the same run:

    python launch/gke.py --name NAME --topology v5p-128 --slices N --image IMAGE [OPTIONS] train CONFIG ... | kubectl apply -f -

What restarts is the whole set, by the exit status of emo-jax: not for 2, --failures times for 1, always for all else (75,
killed, a lost or preempted node). A command without --out writes to $BUCKET/runs/NAME.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import sys
from typing import Any

from emo_jax.aot import topology
from emo_jax.errors import InputError

ACCELERATORS = {"v5p": "tpu-v5p-slice", "v5e": "tpu-v5-lite-podslice", "v6e": "tpu-v6e-slice", "tpu7x": "tpu7x"}
XPK_TYPES = {"v5p": "v5p", "v5e": "v5litepod", "v6e": "v6e", "tpu7x": "tpu7x"}
CHIPS_A_HOST = 4
SPOT = "cloud.google.com/gke-spot"


def job_set(args: argparse.Namespace, chip: str, sizes: tuple[int, ...]) -> dict[str, Any]:
    hosts = math.prod(sizes) // CHIPS_A_HOST
    selector = {"cloud.google.com/gke-tpu-accelerator": ACCELERATORS[chip],
                "cloud.google.com/gke-tpu-topology": "x".join(map(str, sizes))}
    pod: dict[str, Any] = {
        "restartPolicy": "Never", "hostNetwork": True, "dnsPolicy": "ClusterFirstWithHostNet",
        "terminationGracePeriodSeconds": args.grace, "nodeSelector": selector,
        "containers": [{"name": "emo-jax", "image": args.image, "args": args.command,
                        "resources": {"limits": {"google.com/tpu": CHIPS_A_HOST}}}]}
    if args.spot:
        selector[SPOT] = "true"
        pod["tolerations"] = [{"key": SPOT, "operator": "Equal", "value": "true", "effect": "NoSchedule"}]
    if args.service_account:
        pod["serviceAccountName"] = args.service_account
    # A job's failure says which of these rules was met, and the rules of the set below read that.
    exits = [{"action": "FailJob", "onExitCodes": {"containerName": "emo-jax", "operator": "In", "values": [status]}}
             for status in (2, 1)]
    job = {"parallelism": hosts, "completions": hosts, "completionMode": "Indexed", "backoffLimit": 0,
           "podFailurePolicy": {"rules": exits}, "template": {"spec": pod}}
    rules = [{"name": name, "action": action, "onJobFailureReasons": ["PodFailurePolicy"],
              "onJobFailureMessagePatterns": [f"FailJob rule at index {index}$"]}
             for index, (name, action) in enumerate((("badInput", "FailJobSet"), ("failed", "RestartJobSet")))]
    rules.append({"name": "lostOrPreempted", "action": "RestartJobSetAndIgnoreMaxRestarts"})
    return {"apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet",
            "metadata": {"name": args.name,  # and every slice is a node pool of its own:
                         "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}},
            "spec": {"failurePolicy": {"maxRestarts": args.failures, "restartStrategy": "BlockingRecreate", "rules": rules},
                     "replicatedJobs": [{"name": "slice", "replicas": args.slices, "template": {"spec": job}}]}}


def xpk(args: argparse.Namespace, chip: str, sizes: tuple[int, ...]) -> list[str]:
    """XPK's JobSet: one number of restarts for all statuses that restart."""
    grid = "x".join(map(str, sizes))
    return ["xpk", "workload", "create", f"--workload={args.name}", f"--cluster={args.cluster}", f"--project={args.project}",
            f"--zone={args.zone}", f"--tpu-type={XPK_TYPES[chip]}-{grid}", f"--num-slices={args.slices}",
            f"--docker-image={args.image}", "--max-restarts=1000", "--restart-on-exit-codes=75",
            f"--termination-grace-period-seconds={args.grace}", f"--command={shlex.join(['emo-jax', *args.command])}"]


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="gke.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", required=True)
    parser.add_argument("--topology", required=True, help="of one slice, as `emo-jax compile` takes it: v5p-128, v6e:16x16")
    parser.add_argument("--slices", type=int, default=1)
    parser.add_argument("--image", required=True, help="made from launch/Dockerfile")
    parser.add_argument("--spot", action="store_true")
    parser.add_argument("--grace", type=int, default=600, help="seconds for the last save; a Spot node gives fewer")
    parser.add_argument("--failures", type=int, default=3, help="restarts after exit status 1")
    parser.add_argument("--service-account", help="of Kubernetes, that may read and write the bucket")
    parser.add_argument("--xpk", action="store_true", help="print the command of XPK instead of a manifest")
    parser.add_argument("--cluster", help="for --xpk")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="train CONFIG ...")
    args = parser.parse_args(argv)
    if args.slices < 1:
        parser.error(f"--slices {args.slices} must be 1 or more")
    if not args.command:
        parser.error("no command, such as: train emo_1b14b_1t --data.path=gs://.../tokens")
    if not any(word.partition("=")[0] == "--out" for word in args.command):
        if not (bucket := os.environ.get("BUCKET", "")).startswith("gs://"):
            parser.error("BUCKET is not set to gs://...: the command has no --out")
        args.command += ["--out", f"{bucket}/runs/{args.name}"]
    if args.xpk:
        args.project, args.zone = os.environ.get("PROJECT"), os.environ.get("ZONE")
        for what, value in (("PROJECT", args.project), ("ZONE", args.zone), ("--cluster", args.cluster)):
            if not value:
                parser.error(f"{what} is not set; --xpk needs PROJECT and ZONE from the environment, and --cluster")
    return args


def main(argv: list[str]) -> int:
    args = parse(argv)
    try:
        chip, sizes = topology.parse(args.topology)
        if math.prod(sizes) % CHIPS_A_HOST:
            raise InputError(f"--topology {args.topology} has no whole host: a host has {CHIPS_A_HOST} chips")
    except InputError as e:
        print(f"gke.py: {e}", file=sys.stderr)
        return 2
    print(shlex.join(xpk(args, chip, sizes)) if args.xpk else json.dumps(job_set(args, chip, sizes), indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
