"""`tpu.sh` from the request for slices to the end of the command. There is no cloud here: gcloud and the machines of two slices
are stood in for by programs that record what they are asked; gcloud itself, where it is installed, parses the commands."""

import json
import os
import shlex
import shutil

import pytest
from launching import CLOUD, LAUNCH, TRAIN, program, run, wait_until

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
