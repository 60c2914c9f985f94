"""`emo-jax export --push`: a written folder -> a repository of the Hugging Face hub, through huggingface_hub (extra `hub`)."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from emo_jax.errors import InputError, RunError
from emo_jax.files import AnyPath, given_path

NAME = re.compile(r"[\w.-]+/[\w.-]+")


class Push(NamedTuple):
    """An upload that was found to be possible: the library is there, a token is known, and the hub knows it."""

    api: Any
    repo: str

    @classmethod
    def checked(cls, repo: str, out: str | AnyPath) -> Push:
        """Before anything is written. The token and the address (HF_ENDPOINT) are those that the library finds. Raises
        `InputError`."""
        if not NAME.fullmatch(repo):
            raise InputError(f"--push {repo!r} must be ORGANISATION/NAME of a repository")
        if "://" in str(given_path(out, "--out")):
            raise InputError(f"--push uploads a local folder, not --out {out}")
        try:
            import huggingface_hub
        except ImportError as e:
            raise InputError(f"--push needs huggingface_hub ({e}): pip install 'emo-jax[hub]'") from None
        api = huggingface_hub.HfApi()
        if huggingface_hub.get_token() is None:
            raise InputError("--push: no token of the hub is known; log in with `hf auth login`, or set HF_TOKEN")
        try:
            api.whoami()
        except Exception as e:  # the library's own, those of its HTTP client, and plain OSError
            status = getattr(getattr(e, "response", None), "status_code", None)
            if status in (401, 403):
                raise InputError(f"--push: {api.endpoint} does not accept the token; log in with `hf auth login`") from None
            raise InputError(f"--push: {api.endpoint} cannot be reached ({_short(e)})") from None
        return cls(api, repo)

    def __call__(self, folder: str) -> str:
        """The address of what was uploaded, in one commit. Raises `RunError`."""
        try:
            self.api.create_repo(self.repo, exist_ok=True)
            self.api.upload_folder(repo_id=self.repo, folder_path=folder, commit_message="emo-jax export")
        except Exception as e:
            raise RunError(f"uploading {folder} to {self.repo} failed ({_short(e)}); it is whole: upload it again with "
                           f"`hf upload {self.repo} {folder}`") from e
        return f"{self.api.endpoint}/{self.repo}"


def _short(e: Exception) -> str:
    return f"{type(e).__name__}: {' '.join(str(e).split())[:300]}"
