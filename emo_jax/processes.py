"""The start of several processes of one run, and what they tell each other outside the training step: who reads which rows,
and where everybody's data stands. With one process nothing here communicates."""

from __future__ import annotations

import itertools
import json
import os
import socket
import threading
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from emo_jax import ending, liveness, sharding
from emo_jax.errors import InputError, RestartError
from emo_jax.files import shortened
from emo_jax.relay import Relay

JOIN_S = 110.0  # between the first and the last process of a run that are started
BARRIER_S = 3600  # what one process does while the others wait takes less
_PROXIES, _NO_PROXY = ("grpc_proxy", "https_proxy", "http_proxy"), "no_grpc_proxy"
_barriers, _comparisons = itertools.count(), itertools.count()


def start_distributed() -> None:
    """Joins the processes of one run: from EMO_JAX_COORDINATOR (host:port), EMO_JAX_NUM_PROCESSES and
    EMO_JAX_PROCESS_ID where they are set, else by JAX's own detection: under Slurm, in GKE (TPU_WORKER_HOSTNAMES,
    MEGASCALE_NUM_SLICES), and on TPU VMs, which know of each other from the cloud's metadata. A second call does nothing."""
    if jax.distributed.is_initialized():
        return
    if "EMO_JAX_COORDINATOR" in os.environ:
        if os.environ.get("JAX_PLATFORMS", "") == "cpu":
            jax.config.update("jax_cpu_collectives_implementation", "gloo")
        _join(os.environ["EMO_JAX_COORDINATOR"], int(os.environ["EMO_JAX_NUM_PROCESSES"]),
              int(os.environ["EMO_JAX_PROCESS_ID"]))
    elif (int(os.environ.get("SLURM_NTASKS", "1")) > 1 or "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")
          or int(os.environ.get("MEGASCALE_NUM_SLICES", "1")) > 1):  # slices of one host, too
        _join(*_detected())
    elif _on_tpu_vm() and (found := _detected()) and found[1] > 1:
        _join(*found)


def _on_tpu_vm() -> bool:
    """Whether this machine has TPUs, as JAX found when it was imported, and is to use them."""
    try:
        from jax._src.cloud_tpu_init import running_in_cloud_tpu_vm
    except ImportError:
        return False
    return running_in_cloud_tpu_vm and "tpu" in (os.environ.get("JAX_PLATFORMS") or "tpu")


def _detected() -> tuple:
    """(coordinator, number of processes, index of this one, local devices), as JAX finds them by itself; () where this JAX has
    another way to ask."""
    try:
        from jax._src.clusters import ClusterEnv

        return ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, initialization_timeout=300)
    except (ImportError, AttributeError, TypeError):
        return ()


def _join(coordinator: str | None = None, count: int | None = None, index: int | None = None,
          devices: Sequence[int] | None = None) -> None:
    """None: as JAX detects, without a relay."""
    relay = Relay(coordinator) if coordinator and index else None
    if relay and any(name in os.environ for name in _PROXIES):  # behind which gRPC would look for the relay
        os.environ[_NO_PROXY] = ",".join(filter(None, (os.environ.get(_NO_PROXY, os.environ.get("no_proxy")), "127.0.0.1")))
    jax.config.update("jax_enable_preemption_service", True)
    late = threading.Timer(JOIN_S, ending.end, [f"the processes of this run did not all come to {coordinator or 'the first'} "
                                                f"within {JOIN_S:.0f} s: one is lost, or was not started"])
    late.daemon = True
    late.start()  # as JAX aborts, after its own time
    jax.distributed.initialize(relay.address if relay else coordinator, count, index, devices)
    late.cancel()
    if relay:
        relay.join()
    liveness.watch(jax.process_index() if index is None else index, count or jax.process_count(), relay)


def wait_for_all(name: str) -> None:
    """Returns when every process has come to the place of this name. Raises `RestartError`, which names the missing, if one
    does not come for long."""
    if jax.process_count() == 1:
        return
    if (store := liveness.store()) is None:
        multihost_utils.sync_global_devices(name)
        return
    try:
        store.wait_at_barrier(f"emo_jax/{next(_barriers)}/{name}", BARRIER_S * 1000)
    except Exception as e:  # of JAX's own kind
        raise RestartError(f"not all processes came to {name!r} within {BARRIER_S} s: {str(e).splitlines()[0]}") from None


def require_same(what: str, facts: dict[str, Any]) -> None:
    """Every process calls this with what it believes to be the same everywhere. Raises `InputError`, which names the field and
    the hosts, on those that differ from the first."""
    if jax.process_count() == 1 or (store := liveness.store()) is None:
        return
    key, own = f"emo_jax/same/{next(_comparisons)}", json.dumps([socket.gethostname(), facts])
    if jax.process_index() == 0:
        store.key_value_set(key, own)
        return
    first_host, first = json.loads(store.blocking_key_value_get(key, BARRIER_S * 1000))
    host, facts = json.loads(own)
    for name in facts:
        if facts[name] != first.get(name):
            ours, theirs = (shortened(repr(known.get(name))) for known in (facts, first))
            raise InputError(f"the processes of this run do not have the same {what}: {name} is {ours} in process "
                             f"{jax.process_index()} on {host}, and {theirs} in process 0 on {first_host}")


def asked_to_stop(step: int) -> bool:
    """Whether this is the step after which all processes leave, because one of them got SIGTERM, or a notice that its machine
    goes away. Every process asks after every step."""
    return multihost_utils.reached_preemption_sync_point(step)


def gather(x: np.ndarray) -> np.ndarray:
    """[processes, ...]: `x` of every process, on every process (same shape everywhere)."""
    return np.asarray(multihost_utils.process_allgather(x)) if jax.process_count() > 1 else np.asarray(x)[None]


def any_process(flag: bool) -> bool:
    return bool(gather(np.asarray(flag)).any())


def gather_global(x: jax.Array) -> np.ndarray:
    """All of a sharded array, on every process."""
    return np.asarray(x if x.is_fully_addressable else multihost_utils.process_allgather(x, tiled=True))


def row_group(mesh: Mesh, batch_size: int) -> tuple[int, int]:
    """(index, count): the rows of a batch are split into `count` equal groups and this process reads group `index`.

    Processes that hold the same rows (an axis of the mesh other than the batch axes spans them) read the same group.
    """
    slices: dict[int, set[int]] = {}
    for device, (rows, _) in sharding.batch_sharding(mesh).devices_indices_map((batch_size, 1 << 20)).items():
        slices.setdefault(device.process_index, set()).add(rows.start or 0)
    groups = sorted({tuple(sorted(starts)) for starts in slices.values()})
    return groups.index(tuple(sorted(slices[jax.process_index()]))), len(groups)


def gather_groups(local: np.ndarray, group: tuple[int, int]) -> np.ndarray:
    """[B, W] int64 from the [B / count, W] of every row group."""
    index, count = group
    # int64 would be cut to int32 on its way through the devices, so its halves travel.
    halves = gather(np.ascontiguousarray(local, np.int64).view(np.int32))
    by_group = {int(i): np.ascontiguousarray(x).view(np.int64) for i, x in zip(gather(np.array(index)), halves)}
    return np.concatenate([by_group[i] for i in range(count)])
