"""The ways a command can fail, as exit statuses (see `emo_jax.cli`)."""


class InputError(ValueError):
    """Wrong usage or bad input (exit status 2). The message names the file, line or field, what was given,
    and what is allowed."""


class RunError(RuntimeError):
    """The run itself failed (exit status 1), with a reason that a person can act on. advice: what to change where the same
    command would fail again; where it is "", the message says all."""

    def __init__(self, message: str, advice: str = ""):
        super().__init__(message)
        self.advice = advice


class RestartError(RunError):
    """The run ended before it was done, through no fault of its own (a lost process, a hang); the same command goes on with it
    (exit status 75, on which launchers restart)."""
