"""The launchers: each dry run, what they do with every exit status, their manifests against the published schemas. There is no
cloud and no cluster here: gcloud, srun and the machines of a slice are stood in for by small programs that record what they are
asked; where the real gcloud is installed, it parses the commands. `local.sh` runs for real."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_run import config_file, series

from emo_jax import cli
from emo_jax.commands.arguments import take_overrides
from emo_jax.config import load_config

ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / "launch"
CLOUD = {"PROJECT": "lab", "ZONE": "us-east5-a", "BUCKET": "gs://lab"}
TRAIN = ("train", "emo_1b14b_1t", "--data.path=gs://lab/tokens")


def run(*command, status=0, **env):
    """A command's result, in an environment with what `env` adds, or with None takes away."""
    changed = {name: value for name, value in (os.environ | env).items() if value is not None}
    result = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=300, env=changed, cwd=ROOT)
    assert result.returncode == status, result.stdout + result.stderr
    return result


def wait_until(it_is_so):
    deadline = time.monotonic() + 60
    while not it_is_so():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def program(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


# ---- the files themselves --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tool, arguments, files", [
    ("shellcheck", ("--external-sources", "--source-path=launch"), [*LAUNCH.glob("*.sh"), LAUNCH / "slurm.sbatch"]),
    ("hadolint", (), [LAUNCH / "Dockerfile"])])
def test_scripts_and_container_file_are_clean(tool, arguments, files):
    found = shutil.which(tool, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if not found:
        pytest.skip(f"{tool} is not installed (extra `test`)")
    run(found, *arguments, *files)


# ---- again.sh --------------------------------------------------------------------------------------------------------

NEXT = "set -- $STATUSES; shift $EMO_JAX_ATTEMPT; [ $1 = kill ] && kill -KILL $$; exit $1"


@pytest.mark.parametrize("statuses, ended, said", [
    ("0", 0, ""),
    ("75 75 0", 0, "ended with 75; starting it again"),
    ("kill 0", 0, "ended with 137; starting it again"),
    ("1 1 75 0", 0, "failure 2 of at most 2 in a row"),
    ("1 1 1 0", 1, "failed (1) 3 times in a row"),
    ("2 0", 2, "the same command would fail again"),
    ("127 0", 127, "the same command would fail again"),
    ("75 75 75 75 0", 75, "ended with 75: not started again")])
def test_a_command_is_started_again_by_its_status(tmp_path, statuses, ended, said):
    record = tmp_path / "status"
    result = run("bash", LAUNCH / "again.sh", "--pause", 0, "--failures", 2, "--restarts", 3, "--record", record, "bash", "-c",
                 NEXT, status=ended, STATUSES=statuses)
    assert said in result.stderr and record.read_text() == f"{ended}\n"


@pytest.mark.parametrize("arguments", [(), ("--pause", "soon", "true"), ("--again", "true")])
def test_again_refuses_wrong_usage(arguments):
    assert "again.sh:" in run("bash", LAUNCH / "again.sh", *arguments, status=2).stderr


@pytest.mark.parametrize("command, ended", [
    ("trap 'exit 75' TERM; echo ready; while :; do sleep 0.05; done", 75),  # it saves
    ("echo ready; exec sleep 300", 143)])
def test_a_signal_is_handed_on_and_ends_the_restarts(command, ended):
    started = subprocess.Popen(["bash", str(LAUNCH / "again.sh"), "--pause", "0", "bash", "-c", command],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert started.stdout.readline() == "ready\n"
    started.send_signal(signal.SIGTERM)
    _, said = started.communicate(timeout=60)
    assert started.returncode == ended and f"told to stop; the command ended with {ended}" in said


def test_a_signal_between_two_starts_ends_the_restarts():
    started = subprocess.Popen(["bash", str(LAUNCH / "again.sh"), "--pause", "300", "bash", "-c", "exit 75"],
                               stderr=subprocess.PIPE, text=True)
    assert "starting it again" in started.stderr.readline()
    started.send_signal(signal.SIGTERM)
    assert started.wait(60) == 75


# ---- local.sh --------------------------------------------------------------------------------------------------------


def test_a_local_dry_run_prints_every_process():
    lines = run("bash", LAUNCH / "local.sh", "--processes", 3, "--devices", 2, "--slices", 3, "--dry-run", *TRAIN, "--out",
                "a folder", XLA_FLAGS=None).stdout.splitlines()
    assert [shlex.split(line) for line in lines] == [
        ["env", "JAX_PLATFORMS=cpu", "XLA_FLAGS=--xla_force_host_platform_device_count=2", "EMO_JAX_SLICES=3",
         "EMO_JAX_NUM_PROCESSES=3", "EMO_JAX_COORDINATOR=localhost:PORT", f"EMO_JAX_PROCESS_ID={i}", "emo-jax", *TRAIN, "--out",
         "a folder"] for i in range(3)]


@pytest.mark.parametrize("arguments, said", [
    ((), "no command"), (("--devices", "many", "train"), "--devices needs a number"),
    (("--hosts", "2", "train"), "unknown option"), (("--slices", "3", "train"), "--slices 3 must divide"),
    (("--processes", "0", "train"), "may be 0"), (("--kill-one", "3", "train"), "--kill-one needs an --out")])
def test_local_refuses_wrong_usage(arguments, said):
    assert said in run("bash", LAUNCH / "local.sh", *arguments, status=2).stderr


@pytest.mark.parametrize("statuses, ended", [(("0 0",), 0), (("1 2",), 2), (("kill 75", "0 0"), 0)])
def test_processes_end_and_start_together(tmp_path, statuses, ended):
    program(tmp_path / "emo-jax", f'''#!/usr/bin/env bash
echo "$EMO_JAX_COORDINATOR $EMO_JAX_PROCESS_ID" >> {tmp_path}/started
statuses=({" ".join(shlex.quote(s) for s in statuses)})
export STATUSES=${{statuses[$EMO_JAX_ATTEMPT]}}
EMO_JAX_ATTEMPT=$EMO_JAX_PROCESS_ID exec bash -c {shlex.quote(NEXT)}
''')
    run("bash", LAUNCH / "local.sh", "train", status=ended, PATH=f"{tmp_path}:{os.environ['PATH']}", EMO_JAX_ATTEMPT=None)
    started = [line.split() for line in (tmp_path / "started").read_text().splitlines()]
    assert sorted(index for _, index in started) == sorted("01" * len(statuses))
    assert len({coordinator for coordinator, _ in started}) == len(statuses)  # another port every time


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_local_run_that_is_stopped_leaves_nothing_behind(tmp_path, how):
    program(tmp_path / "emo-jax", f"""#!/usr/bin/env bash
trap 'echo saved; exit 75' TERM
sleep 300 &
echo $! >> {tmp_path}/workers
wait""")
    started = subprocess.Popen(["bash", str(LAUNCH / "local.sh"), "train"], stdout=subprocess.PIPE, text=True,
                               env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # where pytest ignores it
    workers = tmp_path / "workers"
    wait_until(lambda: workers.exists() and len(workers.read_text().split()) == 2)
    started.send_signal(how)
    said, _ = started.communicate(timeout=60)
    assert started.returncode == 75 and sorted(said.splitlines()) == ["[0] saved", "[1] saved"]
    for worker in workers.read_text().split():
        wait_until(lambda: not Path("/proc", worker, "exe").exists())  # killed, as is seen a moment later


def test_a_local_run_whose_process_is_killed_has_the_losses_of_an_undisturbed_one(tmp_path):
    command = ["bash", LAUNCH / "local.sh", "--processes", 2, "--devices", 4, "--slices", 2]
    train = ["train", config_file(tmp_path), "--json", "--train.steps=16", "--train.log_every=4", "--checkpoint.every=2"]
    env = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    run(*command, *train, "--out", tmp_path / "whole", **env)
    result = run(*command, "--kill-one", 0, *train, "--out", tmp_path / "killed", **env)
    assert "killing process 1 with SIGKILL" in result.stderr and "ended with 75; starting it again" in result.stderr
    assert re.search(r"^\[0\] .*process 1 of 2.* is lost", result.stdout, re.MULTILINE)
    assert series(tmp_path / "killed") == series(tmp_path / "whole")
    assert json.loads(result.stdout.splitlines()[-1].removeprefix("[0] "))["resumed_from"] >= 2


# ---- gke.py ----------------------------------------------------------------------------------------------------------


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


# ---- tpu.sh ----------------------------------------------------------------------------------------------------------

VERBS = ("create", "start", "watch", "status", "logs", "stop", "delete")
SLICES = ("--type", "v5p-16", "--slices", "2", "--spot", "--package", "gs://lab/emo_jax-1-py3-none-any.whl")
# Two slices of two workers each, which are folders; the state of the request is a file. A machine that goes takes its processes
# along, and its disk.
GCLOUD = '''#!/usr/bin/env bash
cd "$CLOUD" && printf '%s\\n' "$*" >> calls
[ "$1" != storage ] || { touch "$4/${3##*/}"; exit; }
goes() { cat w?/emo_jax/pid 2>/dev/null | xargs -r kill 2>/dev/null; rm -rf w?; echo "$1" > state; }
for word; do case $word in --command=*) command=${word#--command=} ;; esac; done
case "$4" in
  list) cat state 2>/dev/null ;;
  create) mkdir w0 w1 w2 w3; echo ACTIVE > state ;;
  delete) goes; rm state; touch deleted ;;
  scp) for w in w?; do cp "$5" "$6" $w; done ;;
  ssh) for w in w?; do (cd $w && HOME=$PWD bash -c "$command"); done ;;
esac
[ ! -e preempted ] || { rm preempted; goes SUSPENDED; }
'''
CURL = '''#!/usr/bin/env bash
n=${PWD##*/w}
case "${@: -1}" in
  */worker-network-endpoints) echo "h:1:10.0.$((n / 2)).1,h:2:10.0.$((n / 2)).2" ;;
  */agent-worker-number) echo $((n % 2)) ;;
  */tpu-env) echo "ZONE: 'z'"; echo "MEGASCALE_NUM_SLICES: '2'"; echo "MEGASCALE_SLICE_ID: '$((n / 2))'"
    echo "MEGASCALE_COORDINATOR_ADDRESS: '10.0.0.1:8080'" ;;
esac
'''
# `python3 -m uv venv ... FOLDER` makes an environment, in which `emo-jax` does what EMO says.
PYTHON = '''#!/usr/bin/env bash
[ "$2 $3" = "uv venv" ] || exit 0
mkdir -p "${@: -1}/bin" && printf '#!/usr/bin/env bash\\n%s\\n' "$EMO" > "${@: -1}/bin/emo-jax"
touch "${@: -1}/bin/python" && chmod +x "${@: -1}"/bin/*
'''
SAYS = 'echo "$EMO_JAX_COORDINATOR $EMO_JAX_PROCESS_ID/$EMO_JAX_NUM_PROCESSES $*" > "$HOME/ran"; '
RUNS = SAYS + "trap 'exit 75' TERM; while :; do sleep 0.05; done"


@pytest.fixture
def cloud(tmp_path):
    """`tpu.sh` with arguments, where there are TPUs."""
    for name, text in (("gcloud", GCLOUD), ("curl", CURL), ("python3", PYTHON)):
        program(tmp_path / "bin" / name, text)

    def tpu(verb, *arguments, emo=RUNS, status=0):
        command = TRAIN if verb in ("start", "watch") else ()
        return run("bash", LAUNCH / "tpu.sh", verb, "emo", *SLICES, "--every", 0, *arguments, *command, status=status, EMO=emo,
                   CLOUD=str(tmp_path), PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}", **CLOUD)

    tpu.calls = lambda: [line.split()[3] for line in (tmp_path / "calls").read_text().splitlines() if line[:7] == "compute"]
    yield tpu
    if (tmp_path / "state").exists():
        tpu("delete")


def test_slices_are_created_started_stopped_and_deleted_once(cloud, tmp_path):
    for again in (False, True):
        assert ("emo exists already and is ACTIVE" in cloud("create").stderr) == again
    for again in (False, True):
        assert cloud("start").stdout.count("running already" if again else "started process") == 4
    for worker in range(4):
        ran = tmp_path / f"w{worker}/ran"
        wait_until(lambda: ran.exists() and ran.read_text())
        assert ran.read_text() == f"10.0.0.1:8482 {worker}/4 {' '.join(TRAIN)} --out gs://lab/runs/emo\n"
    assert cloud("status").stdout.count("state: running") == 4
    assert "process 3 of 4" in cloud("logs", "--all").stdout
    assert cloud("stop").stdout.count("it saves first") == 4
    wait_until(lambda: cloud("status").stdout.count("state: ended 75") == 4)
    assert cloud("stop").stdout.count("does not run") == 4
    for again in (False, True):
        assert ("there is no emo" in cloud("delete").stderr) == again
    assert cloud.calls().count("create") == cloud.calls().count("delete") == 1
    assert "ACTIVE" in cloud("start", status=1).stderr


def test_a_preempted_slice_is_asked_for_again_and_the_command_goes_on(cloud):
    emo = '[ ! -e "$CLOUD/deleted" ] || exit 0; [ "${HOME##*/}" != w0 ] || touch "$CLOUD/preempted"; exec sleep 300'
    said = cloud("watch", emo=emo).stderr
    assert "emo was preempted" in said and "the command has ended with 0" in said
    calls = [call for call in cloud.calls() if call in ("create", "delete", "scp")]
    assert calls == ["create", "scp", "delete", "create", "scp"]


def test_watching_ends_with_the_status_of_a_command_that_is_not_started_again(cloud):
    assert "the command has ended with 2" in cloud("watch", emo="exit 2", status=2).stderr


@pytest.mark.parametrize("verb", VERBS)
def test_a_dry_run_needs_no_gcloud(tmp_path, verb):
    program(tmp_path / "gcloud", f"#!/usr/bin/env bash\ntouch {tmp_path}/called\n")
    result = run("bash", LAUNCH / "tpu.sh", verb, "emo", *SLICES, "--dry-run", "--network=n", *TRAIN,
                 PATH=f"{tmp_path}:{os.environ['PATH']}", **CLOUD)
    lines = [shlex.split(line) for line in result.stdout.splitlines()]
    assert lines and all(line[:4] == ["gcloud", "compute", "tpus", "queued-resources"] for line in lines)
    assert all({"--project=lab", "--zone=us-east5-a"} <= set(line) for line in lines) and not (tmp_path / "called").exists()
    if verb == "create":
        assert lines[-1][4:-2] == ["create", "emo", "--accelerator-type=v5p-16", "--runtime-version=v2-alpha-tpuv5",
                                   "--node-count=2", "--node-prefix=emo", "--spot", "--network=n"]


@pytest.mark.skipif(not shutil.which("gcloud"), reason="gcloud is not installed")
def test_gcloud_knows_every_flag(tmp_path):
    printed = [run("bash", LAUNCH / "tpu.sh", verb, "emo", *SLICES, "--dry-run", *TRAIN, **CLOUD).stdout for verb in VERBS]
    lines = list(dict.fromkeys("".join(printed).splitlines()))
    wrong = lines[0].replace("--format", "--form")
    (tmp_path / "commands").write_text(json.dumps([{"command_string": line} for line in (*lines, wrong)]))
    result = run("gcloud", "meta", "lint-gcloud-commands", f"--commands-file={tmp_path / 'commands'}", "--quiet",
                 CLOUDSDK_CONFIG=str(tmp_path))
    *known, unknown = json.loads(result.stdout)
    assert len(known) == len(lines) and not [k["error_message"] for k in known if not k["success"]] and not unknown["success"]


@pytest.mark.parametrize("arguments, said, env", [
    (("create", "emo"), "--type is missing", {}), (("create", "emo", "--type", "v9-8"), "--runtime is missing", {}),
    (("create", "Emo"), "NAME 'Emo' must be", {}), (("begin", "emo"), "VERB 'begin' must be one of", {}),
    (("status", "emo"), "PROJECT is not set", {"PROJECT": None}), (("status", "emo"), "ZONE is not set", {"ZONE": ""}),
    (("start", "emo", *TRAIN), "--package is missing", {}), (("start", "emo", "--package", "p"), "no command", {}),
    (("start", "emo", "--package", "p", *TRAIN), "BUCKET is not set", {"BUCKET": None})])
def test_tpu_names_what_is_missing(arguments, said, env):
    assert said in run("bash", LAUNCH / "tpu.sh", *arguments, status=2, **CLOUD | env).stderr


# ---- slurm.sbatch ----------------------------------------------------------------------------------------------------


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


# ---- the page --------------------------------------------------------------------------------------------------------

PAGE = (LAUNCH / "README.md").read_text()
HERE = CLOUD | {"IMAGE": "lab/emo"}
# Other people's programs, which are not run: the rest of the line is theirs.
OTHERS = {"docker", "gcloud", "kubectl", "pip", ".venv/bin/pip", "python3", "bash", "export"}


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
