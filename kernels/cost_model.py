"""How long a grouped GEMM will take, from its shape, its tiles and a few figures of the GPU.

A prior that sorts out, not a judge: whole plateaus of configurations get the same time. It adds up
what a program does (products, reads from shared memory, reads from L2, latency of a step), rounds
that up to waves of programs, and holds it against the bytes that the device memory must move.

Physics, checked against published times: tiles, waves, occupancy, bytes, the 64 rows that Hopper's
wide instruction always computes. Guesses, so marked where they stand: the shares of the peaks, the
latency of a step, the registers where nothing was compiled, all of split_k and float32.

Source: constants of our own, guessed, not fitted; `benchmarks/published_moe.py` holds the times
that they are checked against.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from ditune.db.moe import Dtype, LayerTiles, MoeShape, TileConfig
from ditune.kernels.gemm import ITEM_BYTES, Gemm, layer_gemms
from ditune.kernels.hardware import Gpu
from ditune.kernels.matrix_path import matrix_path, path_of

_LATENCY_US = 0.75  # of one load from device memory, what stages hide
_MMA_SYNC_SHARE = 0.55 / 0.80  # of a dense GEMM's rate on Hopper: its old instructions are slower
_L2_SHARE = 0.7  # of 64 bytes per clock and SM
_OVERLAP = 0.15  # of the shorter of compute and memory time that is not hidden
_ELEMENTWISE_SHARE = 0.7  # of the bandwidth, between the two GEMMs of a layer
_SMALL_LAUNCHES_US = 4 * 3.0  # routing, activation and combination of a layer
_REGISTERS = 65536  # of an SM


@dataclass(frozen=True)
class Resources:
    """What one program needs.

    Args:
        registers: Per thread.
        shared_bytes: Dynamic shared memory.
    """

    registers: int
    shared_bytes: int


@dataclass(frozen=True)
class Prediction:
    """What the model says of one grouped GEMM.

    Args:
        us: Time, infinite where no program fits on an SM.
        compute_us: Part of the products and of what feeds them.
        memory_us: Part of the device memory.
        bytes: Moved from and to the device memory.
        tiles: Programs that have work.
        padding: Rows that are computed over rows that are asked for, >= 1; 1 without rows.
        occupancy: Programs that share an SM.
        registers: Per thread.
        shared_bytes: Per program.
    """

    us: float
    compute_us: float
    memory_us: float
    bytes: int
    tiles: int
    padding: float
    occupancy: int
    registers: int
    shared_bytes: int


@dataclass(frozen=True)
class _Rows:
    """A routing cut into tiles of one height: of all its experts, or of the low or high ones.

    Args:
        height: Rows of a tile.
        rows: Rows of all experts.
        active: Experts that have any.
        tiles: Rows of tiles.
        experts: Experts by their rows of tiles, as pairs.
        groups: Rows of all groups of tiles by how many rows of tiles a group has, as pairs.
    """

    height: int
    rows: int
    active: int
    tiles: int
    experts: tuple[tuple[int, int], ...]
    groups: tuple[tuple[int, int], ...]


def estimate(config: TileConfig, dtype: Dtype, cc: int) -> Resources:
    """Return what a program will need, without compiling it.

    Shared memory is exact for 16-bit operands read by pointers and within 64 bytes with TMA; the
    registers are a guess that was right within some 10 % on what was compiled.

    Args:
        config: The tile; with `low_m` the larger of its two branches counts.
        dtype: Of the operands.
        cc: Compute capability.
    """
    path = matrix_path(config, dtype, cc)
    buffers = config.num_stages - (path in ("HMMA", "FFMA"))  # one stage lies in registers there
    sides = config.block_m + config.block_n
    shared = sides * config.block_k * ITEM_BYTES[dtype] * buffers
    if config.path != "ptr":
        shared += 24 + 8 * config.num_stages
    threads = 32 * config.num_warps
    held = config.block_m * config.block_n / threads
    if path == "HGMMA":
        registers = 1.06 * held + 42
    elif path == "UTCHMMA":
        registers = 0.9 * held + 40
    else:
        registers = 1.25 * held + 32 * sides / threads + 36
    return Resources(min(int(registers), 255), shared)


def occupancy(resources: Resources, num_warps: int, gpu: Gpu) -> int:
    """Return how many programs share an SM; 0 where not even one fits."""
    registers, shared = resources.registers, resources.shared_bytes
    too_many = registers > 255 or registers * 32 * num_warps > _REGISTERS
    if too_many or shared > gpu.cta_shared_bytes:
        return 0
    return min(
        _REGISTERS // (256 * math.ceil(max(registers, 1) * 32 / 256) * num_warps),
        gpu.sm_shared_bytes // (128 * math.ceil((shared + 1024) / 128)),
        gpu.sm_warps // num_warps,
        32,
    )


def predict(
    gemm: Gemm,
    counts: Sequence[int],
    config: TileConfig,
    gpu: Gpu,
    resources: Resources | None = None,
) -> Prediction:
    """Return how long one grouped GEMM will take.

    `order` and `path` change nothing but what `resources` say. Programs that stay have the
    occupancy that they ask for. A split depth has more and shorter programs, and pays for sums in
    float32: zeroed, added to by every program, and cast.

    Args:
        gemm: Its shape.
        counts: Rows of each expert, each >= 0; their number need not be `gemm.experts`.
        config: Tiles and launch.
        gpu: Where it runs.
        resources: Of the compiled kernel; None estimates them.
    """
    found = resources or estimate(config, gemm.dtype, gpu.cc)
    fit = occupancy(found, config.num_warps, gpu)
    fit = min(fit, config.persistent) if config.persistent else fit
    kinds = _kinds(tuple(counts), config.block_m, config.low_m, config.group_m)
    columns = math.ceil(gemm.n / config.block_n)
    tiles = sum(kind.tiles for kind in kinds) * columns * config.split_k
    rows = sum(kind.rows for kind in kinds)
    padding = sum(kind.tiles * kind.height for kind in kinds) / rows if rows else 1.0
    moved = _bytes(gemm, kinds, config, gpu, gpu.sms * max(fit, 1))
    if fit == 0:
        times = (math.inf, math.inf, math.inf)
    elif tiles == 0:
        times = (gpu.launch_us, 0.0, 0.0)
    else:
        compute = _compute_us(gemm, kinds, config, gpu, fit)
        rate = gpu.copy_share * gpu.gigabytes_per_s * 1e3  # bytes per us
        asked = min(tiles, gpu.sms * fit) * _in_flight(gemm, kinds, config) / _LATENCY_US
        memory = moved / min(rate, asked)
        # what few programs wait for is in their steps already: only full speed counts twice
        hidden = max(compute, memory) + _OVERLAP * min(compute, moved / rate)
        launches = 3 if config.split_k > 1 else 1
        times = (hidden + launches * gpu.launch_us, compute, memory)
    return Prediction(*times, moved, tiles, padding, fit, found.registers, found.shared_bytes)


def predict_layer(shape: MoeShape, counts: Sequence[int], tiles: LayerTiles, gpu: Gpu) -> float:
    """Return how long a whole layer will take, in microseconds: both GEMMs and what is between.

    Args:
        shape: Of the layer.
        counts: Rows of each expert.
        tiles: Of its two GEMMs.
        gpu: Where it runs.
    """
    up, down = layer_gemms(shape)
    gemms = predict(up, counts, tiles.up, gpu).us + predict(down, counts, tiles.down, gpu).us
    return gemms + between_us(shape, sum(counts), gpu)


def between_us(shape: MoeShape, rows: int, gpu: Gpu) -> float:
    """Return the time of a layer's work outside its GEMMs: routing, activation, combination."""
    values = rows * 3 * shape.inner + rows * shape.hidden + rows // shape.top_k * shape.hidden
    moved = values * ITEM_BYTES[shape.dtype]
    return moved / (_ELEMENTWISE_SHARE * gpu.gigabytes_per_s * 1e3) + _SMALL_LAUNCHES_US


@functools.lru_cache(maxsize=4096)  # a grid has hundreds of tiles, but few heights
def _kinds(counts: tuple[int, ...], block_m: int, low_m: int, group_m: int) -> tuple[_Rows, ...]:
    """Return the routing as tiles of one height, or of two for `low_m`, high ones first."""
    low = [count for count in counts if 0 < count <= low_m]
    high = [count for count in counts if count > low_m]
    pairs = [(block_m, high), (low_m, low)]
    return tuple(_cut(height, counts, group_m) for height, counts in pairs if counts)


def _cut(height: int, counts: Sequence[int], group_m: int) -> _Rows:
    experts, groups = Counter[int](), Counter[int]()
    for count in counts:
        whole, rest = divmod(count, height * group_m)
        experts[-(-count // height)] += 1
        groups[group_m] += whole * height * group_m
        groups[-(-rest // height)] += rest
    tiles = sum(each * number for each, number in experts.items())
    held = tuple((each, rows) for each, rows in groups.items() if rows)
    return _Rows(height, sum(counts), len(counts), tiles, tuple(experts.items()), held)


def _bytes(gemm: Gemm, kinds: Sequence[_Rows], config: TileConfig, gpu: Gpu, slots: int) -> int:
    """Return the bytes that the device memory moves while `slots` programs run at a time.

    What does not stay in the cache is read again, but programs that run at the same time ask for
    the same at the same time, and it is read once for all of them.
    """
    size = ITEM_BYTES[gemm.dtype]
    l2 = gpu.l2_mb * 2**20
    columns = math.ceil(gemm.n / config.block_n)
    programs = columns * config.split_k  # of one row of tiles
    weight = gemm.n * gemm.k * size
    reads = sum(kind.active for kind in kinds)
    if weight > 0.5 * l2:  # it is gone from the cache when the next group of tiles asks for it
        reads = sum(
            number * min(-(-each // config.group_m), _most_waves(each * programs, slots))
            for kind in kinds
            for each, number in kind.experts
        )
    rows = sum(kind.rows for kind in kinds)
    read = rows * gemm.k * size
    if read > 0.3 * l2:  # rows are asked for by every column of tiles, and do not all stay
        often = math.ceil(columns * config.block_n * gemm.k * size / (0.5 * l2))
        read = sum(
            held * gemm.k * size * min(often, _most_waves(each * programs, slots))
            for kind in kinds
            for each, held in kind.groups
        )
    written = rows * gemm.n * size
    if config.split_k > 1:  # a guess: every sum passes the memory once, and twice more to be cast
        written += rows * gemm.n * 4 * (config.split_k + 2)
    return reads * weight + read + written


def _most_waves(programs: int, slots: int) -> int:
    """Return the most waves that programs with successive numbers, one at least, can lie in."""
    return 1 + math.ceil((programs - 1) / slots)


def _in_flight(gemm: Gemm, kinds: Sequence[_Rows], config: TileConfig) -> float:
    """Return the bytes that one program has asked for and waits for, the mean over all tiles."""
    tiles = sum(kind.tiles for kind in kinds)
    height = sum(kind.tiles * kind.height for kind in kinds) / tiles
    step = (height + config.block_n) * config.block_k * ITEM_BYTES[gemm.dtype]
    return max(config.num_stages - 1, 1) * step


def _compute_us(
    gemm: Gemm, kinds: Sequence[_Rows], config: TileConfig, gpu: Gpu, fit: int
) -> float:
    """Return the time of all waves, of high tiles first.

    The last wave may be emptier, and low tiles begin where it leaves slots free.
    """
    columns = math.ceil(gemm.n / config.block_n) * config.split_k
    slots = gpu.sms * fit
    total = free = 0.0  # us, and slots times us
    for kind in kinds:
        each = _tile_us(gemm, kind.height, config, gpu, fit)
        waves, rest = divmod(max(0, kind.tiles * columns - int(free / each)), slots)
        last = 0.0
        if rest:
            last = _tile_us(gemm, kind.height, config, gpu, min(fit, math.ceil(rest / gpu.sms)))
        total += waves * each + last
        free = (slots - rest) * last
    return total


def _tile_us(gemm: Gemm, height: int, config: TileConfig, gpu: Gpu, together: int) -> float:
    """Return how long one program takes while `together` of them share an SM."""
    size = ITEM_BYTES[gemm.dtype]
    step, l2 = _step(gemm.dtype, height, config, gpu), _L2_SHARE * 64 * gpu.mhz
    read = (height + config.block_n) * config.block_k * size
    each = max(
        together * step,
        together * read / l2,
        _LATENCY_US / max(config.num_stages - 1, 1),
    )
    steps = math.ceil(math.ceil(gemm.k / config.block_k) / config.split_k)
    out = 4 if config.split_k > 1 else size
    return steps * each + _LATENCY_US + together * height * config.block_n * out / l2


def _step(dtype: Dtype, height: int, config: TileConfig, gpu: Gpu) -> float:
    """Return the time of one step's products in us, or of reading them from shared memory."""
    wide, narrow = height, config.block_n
    if config.swap_ab:
        wide, narrow = narrow, wide
    path = path_of(wide, config.num_warps, dtype, gpu.cc)
    rows = max(wide, {"HGMMA": 64, "UTCHMMA": 128}.get(path, 16))
    if path == "HGMMA":
        fed = float(rows + narrow)
    else:
        fed = rows * narrow / min(narrow, 64) + narrow * max(1.0, rows / 64)
    feed = fed * config.block_k * ITEM_BYTES[dtype]
    products = 2 * rows * narrow * config.block_k / _flops_per_us(path, gpu)
    return max(products, feed / (128 * gpu.mhz))


def _flops_per_us(path: str, gpu: Gpu) -> float:
    """Return what one SM computes per microsecond."""
    if path == "FFMA":  # a guess: float32 units at their boost clock
        lanes = 64 if gpu.cc == 80 else 128
        return gpu.dense_share * 2 * lanes * gpu.mhz
    share = _MMA_SYNC_SHARE if gpu.cc == 90 and path == "HMMA" else 1.0
    return share * gpu.dense_share * gpu.teraflops * 1e6 / gpu.sms
