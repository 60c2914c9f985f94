"""The two ways a command can fail, as exit statuses (see `emo_jax.cli`)."""


class InputError(ValueError):
    """Wrong usage or bad input (exit status 2). The message names the file, line or field, what was given,
    and what is allowed."""


class RunError(RuntimeError):
    """The run itself failed (exit status 1), with a reason that a person can act on."""
