"""Running a launcher, and standing in for the programs that it calls."""

import os
import subprocess
import time
from pathlib import Path

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
