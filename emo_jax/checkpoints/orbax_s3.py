"""Orbax on S3. It knows local paths and gs:// only (0.12.8: `build_kvstore_tspec` takes s3:// for a local path, if for any),
though TensorStore has a driver for S3 and Orbax a way to commit without a rename. Here Orbax describes an S3 folder as it
would one of GCS, and the driver is exchanged in the description; an Orbax that knows S3 itself is left alone."""

from __future__ import annotations

import functools
from typing import Any

from orbax.checkpoint import path as orbax_path
from orbax.checkpoint._src.serialization import tensorstore_utils

from emo_jax import buckets
from emo_jax.files import AnyPath

COMMITTED = orbax_path.atomicity.COMMIT_SUCCESS_FILE  # Orbax's mark of a step folder in a bucket that is complete


def for_orbax(path: AnyPath) -> Any:
    """The path, when Orbax can read and write there. A path of pathlib or etils is enough for it."""
    if str(path).startswith("s3://"):
        _teach()
    return path


def commit_class(path: AnyPath) -> type[orbax_path.atomicity.CommitFileTemporaryPath] | None:
    """How Orbax marks folders below `path` as complete, where its own choice, a rename, is none; else None."""
    return orbax_path.atomicity.CommitFileTemporaryPath if str(path).startswith("s3://") else None


@functools.cache
def _teach() -> None:
    original = tensorstore_utils.build_kvstore_tspec
    if original("s3://bucket/key", use_ocdbt=False)["driver"] != "file":
        return  # it knows S3

    @functools.wraps(original)
    def build(directory: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        if not directory.startswith("s3://"):
            return original(directory, *args, **kwargs)
        return _on_s3(original("gs" + directory.removeprefix("s3"), *args, **kwargs))

    setattr(tensorstore_utils, original.__name__, build)


def _on_s3(spec: Any) -> Any:
    if isinstance(spec, dict) and spec.get("driver") in ("gcs", "gcs_grpc"):
        return buckets.kvstore(f"s3://{spec['bucket']}/{spec['path']}")
    if isinstance(spec, dict):
        return {key: _on_s3(value) for key, value in spec.items()}
    return [_on_s3(value) for value in spec] if isinstance(spec, list) else spec
