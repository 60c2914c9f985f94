"""train.profile_steps: what the devices and this process do in some steps, as XProf and TensorBoard show it."""

from __future__ import annotations

import contextlib
import shutil
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax

from emo_jax import buckets
from emo_jax.config_rules import step_range
from emo_jax.files import AnyPath, reason

FOLDER = "profile"


class Profile:
    """The steps of `steps` (as in the config) that this start takes. Every process writes a file of its own to OUT/profile,
    where it is a host of one session."""

    def __init__(self, steps: str, out: AnyPath, say: Callable[[str], None]):
        self._first, self._last = step_range(steps) if steps else (0, -1)
        self._out, self._say = out, say
        self._folder: str | None = None  # where it is being written
        self._began = 0

    def before(self, step: int, settle: Callable[[], None]) -> bool:
        """Begins with the first of the steps; whether it did. settle: returns when the steps before it are over."""
        if self._folder is not None or not self._first <= step <= self._last:
            return False
        settle()
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # it would slow the steps down
        folder = tempfile.mkdtemp(prefix="emo_jax-profile-")
        try:
            jax.profiler.start_trace(folder, profiler_options=options)
        except Exception as e:  # of many kinds, none of which is worth a run
            self._say(f"steps {step} to {self._last} are not profiled: {reason(e)}")
            self._last = -1
            shutil.rmtree(folder, ignore_errors=True)
        else:
            self._folder, self._began = folder, step
        return self._folder is not None

    def step(self, step: int) -> contextlib.AbstractContextManager:
        """Around the dispatch of a step, for XProf's analysis by step."""
        return jax.profiler.StepTraceAnnotation("train", step_num=step) if self._folder else contextlib.nullcontext()

    def after(self, step: int, settle: Callable[[], None]) -> bool:
        """Ends after the last of the steps; whether it did."""
        if self._folder is None or step < self._last:
            return False
        settle()
        self._end(step)
        return True

    def close(self, step: int) -> None:
        """A run that ends before the last of the steps keeps those that it took."""
        if self._folder is not None:
            self._end(step)

    def _end(self, step: int) -> None:
        assert self._folder is not None
        folder, self._folder, target = self._folder, None, self._out / FOLDER
        session = target / "plugins" / "profile" / f"steps_{self._began}_{step}"  # where XProf looks
        try:
            jax.profiler.stop_trace()
            for path in Path(folder).rglob("*.xplane.pb"):
                _move(path, session / f"{socket.gethostname()}_{jax.process_index()}.xplane.pb")
        except Exception as e:  # likewise
            self._say(f"the profile of steps {self._began} to {step} could not be written to {session}: {reason(e)}")
        else:
            self._say(f"the profile of steps {self._began} to {step} is in {target}; to see it: pip install xprof; "
                      f"xprof --logdir {target}")
        shutil.rmtree(folder, ignore_errors=True)


def _move(path: Path, target: AnyPath) -> None:
    if isinstance(target, Path):
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(path, target)
    else:
        buckets.filesystem(str(target)).put_file(str(path), str(target))
