"""What one training step of a config computes, moves, communicates and holds on one device of a mesh, from the config alone.

Letters are those of `emo_jax.model`; n are the tokens of a device in one microbatch. Work that the routing decides is that of
balanced routing. Bytes are of bfloat16 compute and fp32 masters, as on TPU.

Time is a sum over kernels of the longer of FLOPs / peak and bytes / bandwidth, as `aot.schedule` counts compiled programs, plus
the memory passes between the kernels, plus the communication that nothing hides. How many passes there are, how much of the
arrays exists at the same time, and what of the prefetched communication stays exposed is what the compiler decides:
`Coefficients`, fitted by `plan.calibration` on compiled programs. All else is counted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from emo_jax.chips import Chip
from emo_jax.config import Config
from emo_jax.errors import InputError
from emo_jax.kernels.cross_entropy import chunk_tokens
from emo_jax.model import SAVED
from emo_jax.moe.experts import choose_strategy
from emo_jax.train.flops import flops_per_token

BF16, FP32 = 2, 4
ALL_REDUCED = 0.69  # share of the gradients' bytes, where the compiler makes all-reduces of reductions over two torus axes
STATE = 3 * FP32  # bytes of a parameter: master, two moments
OPTIMIZER_TRAFFIC = 10 * FP32  # bytes of a parameter that an update moves: norms, clipping, AdamW, whether the step is taken


class Coefficients(NamedTuple):
    """What is fitted. See `Cost`."""

    passes: float  # memory passes between kernels / those that `_passes` counts
    weights: float  # memory traffic of weights / once in and out of every gather and reduction
    exposed: float  # share of prefetched communication that stays exposed although there is enough to hide it behind
    saved: float  # memory of what the backward pass keeps / its bytes
    working: float  # memory of one layer's arrays / the bytes of its expert rows, counted once each
    gathered: float  # layers' whole weights and their gradients that exist at the same time


class Place(NamedTuple):
    """Where a step runs."""

    chip: Chip
    grid: tuple[int, ...]  # chips along each torus axis of a slice
    mesh: dict[str, int]  # size of every axis, all slices together
    slices: int = 1
    sparse_cores: bool = True  # whether collectives run beside the computation


@dataclass(frozen=True)
class Collective:
    """Collectives of one step and device."""

    axis: str
    what: str
    payload: float  # bytes of the whole (gathered, or unreduced) arrays
    wire: float  # bytes that a device sends
    seconds: float
    prefetched: bool  # can run beside the computation; else the next kernel waits for it


@dataclass(frozen=True)
class Cost:
    """Of one step, on one device. Seconds and memory follow from these and the coefficients."""

    place: Place
    dispatch: str  # the strategy
    flops: float
    model_flops: float
    kernel_seconds: float
    unfilled_seconds: float  # of expert kernels, for buffer lines that balanced routing leaves empty: programs count them too
    bytes_passes: float  # memory traffic between kernels, counted as in `_Step._passes`
    bytes_weights: float  # of gathered weights and their gradients
    bytes_fixed: float  # of the optimizer
    collectives: list[Collective]
    state: float  # bytes of memory: parameters and optimizer
    gradients: float
    saved: float  # for the backward pass
    working: float  # one layer's arrays
    gathered: float  # one layer's weights
    loss: float  # logits and the head

    def compute_seconds(self, fitted: Coefficients) -> float:
        moved = fitted.passes * self.bytes_passes + fitted.weights * self.bytes_weights + self.bytes_fixed
        return self.kernel_seconds + moved / (self.place.chip.bandwidth or math.nan)

    def communication(self, prefetched: bool) -> float:
        """Seconds of the collectives that are, or that are not."""
        return sum(c.seconds for c in self.collectives if c.prefetched == prefetched)

    def exposed_seconds(self, fitted: Coefficients) -> float:
        hidden = self.communication(prefetched=True)
        return self.communication(prefetched=False) + max(fitted.exposed * hidden, hidden - self.compute_seconds(fitted))

    def seconds(self, fitted: Coefficients) -> float:
        return self.compute_seconds(fitted) + self.exposed_seconds(fitted)

    def memory(self, fitted: Coefficients) -> float:
        """The layers' backward pass or the loss, whichever holds more."""
        layers = fitted.working * self.working + fitted.gathered * self.gathered
        return self.state + self.gradients + fitted.saved * self.saved + max(layers, self.loss)

    def mfu(self, fitted: Coefficients) -> float:
        return self.model_flops / self.place.chip.flops / self.seconds(fitted)


def parameters(config: Config) -> dict[str, float]:
    """Parameters: `embedding`, `head`, and of one layer `attention`, `experts` (or the dense MLP), `router`, `norms`."""
    m = config.model
    return {
        "embedding": m.vocab_size * m.d_model, "head": m.vocab_size * m.d_model,
        "attention": m.d_model * m.head_dim * 2 * (m.num_heads + m.num_kv_heads),
        "experts": max(m.num_experts, 1) * 3 * m.d_model * m.d_ff,
        "router": m.d_model * m.num_routed_experts if m.num_experts else 0, "norms": 2 * m.d_model,
    }


def local_parameters(config: Config, mesh: dict[str, int]) -> float:
    """Parameters on one device."""
    p, L = parameters(config), config.model.num_layers
    shards, tensor = mesh["fsdp"] * mesh["expert"], mesh["tensor"]
    split = (p["head"] + L * (p["attention"] + p["experts"])) / tensor + p["embedding"] + L * p["router"]
    return split / shards + L * p["norms"] + config.model.d_model


def cost(config: Config, place: Place, dispatch: str = "", remat: str = "") -> Cost:
    """`dispatch` and `remat`: instead of the config's. Raises `InputError` for dispatch=dense."""
    return _Step(config, place, dispatch or config.kernels.dispatch, remat or config.train.remat).cost()


class _Step:
    def __init__(self, config: Config, place: Place, dispatch: str, remat: str):
        m, mesh = config.model, place.mesh
        self.config, self.m, self.place, self.mesh = config, m, place, mesh
        self.M = config.train.microbatches
        self.n = (config.train.batch_size // self.M * config.data.sequence_length
                  / (mesh["data"] * mesh["fsdp"] * mesh["expert"] * mesh["sequence"]))
        self.moe = m.num_experts > 0
        self.k = m.routed_top_k if self.moe else 0
        self.strategy, _, self.rings = choose_strategy(dispatch, mesh["expert"], self.k, "tpu", place.sparse_cores)
        if self.strategy == "dense":
            raise InputError("the cost model knows kernels.dispatch local, ring and all_to_all, not dense")
        self.exchanged = self.moe and mesh["expert"] > 1 and self.strategy in ("ring", "all_to_all")
        self.experts = m.num_experts / (mesh["expert"] if self.exchanged else 1)  # of a device
        # Lines of the buffer of expert rows for each of the device's own tokens.
        X = mesh["expert"] if self.exchanged else 1
        everyones = X * min(self.k, self.experts)
        factor = config.kernels.buffer_factor or math.inf
        self.lines = min(everyones, factor * self.k) if self.strategy == "all_to_all" else everyones
        # Weights of a layer as a device multiplies them: whole along fsdp, and along expert too without an exchange.
        p, t = parameters(config), mesh["tensor"]
        self.layer_weights = BF16 * (p["attention"] / t + p["experts"] / X / t) + FP32 * p["router"]
        saved = SAVED.get(remat)
        self.saved_names = None if saved is None else set(saved)
        self.repeated = saved is not None and "moe_exchanged" not in saved  # the exchange of rows, in the backward pass

    def cost(self) -> Cost:
        c, M, L = self.config, self.M, self.m.num_layers
        forward, again, backward = self._layer()
        loss = self._loss()
        counted = M > 1 and self.moe and c.router.balance_scope == "step"  # one more forward pass
        gathers = 2 + counted
        kernels = [(kernel, M * L * (1 + counted)) for kernel in forward]
        kernels += [(kernel, M * L) for kernel in again + backward] + [(kernel, M) for kernel in loss]
        chip = self.place.chip
        seconds = sum(times * max(flops / chip.flops, moved / (chip.bandwidth or math.nan))
                      for (flops, moved), times in kernels)
        whole = L * self.layer_weights + BF16 * 2 * parameters(c)["head"] / self.mesh["tensor"]
        local = local_parameters(c, self.mesh)
        tokens = c.train.batch_size * c.data.sequence_length
        return Cost(
            place=self.place, dispatch=self.strategy, flops=sum(times * flops for (flops, _), times in kernels),
            model_flops=flops_per_token(c) * tokens / math.prod(self.mesh.values()), kernel_seconds=seconds,
            unfilled_seconds=(self.lines / self.k - 1) * self._expert_flops(counted) / chip.flops if self.exchanged else 0.0,
            bytes_passes=M * (L * self._passes(counted) + self._loss_passes()),
            bytes_weights=M * (gathers + 1) * (whole + self.rings * L * self.layer_weights),
            bytes_fixed=OPTIMIZER_TRAFFIC * local, collectives=self._collectives(gathers),
            state=STATE * local, gradients=FP32 * local * (2 if M > 1 else 1), saved=L * self._saved(),
            working=self._working(), gathered=self.layer_weights, loss=self._loss_memory())

    # ---- kernels: (FLOPs, bytes) ----

    def _matmul(self, rows: float, inner: float, outer: float, matrices: float = 1) -> tuple[float, float]:
        return 2 * rows * inner * outer, BF16 * (rows * (inner + outer) + matrices * inner * outer)

    def _layer(self):
        """Kernels of one layer: forward, again in the backward pass, and of the gradients."""
        m, n, t = self.m, self.n, self.mesh["tensor"]
        D, heads, F = m.d_model, m.head_dim / t, m.d_ff / t
        T, H, G = self.config.data.sequence_length, m.num_heads, m.num_kv_heads
        qkv, out = self._matmul(n, D, (H + 2 * G) * heads), self._matmul(n, H * heads, D)
        scores = n * T * H * heads  # of one of attention's matmuls, below the diagonal
        read = BF16 * n * heads * (2 * H + 2 * G)
        attention, attention_back = (2 * scores, read), (5 * scores, 2 * read)
        turn = 2 * n * (H + G) * heads * m.head_dim, 0.0  # the rotary embedding's matmul; its bytes are in `_passes`
        forward, again, backward = [qkv, turn, attention, out], [], [qkv, qkv, turn, attention_back, out, out]
        if self.moe:
            router = (2 * n * D * m.num_routed_experts, FP32 * n * (D + m.num_routed_experts))
            rows = self.k * n  # balanced
            up = self._matmul(rows, D, 2 * F, self.experts)
            up = up[0], up[1] + BF16 * rows * F  # silu(gate) * up leaves with them
            down = self._matmul(rows, F, D, self.experts)
            down_back = down[0], down[1] + BF16 * rows * 4 * F  # and the adjoint of silu(gate) * up
            shared = self._matmul(m.num_shared_experts * n, D, 2 * F), self._matmul(m.num_shared_experts * n, F, D)
            forward += [router, up, down, *shared]
            backward += [router, router, up, up, down_back, down, *shared, *shared]
        else:
            router, up, down = (0.0, 0.0), self._matmul(n, D, 2 * F), self._matmul(n, F, D)
            shared = ()
            forward += [up, down]
            backward += [up, up, down, down]
        if self.saved_names is None:
            return forward, again, backward
        saved = self.saved_names
        if "attention_qkv" not in saved:
            again += [qkv, turn]
        if "attention" not in saved:
            again.append(attention)
        if "residual" not in saved:
            again.append(out)
        if "routing" not in saved:
            again.append(router)
        if "moe_hidden" not in saved or not self.moe:
            again.append(up)
        return forward, again + list(shared[:1]), backward

    def _expert_flops(self, counted: bool) -> float:
        one = 2 * self.k * self.n * self.m.d_model * self.m.d_ff / self.mesh["tensor"]
        again = self.saved_names is not None and "moe_hidden" not in self.saved_names
        return self.M * self.m.num_layers * one * (3 * (1 + counted) + 6 + 2 * again)

    def _loss(self):
        """The head forward and, in the same pass, both of its gradients: chunks of logits in fp32."""
        m, t = self.m, self.mesh["tensor"]
        forward = self._matmul(self.n, m.d_model, m.vocab_size / t)
        return [(forward[0], forward[1] + BF16 * self.n * m.vocab_size / t), forward, forward]

    # ---- memory passes between kernels, bytes ----

    def _passes(self, counted: bool) -> float:
        """Of one layer and microbatch: gathers of rows and their sums, norms, rotations, residuals, the router's arrays."""
        m, n, t = self.m, self.n, self.mesh["tensor"]
        row = BF16 * n * m.d_model
        heads = BF16 * n * (m.num_heads + m.num_kv_heads) * m.head_dim / t
        forward = 6 * row + 4 * heads  # two norms, two residuals; rotation
        if self.moe:
            gather, combine = 2 * self.lines * row, (2 * self.lines + self.k + 1) * row
            router = 6 * FP32 * n * m.num_routed_experts
            forward += gather + combine + router
        else:
            gather = combine = router = 0.0
        again = 4 * row + 4 * heads + (0.0 if self.saved_names and "moe_rows" in self.saved_names else gather)
        backward = 10 * row + 4 * heads + gather + combine + 2 * router
        if self.exchanged and self.strategy == "all_to_all":  # buffers at both ends, zeroed and copied
            buffers = (self.lines + self.k) * row
            forward, again, backward = forward + 2 * buffers, again + self.repeated * buffers, backward + 2 * buffers
        kept = self._saved()  # written once, read once
        return (1 + counted) * forward + again + backward + 2 * kept

    def _loss_passes(self) -> float:
        """Softmax of the logits, and their gradient."""
        return self.n * self.m.vocab_size / self.mesh["tensor"] * (FP32 + BF16)

    # ---- communication ----

    def _collectives(self, gathers: int) -> list[Collective]:
        """`gathers`: how often a layer's weights are gathered in a microbatch."""
        mesh, M, L, p, t = self.mesh, self.M, self.m.num_layers, parameters(self.config), self.mesh["tensor"]
        F, X, slices, beside = mesh["fsdp"], mesh["expert"], self.place.slices, self.place.sparse_cores
        table = M * L * BF16 * p["experts"] / t
        others = M * L * (BF16 * p["attention"] / t + FP32 * p["router"])  # over fsdp and expert together
        ends = M * BF16 * (p["head"] / t + p["embedding"])
        row = M * L * BF16 * self.n * self.m.d_model
        found = []
        if self.exchanged:
            found += self._weights("weights", F * X, gathers, others, ends)
            found += self._weights("experts", F, gathers, table / X, 0.0)
            # Forward and back, and the adjoints of both; once more where a forward pass is repeated. The experts wait for them.
            rows = (4 + self.repeated + 2 * (gathers - 2)) * row
            if self.strategy == "ring":
                found.append(self._one("expert", "tokens", X, X * rows, False))
            else:  # every row crosses a quarter of each torus axis of the group
                crossed = 4 / X ** (1 / torus_axes(self.place.grid, X))
                found.append(self._one("expert", "tokens", X, self.k * rows, False, axes=crossed))
            shared = M * L * BF16 * self.m.num_shared_experts * 3 * self.m.d_model * self.m.d_ff / t
            found.append(self._one("expert", "shared experts", X, (gathers + 1) * shared, beside, 2))
        elif self.rings:  # fsdp first, of a part of the table; then permutes along expert
            found += self._weights("weights", F, gathers, others + table / X, ends)
            both = torus_axes(self.place.grid, F * X)
            found.append(self._one("expert", "experts, by permutes", X, (gathers + 1) * table, True, axes=both))
        else:
            found += self._weights("weights", F * X, gathers, others + table, ends)
        # Sums of parts after attention and after the experts, forward and backward.
        found.append(self._one("tensor", "activations", t, (4 + 2 * (gathers - 2)) * row, False, 2))
        keys = M * L * BF16 * self.n * mesh["sequence"] * 2 * self.m.num_kv_heads * self.m.head_dim / t
        found.append(self._one("sequence", "keys and values", mesh["sequence"], (gathers + 1) * keys, False))
        # Between replicas, and over the network: what a device has of the gradients, the experts' in fp32.
        owned = (table * FP32 / BF16 + others + ends) / (F * X)
        within = mesh["data"] // slices
        found.append(self._one("data", "gradients", within, owned, beside, 2))
        if slices > 1:
            sent = 2 * owned * (slices - 1) / slices / within
            found.append(Collective("slices", "gradients", owned, sent, sent / (self.place.chip.network or math.nan), True))
        return [collective for collective in found if collective.wire]

    def _one(self, axis: str, what: str, group: int, payload: float, prefetched: bool, passes: int = 1,
             axes: float = 0) -> Collective:
        """`axes`: torus axes whose links carry it; 0: those that the group spans."""
        wire = payload * passes * (group - 1) / group
        links = (self.place.chip.link or math.nan) * (axes or torus_axes(self.place.grid, group))
        return Collective(axis, what, payload, wire, wire / links, prefetched)

    def _weights(self, what: str, group: int, gathers: int, of_layers: float, ends: float) -> list[Collective]:
        """Gathers of weights and reductions of their gradients over fsdp."""
        grid, beside, gathered = self.place.grid, self.place.sparse_cores, gathers * of_layers + ends
        whole_experts = self.moe and self.m.num_experts % group == 0
        # Without SparseCores the compiler runs only gathers of whole experts beside the computation: gate and up, not down.
        hidden = 1.0 if beside else 2 / 3 if whole_experts else 0.0
        # It makes all-reduces of most reductions over both axes of a two-dimensional torus, but of whole experts.
        reduced = ALL_REDUCED if len(grid) == 2 and torus_axes(grid, group) == 2 and not whole_experts else 0.0
        return [self._one("fsdp", what, group, hidden * gathered, True),
                self._one("fsdp", what, group, (1 - hidden) * gathered, False),
                self._one("fsdp", f"{what}' gradients", group, (1 - reduced) * (of_layers + ends), beside),
                self._one("fsdp", f"{what}' gradients, all-reduced", group, reduced * (of_layers + ends), False, 2)]

    # ---- memory, bytes ----

    def _saved(self) -> float:
        """What the backward pass keeps of a layer, its input included."""
        m, n, t = self.m, self.n, self.mesh["tensor"]
        row, k = BF16 * m.d_model, self.k
        exchanged = 0.0
        if self.exchanged:
            exchanged = self.mesh["expert"] * row if self.strategy == "ring" else self.lines * row
        of = {
            "attention": (BF16 * m.head_dim + FP32) * m.num_heads / t,
            "attention_qkv": BF16 * m.head_dim * (m.num_heads + 2 * m.num_kv_heads) / t,
            "residual": row, "moe_rows": self.lines * row, "moe_hidden": self.lines * BF16 * 2 * m.d_ff / t, "moe_out": row,
            "routing": (FP32 + 1) * m.num_routed_experts + FP32 * (2 * k + self.lines), "moe_exchanged": exchanged,
        }
        if not self.moe:
            of |= {name: 0.0 for name in of if name.startswith(("moe_", "routing"))}
        # Without rematerialisation: those and what is between them; the weights too, which are not gathered again.
        names = set(of) if self.saved_names is None else self.saved_names
        kept = n * (row + sum(of[name] for name in names))
        return 2 * kept + self.layer_weights if self.saved_names is None else kept

    def _working(self) -> float:
        """Arrays of one layer in its backward pass: rows, their hidden arrays and the gradients of both."""
        m, t = self.m, self.mesh["tensor"]
        lines = self.lines if self.moe else 1
        sent = 3 * self.k if self.exchanged and self.strategy == "all_to_all" else 0  # there, back, and the gradient
        return self.n * BF16 * (lines * (3 * m.d_model + 5 * m.d_ff / t) + (sent + 8) * m.d_model)

    def _loss_memory(self) -> float:
        m, t = self.m, self.mesh["tensor"]
        chunk = min(self.n, self.config.kernels.loss_chunk_tokens or chunk_tokens("tpu"))
        return m.vocab_size / t * (m.d_model * (FP32 + BF16) + chunk * (2 * FP32 + BF16)) + 2 * BF16 * self.n * m.d_model


def torus_axes(grid: tuple[int, ...], group: int) -> int:
    """Torus axes whose links a group of this size uses at the same time: as few as hold it."""
    held = 1
    for number, size in enumerate(sorted(grid, reverse=True), 1):
        held *= size
        if held >= group:
            return number
    return max(1, len(grid))
