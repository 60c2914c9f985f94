"""The container file, the manifests for GKE against the published schemas, the job for Slurm, and every command of the page.
There is no cluster here: srun is stood in for by a small program."""

import json
import os
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from launching import CLOUD, LAUNCH, ROOT, TRAIN, program, run

from emo_jax import cli
from emo_jax.commands.arguments import take_overrides
from emo_jax.config import load_config

# ---- the files themselves -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tool, arguments, files", [
    ("shellcheck", ("--external-sources", "--source-path=launch"), [*LAUNCH.glob("*.sh"), LAUNCH / "slurm.sbatch"]),
    ("hadolint", (), [LAUNCH / "Dockerfile"])])
def test_scripts_and_container_file_are_clean(tool, arguments, files):
    found = shutil.which(tool, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if not found:
        pytest.skip(f"{tool} is not installed (extra `test`)")
    run(found, *arguments, *files)


# ---- gke.py ---------------------------------------------------------------------------------------------------------


def job_set(*arguments, **env):
    result = run(sys.executable, LAUNCH / "gke.py", "--name", "emo", "--image", "lab/emo", *arguments, *TRAIN,
                 **CLOUD | {"PYTHONPATH": str(ROOT)} | env)
    return json.loads(result.stdout)


@pytest.mark.parametrize("arguments", [
    ("--topology", "v5p-128", "--slices", "2"),
    ("--topology", "v6e:16x16", "--spot", "--service-account", "emo", "--grace", "25")])
def test_a_manifest_meets_the_published_schemas(arguments):
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    models = pytest.importorskip("kubeflow_trainer_api.models")
    manifest = job_set(*arguments)
    # Fields that JobSet does not know do not come back.
    assert models.JobsetV1alpha2JobSet.from_dict(manifest).to_dict() == manifest
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": manifest["metadata"],
           "spec": manifest["spec"]["replicatedJobs"][0]["template"]["spec"]}
    kubernetes_validate.validate(job, kubernetes_validate.latest_version(), strict=True)
    job["spec"]["template"]["spec"]["restartpolicy"] = "Never"
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, kubernetes_validate.latest_version(), strict=True)


def test_a_manifest_asks_for_whole_slices():
    manifest = job_set("--topology", "v5p-128", "--slices", "2", "--spot")
    slices = manifest["spec"]["replicatedJobs"][0]
    job, pod = slices["template"]["spec"], slices["template"]["spec"]["template"]["spec"]
    assert (slices["replicas"], job["completions"], job["parallelism"], job["backoffLimit"]) == (2, 16, 16, 0)
    assert pod["nodeSelector"] == {"cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
                                   "cloud.google.com/gke-tpu-topology": "4x4x4", "cloud.google.com/gke-spot": "true"}
    assert pod["containers"][0]["args"] == [*TRAIN, "--out", "gs://lab/runs/emo"]
    assert pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": 4}


@pytest.mark.parametrize("status, action", [(2, "FailJobSet"), (1, "RestartJobSet"), (75, "RestartJobSetAndIgnoreMaxRestarts"),
                                            (137, "RestartJobSetAndIgnoreMaxRestarts")])
def test_a_set_restarts_by_the_status_of_a_process(status, action):
    """As Kubernetes and JobSet apply their rules, the first one that matches."""
    spec = job_set("--topology", "v5p-128")["spec"]
    reason, message = "BackoffLimitExceeded", "Job has reached the specified backoff limit"
    for index, rule in enumerate(spec["replicatedJobs"][0]["template"]["spec"]["podFailurePolicy"]["rules"]):
        if status in rule["onExitCodes"]["values"]:
            reason = "PodFailurePolicy"
            message = f"Container emo-jax for pod a/b failed with exit code {status} matching FailJob rule at index {index}"
    assert action == next(
        rule["action"] for rule in spec["failurePolicy"]["rules"]
        if reason in rule.get("onJobFailureReasons", [reason])
        and any(re.search(pattern, message) for pattern in rule.get("onJobFailureMessagePatterns", [""])))


@pytest.mark.parametrize("arguments, said, env", [
    (("--topology", "v5p-7"), "must be a chip and its grid", {}), (("--topology", "v6e:1x1"), "has no whole host", {}),
    (("--topology", "v5p-128", "--slices", "0"), "--slices 0 must be", {}),
    (("--topology", "v5p-128"), "BUCKET is not set", {"BUCKET": None}),
    (("--topology", "v5p-128", "--xpk", "--cluster", "c"), "ZONE is not set", {"ZONE": None})])
def test_gke_refuses_what_is_missing(arguments, said, env):
    result = run(sys.executable, LAUNCH / "gke.py", "--name", "emo", "--image", "lab/emo", *arguments, *TRAIN, status=2,
                 **CLOUD | {"PYTHONPATH": str(ROOT)} | env)
    assert said in result.stderr


def test_the_command_of_xpk_restarts_on_75():
    command = shlex.split(run(sys.executable, LAUNCH / "gke.py", "--name", "emo", "--image", "lab/emo", "--topology", "v5e-256",
                              "--slices", "2", "--xpk", "--cluster", "c", *TRAIN, **CLOUD | {"PYTHONPATH": str(ROOT)}).stdout)
    assert command[:3] == ["xpk", "workload", "create"] and "--restart-on-exit-codes=75" in command
    assert {"--tpu-type=v5litepod-16x16", "--num-slices=2", "--project=lab", "--zone=us-east5-a"} <= set(command)
    assert f"--command={shlex.join(['emo-jax', *TRAIN, '--out', 'gs://lab/runs/emo'])}" in command


# ---- slurm.sbatch ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status, queued_again", [(0, False), (2, False), (75, True), (137, True)])
def test_a_job_is_queued_again_by_its_status(tmp_path, status, queued_again):
    program(tmp_path / "srun", f'#!/usr/bin/env bash\necho "$*" >> {tmp_path}/ran\nexit {status}\n')
    program(tmp_path / "scontrol", f'#!/usr/bin/env bash\necho "$*" > {tmp_path}/queued\n')
    run("bash", LAUNCH / "slurm.sbatch", *TRAIN, status=status, PATH=f"{tmp_path}:{os.environ['PATH']}", SLURM_JOB_ID="7",
        SLURM_SUBMIT_DIR=str(ROOT), EMO_JAX_VENV="/venv", IMAGE=None)
    assert (tmp_path / "ran").read_text() == f"--kill-on-bad-exit=0 /venv/bin/emo-jax {' '.join(TRAIN)}\n"  # once
    queued = tmp_path / "queued"
    assert (queued.read_text() if queued.exists() else "") == ("requeue 7\n" if queued_again else "")


def test_a_job_asks_for_a_task_a_gpu_and_a_signal_to_the_tasks():
    given = dict(line.removeprefix("#SBATCH --").partition("=")[::2] for line in
                 (LAUNCH / "slurm.sbatch").read_text().splitlines() if line.startswith("#SBATCH"))
    assert given["gpus-per-node"] == given["ntasks-per-node"] and "gpus-per-task" not in given  # JAX chooses by SLURM_LOCALID
    assert given["signal"] == "TERM@600" and "requeue" in given  # not B:, which only the script would get


def test_a_dry_run_of_a_job_prints_its_command():
    line = run("bash", LAUNCH / "slurm.sbatch", "--dry-run", *TRAIN, IMAGE="emo.sif").stdout
    assert shlex.split(line) == ["srun", "--kill-on-bad-exit=0", "apptainer", "run", "--nv", "emo.sif", *TRAIN]


# ---- the page -------------------------------------------------------------------------------------------------------

PAGE = (LAUNCH / "README.md").read_text()
HERE = CLOUD | {"IMAGE": "lab/emo", "PWD": "/here"}
# Other people's programs, which are not run: the rest of the line is theirs.
OTHERS = {"apptainer", "docker", "gcloud", "kubectl", "pip", ".venv/bin/pip", "python3", "bash", "export"}


def page_commands():
    for block in re.findall(r"^ *```bash\n(.*?)^ *```", PAGE, re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            yield line.strip()


def check_emo_jax(words):
    argv, overrides = take_overrides(list(words))
    if words[0] in ("plan", "smoke") and words[0] not in [c.name for c in cli.COMMANDS]:
        return
    args = cli.parser().parse_args(argv)
    if hasattr(args, "config"):
        load_config(args.config, overrides)


@pytest.mark.parametrize("line", list(page_commands()))
def test_every_command_of_the_page_is_one(line):
    commands = [shlex.split(re.sub(r"\$(\w+)", lambda m: HERE[m[1]], command), comments=True) for command in line.split(" | ")]
    for words in commands:
        while re.match(r"[A-Z_]+=", words[0]):
            words.pop(0)
        match words:
            case ["emo-jax", *rest] | ["bash", "launch/again.sh", "emo-jax", *rest]:
                check_emo_jax(rest)
            case ["bash", "launch/local.sh" as script, *rest] | ["sbatch", "--nodes=8", "launch/slurm.sbatch" as script, *rest]:
                run("bash", script, "--dry-run", *rest)
            case ["bash", "launch/tpu.sh", verb, name, *rest]:
                assert "gcloud" in run("bash", "launch/tpu.sh", verb, name, "--dry-run", *rest, **HERE).stdout
            case ["python", "launch/gke.py", *rest]:
                assert "emo" in run(sys.executable, "launch/gke.py", *rest, PYTHONPATH=str(ROOT), **HERE).stdout
            case ["python", "tests/faults.py", *rest]:
                known = (ROOT / "tests/faults.py").read_text()
                assert not [flag for flag in rest if flag.startswith("--") and f'"{flag}"' not in known]
            case _:
                assert words[0] in OTHERS and "launch/tpu.sh" not in words
        if "train" in words:
            check_emo_jax([*words[words.index("train"):], "--out", "x"])


def test_every_message_of_the_page_is_one_of_the_code():
    code = re.sub(r'"\s*\n\s*f?"', "", "".join(path.read_text() for path in (ROOT / "emo_jax").rglob("*.py")))
    seen = [row.split(" | ")[1] for row in PAGE.splitlines() if row.startswith("| **") and row.count(" | ") == 3]
    pieces = [piece.strip(" `()") for cell in seen for quoted in re.findall("`(.+?)`", cell)
              for piece in re.split(r"\.\.\.|\b(?:N|HOST|\d+)\b", quoted) if len(piece.split()) > 2]
    assert len(pieces) > 10
    assert not [piece for piece in pieces if piece not in code]
