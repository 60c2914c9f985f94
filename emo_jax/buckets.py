"""Objects in buckets, `gs://bucket/key` and `s3://bucket/key`: who reads and writes them.

TensorStore reads byte ranges and arrays (its drivers need no package), fsspec lists and writes whole objects (gcsfs, s3fs:
the extras `gcs` and `s3`). Both find credentials as the vendors' tools do. Another server than the vendor's: AWS_ENDPOINT_URL
with AWS_REGION; STORAGE_EMULATOR_HOST.
"""

from __future__ import annotations

import functools
import importlib
import os
from typing import TYPE_CHECKING, Any

from emo_jax.errors import InputError

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

PACKAGES = {"gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}  # what lists and writes them, and the extra that installs it
SCHEMES = tuple(f"{scheme}://" for scheme in PACKAGES)


def is_url(path: object) -> bool:
    return str(path).startswith(SCHEMES)


def split_url(url: str) -> tuple[str, str, str]:
    """(scheme, bucket, key)"""
    scheme, _, rest = url.partition("://")
    bucket, _, key = rest.partition("/")
    return scheme, bucket, key


def without_scheme(url: object) -> str:
    return str(url).partition("://")[2]


def require_package(url: str, field: str) -> None:
    """Raises `InputError` naming the extra that `url`, which a person gave as `field`, needs."""
    package, extra = PACKAGES[split_url(url)[0]]
    try:
        importlib.import_module(package)
    except ImportError:
        raise InputError(f"{field} {url} is in a bucket, which needs {package}: pip install 'emo-jax[{extra}]'") from None
    _forget_listings()


@functools.cache
def _forget_listings() -> None:
    """Else fsspec's listings, etils's included, stay as they were before TensorStore, or another process, wrote there."""
    import fsspec.config

    for protocol in ("gs", "gcs", "s3"):
        fsspec.config.conf.setdefault(protocol, {})["use_listings_cache"] = False


def errors(url: object) -> tuple[type[Exception], ...]:
    """What reading or writing below `url` may raise: nothing more for a local path, but anything for a bucket, whose libraries
    have no exception in common."""
    return (Exception,) if is_url(url) else ()


def filesystem(url: str) -> AbstractFileSystem:
    """The fsspec file system of a URL."""
    import fsspec

    require_package(url, "the path")
    return fsspec.filesystem(split_url(url)[0])


def kvstore(url: str, **context: Any) -> dict[str, Any]:
    """The TensorStore spec of what lies below `url`, a file:// URL's folder included. context: resources such as
    `request_retries` of the driver, without its name."""
    scheme, bucket, key = split_url(url)
    if scheme == "file":
        return {"driver": "file", "path": f"{bucket}/{key}"}
    driver = {"gs": "gcs", "s3": "s3"}[scheme]
    spec: dict[str, Any] = {"driver": driver, "bucket": bucket, "path": key}
    if context:
        spec["context"] = {f"{driver}_{name}": value for name, value in context.items()}
    if scheme == "gs" and (emulator := os.environ.get("STORAGE_EMULATOR_HOST")):
        os.environ.setdefault("TENSORSTORE_GCS_HTTP_URL", emulator)
    if scheme == "s3" and (endpoint := os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")):
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
        spec |= {"endpoint": endpoint, "aws_region": region}
    return spec
