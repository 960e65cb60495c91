"""Every tile of every kernel: typed data by architecture, and why each number is what it is.

`of` picks them by compute capability. A GPU that is not listed gets the tiles of sm_86, which run everywhere: they need
the least shared memory and load through pointers. The tiles of sm_90 were measured on an H200; the others follow from
the limits in the comments and from `python -m benchmarks.compile_report` (no spills, shared memory within the limit).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# The larger GEMM tile is faster where at least this share of the multiprocessors has a tile to compute, on average over
# the rounds (measured on an H200 at 8192x4096x4096).
_FULL = 0.93
MAX_RANK_BLOCK = 64  # ranks that a program holds: registers for an accumulator of 64 columns beside the GEMM's


def rank_block(R: int) -> int:
    """R padded to a power of two that matrix instructions take, at most MAX_RANK_BLOCK."""
    return min(MAX_RANK_BLOCK, max(16, 1 << (R - 1).bit_length()))


def cdiv(a: int, b: int) -> int:
    """a / b rounded up. Triton's own costs the host 2 us a call."""
    return -(-a // b)


class Gemm(NamedTuple):
    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int
    descriptors: bool = False  # load and store through the tensor memory accelerator
    persistent: bool = False  # one program for each multiprocessor, and each computes many tiles
    GROUP_M: int = 8  # blocks of rows that share columns of W: their tiles fit into every L2
    max_registers: int | None = None  # 255 where ptxas would spill a few bytes for an occupancy that nothing uses


class OnePass(NamedTuple):
    """The tiles of `one_pass`, the forward that sums Z beside h: Z's columns take registers and shared memory too.

    None of them was measured.
    """

    plain: Gemm
    few: Gemm | None = None  # for outputs where `plain` leaves many multiprocessors idle in the last round
    many: Gemm | None = None  # for more than half of MAX_RANK_BLOCK ranks; None: `plain` and `few`
    dropping: Gemm | None = None  # under input dropout; None: `plain`
    dropping_many: Gemm | None = None  # both; None: `dropping`, `many` or `plain`, the first that there is


class Skinny(NamedTuple):
    BLOCK_ROWS: int
    BLOCK_COLUMNS: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None


class Reduce(NamedTuple):
    BLOCK_E: int  # elements a program sums over BLOCK_P partials at a time
    BLOCK_P: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None


class Tiles(NamedTuple):
    """One configuration of each kernel. BLOCK_ROWS and BLOCK_COLUMNS are those of the wide operand: x, G or W0."""

    gemm: Gemm
    one_pass: OnePass
    down: Skinny
    grad_z: Skinny
    sum_rows: Skinny  # a row of its tile is one line of 128 bytes
    through: Skinny
    reduce: Reduce  # and every other kernel that works element by element
    # The effective form's W, not measured. Its blocks have few columns, 64 bytes a row, so that there are many of them.
    effective: Skinny
    rebuild: Skinny
    gemm_few: Gemm | None = None  # for outputs where `gemm` leaves many multiprocessors idle in the last round
    fused_from: int | None = None  # columns of output from which on `gemm` was measured to beat cuBLAS; None: nowhere
    # Columns of output up to which `hybrid` reads x once in its forward too; None: nowhere. No architecture sets it: at
    # 25216x4096x1024 on an H200 the first form of `one_pass` took 372 us, `down` and cuBLAS 351, `down` and `gemm` 338
    # later, and today's form was not measured.
    once_up_to: int | None = None
    # Of down, sum_rows and dx's gemm under input dropout, which needs more registers; None: the same. Not measured.
    down_dropping: Skinny | None = None
    sum_rows_dropping: Skinny | None = None
    gemm_dropping: Gemm | None = None

    def fuses(self, N: int, R: int) -> bool:
        """Whether an output of N columns is faster from `gemm` than from cuBLAS and a second pass over the output."""
        return self.fused_from is not None and self.fused_from <= N and R <= MAX_RANK_BLOCK

    def reads_once(self, N: int, R: int) -> bool:
        """Whether `hybrid` computes an output of N columns in `one_pass`."""
        return self.once_up_to is not None and self.once_up_to >= N and R <= MAX_RANK_BLOCK

    def under(self, input_dropout: bool) -> Tiles:
        """These tiles, or those of the kernels that have input dropout."""
        if not input_dropout:
            return self
        down, sum_rows = self.down_dropping or self.down, self.sum_rows_dropping or self.sum_rows
        few = self.gemm_few if self.gemm_dropping is None else None
        return self._replace(down=down, sum_rows=sum_rows, gemm=self.gemm_dropping or self.gemm, gemm_few=few)


class Architecture(NamedTuple):
    """The tiles of one architecture, one set for each kind of operands."""

    name: str
    half: Tiles  # aligned float16 and bfloat16
    tf32: Tiles  # aligned float32 in tf32
    small: Tiles  # all else: elements are loaded one by one, or products run without matrix instructions
    multiprocessors: int
    early: bool = False  # programmatic dependent launch; nobody sets it until it is measured

    @property
    def programs(self) -> int:
        """How many keep memory busy: two on each multiprocessor, on an H200 up to 30 % faster than one."""
        return 2 * self.multiprocessors

    @property
    def can_start_early(self) -> bool:
        return self.name.startswith("sm_") and int(self.name.removeprefix("sm_")) >= 90

    def with_early_launches(self) -> Architecture:
        """With programmatic dependent launch: a kernel's launch is hidden behind the kernel before it."""
        if not self.can_start_early:
            raise ValueError(f"programmatic dependent launch needs sm_90 or later, and these tiles are of {self.name}")
        return self._replace(early=True)

    def tiles(self, dtype: torch.dtype, precision: str, operands: list[Tensor]) -> Tiles:
        """For products of these operands (W0, x, G) in dtype and precision ("ieee" or "tf32")."""
        if not all(map(aligned, operands)) or (dtype == torch.float32 and precision == "ieee"):
            return self.small
        return self.tf32 if dtype == torch.float32 else self.half

    def gemm(self, tiles: Tiles, M: int, N: int) -> Gemm:
        """Which GEMM of the tiles computes an output [M, N]."""
        return self._filling(tiles.gemm, tiles.gemm_few, M, N)

    def one_pass(self, tiles: Tiles, M: int, N: int, R: int, input_dropout: bool) -> Gemm:
        """Which tile of `one_pass` computes an output [M, N] and R columns of Z."""
        plain, few, many, dropping, dropping_many = tiles.one_pass
        of_many = 2 * R > MAX_RANK_BLOCK
        if input_dropout:
            return (of_many and (dropping_many or dropping or many)) or dropping or plain
        return (of_many and many) or self._filling(plain, few, M, N)

    def _filling(self, gemm: Gemm, few: Gemm | None, M: int, N: int) -> Gemm:
        """The larger tile gemm where it gives all multiprocessors work for an output [M, N], else few."""
        if few is None:
            return gemm
        count = cdiv(M, gemm.BLOCK_M) * cdiv(N, gemm.BLOCK_N)
        rounds = cdiv(count, self.multiprocessors)
        return gemm if count >= _FULL * rounds * self.multiprocessors else few

    def with_each_gemm(self) -> list[Architecture]:
        """For checks: this architecture with its larger GEMM tiles for every output, and with those for few."""
        half, once = self.half, self.half.one_pass
        found = [self._replace(half=half._replace(gemm_few=None, one_pass=once._replace(few=None)))]
        if half.gemm_few is not None and once.few is not None:
            of_few = half._replace(gemm=half.gemm_few, one_pass=once._replace(plain=once.few))
            found.append(found[0]._replace(half=of_few._replace(gemm_few=None)))
        return found

    def splits(self, tiles: Tiles, M: int, K: int) -> int:
        """Into how many ranges sum_rows divides the M rows: as few as give `programs` programs."""
        columns = cdiv(K, tiles.sum_rows.BLOCK_COLUMNS)
        return max(1, min(cdiv(self.programs, columns), cdiv(M, tiles.sum_rows.BLOCK_ROWS)))

    def splits_of_columns(self, tiles: Tiles, N: int, K: int) -> int:
        """Into how many ranges through_weight divides the K columns, likewise."""
        return min(cdiv(self.programs, cdiv(N, tiles.through.BLOCK_ROWS)), cdiv(K, tiles.through.BLOCK_COLUMNS))

    def splits_of_effective(self, tiles: Tiles, N: int, K: int) -> int:
        """Into how many ranges effective divides the N rows, likewise."""
        blocks = cdiv(K, tiles.effective.BLOCK_COLUMNS)
        return max(1, min(cdiv(self.programs, max(1, blocks)), cdiv(N, tiles.effective.BLOCK_ROWS)))


def aligned(t: Tensor) -> bool:
    """Whether wide loads and the tensor memory accelerator can take t: fewer than 2^31 rows of whole 16-byte lines.

    The stride must be a multiple of 16 elements: that is all that Triton's compiler is told of it.
    """
    lines = t.stride(0) % 16 == 0 and t.data_ptr() % 16 == 0 and t.numel() > 0
    return lines and t.stride(1) == 1 and t.stride(0) >= t.shape[1] and t.shape[0] < 2**31


# gemm has 32 rows: from 64 on, Triton 3.6 compiles full fp32 to tf32 on sm_100 and sm_103 (its tcgen05 path overlooks
# the precision). down and grad_z have 8 warps: with fewer, tiles of R = 64 in full fp32 would spill; so would one_pass
# with more rows than 16.
_SMALL = Tiles(
    gemm=Gemm(32, 64, 16, 4, 3, max_registers=255),
    one_pass=OnePass(Gemm(32, 64, 16, 4, 3, max_registers=255), many=Gemm(16, 64, 16, 8, 3, max_registers=255)),
    down=Skinny(32, 32, 8, 2, max_registers=255),
    grad_z=Skinny(32, 32, 8, 2, max_registers=255),
    sum_rows=Skinny(32, 32, 4, 2),
    through=Skinny(32, 64, 4, 2, max_registers=255),
    reduce=Reduce(128, 32, 4, 1),
    effective=Skinny(64, 32, 8, 2, max_registers=255),
    rebuild=Skinny(32, 32, 8, 1, max_registers=255),
)
# Tiles of 128 x 128 and 64 ranks would spill in one_pass.
_HALF = Tiles(
    gemm=Gemm(128, 128, 32, 8, 4),
    one_pass=OnePass(Gemm(128, 128, 32, 8, 4), many=Gemm(64, 128, 32, 8, 4), dropping_many=Gemm(32, 128, 32, 8, 4)),
    down=Skinny(64, 64, 4, 4),
    grad_z=Skinny(64, 64, 4, 4),
    sum_rows=Skinny(128, 64, 4, 3),
    through=Skinny(64, 64, 4, 4, max_registers=255),
    reduce=Reduce(128, 32, 4, 1),
    effective=Skinny(128, 32, 8, 3),
    rebuild=Skinny(64, 64, 4, 1),
    sum_rows_dropping=Skinny(64, 64, 8, 3),
)
# Elements of 4 bytes: a line holds half as many columns.
_TF32 = _HALF._replace(
    gemm=Gemm(128, 128, 16, 8, 3, max_registers=255),
    one_pass=OnePass(
        Gemm(128, 128, 16, 8, 3, max_registers=255),
        many=Gemm(64, 128, 16, 8, 3, max_registers=255),
        dropping_many=Gemm(32, 128, 16, 8, 3, max_registers=255),
    ),
    down=Skinny(64, 32, 4, 3),
    grad_z=Skinny(64, 32, 4, 3, max_registers=255),
    sum_rows=Skinny(64, 32, 4, 3),
    through=Skinny(64, 64, 4, 3, max_registers=255),
    effective=Skinny(64, 32, 8, 3, max_registers=255),
    rebuild=Skinny(64, 64, 4, 1),
    sum_rows_dropping=None,
)

# Compiled by Triton 3.8 for these architectures, reduce would spill 8 bytes.
_REDUCE = Reduce(128, 32, 4, 1, max_registers=255)
# 164 KiB of shared memory on each of 108 multiprocessors.
SM80 = Architecture(
    "sm_80",
    _HALF._replace(reduce=_REDUCE),
    _TF32._replace(reduce=_REDUCE),
    _SMALL._replace(reduce=_REDUCE),
    multiprocessors=108,
)
# 100 KiB of shared memory: one stage less.
SM86 = SM80._replace(
    name="sm_86",
    half=SM80.half._replace(
        gemm=Gemm(128, 128, 32, 8, 3),
        one_pass=OnePass(Gemm(128, 128, 32, 8, 3), many=Gemm(64, 128, 32, 8, 3), dropping_many=Gemm(32, 128, 32, 8, 3)),
    ),
    multiprocessors=128,
)
# wgmma takes 128 x 256 with two warpgroups, loaded by the tensor memory accelerator; 227 KiB of shared memory.
SM90 = Architecture(
    "sm_90",
    _HALF._replace(
        gemm=Gemm(128, 256, 64, 8, 3, descriptors=True, persistent=True, GROUP_M=16),
        gemm_few=Gemm(128, 128, 64, 4, 3, descriptors=True),
        one_pass=OnePass(
            Gemm(128, 256, 64, 8, 3, descriptors=True, persistent=True, GROUP_M=16),
            few=Gemm(128, 128, 64, 8, 3, descriptors=True),
            dropping=Gemm(128, 128, 64, 8, 3, descriptors=True),
        ),
        down=Skinny(64, 128, 4, 4),
        grad_z=Skinny(64, 128, 4, 4),
        fused_from=1024,
        down_dropping=_HALF.down,
        gemm_dropping=Gemm(128, 128, 64, 4, 3, descriptors=True),
    ),
    _TF32,
    _SMALL,
    multiprocessors=132,
)
# The accumulators live in tensor memory, so registers leave room for a wide tile; 227 KiB of shared memory.
SM100 = Architecture(
    "sm_100",
    _HALF._replace(
        gemm=Gemm(128, 128, 64, 8, 3, descriptors=True, max_registers=255),
        one_pass=OnePass(Gemm(128, 128, 64, 8, 3, descriptors=True, max_registers=255)),
    ),
    _TF32,
    _SMALL,
    multiprocessors=148,
)
# It has the shared memory and the matrix instructions of sm_86; descriptors would cost a stack frame.
SM120 = SM86._replace(name="sm_120", multiprocessors=170)
# So small that the shapes of tests have several tiles in each direction, and a remainder.
_TINY = Tiles(
    gemm=Gemm(32, 32, 16, 1, 1, descriptors=True, persistent=True, GROUP_M=2),
    one_pass=OnePass(Gemm(32, 32, 16, 1, 1, descriptors=True, persistent=True, GROUP_M=2)),
    down=Skinny(32, 32, 1, 1),
    grad_z=Skinny(32, 32, 1, 1),
    sum_rows=Skinny(16, 32, 1, 1),
    through=Skinny(16, 32, 1, 1),
    reduce=Reduce(128, 4, 1, 1),
    effective=Skinny(32, 16, 1, 1),
    rebuild=Skinny(32, 32, 1, 1),
)
_TINY_GEMM = _TINY.gemm._replace(descriptors=False, persistent=False)
_TINY_POINTERS = _TINY._replace(gemm=_TINY_GEMM, one_pass=OnePass(_TINY_GEMM))
INTERPRETER = Architecture("interpreter", _TINY, _TINY, _TINY_POINTERS, multiprocessors=2)

BY_CAPABILITY = {
    **{(8, 0): SM80, (8, 6): SM86, (8, 9): SM86, (9, 0): SM90},
    **{(10, 0): SM100, (10, 3): SM100, (12, 0): SM120, (12, 1): SM120},
}


def of(capability: tuple[int, int] | None) -> Architecture:
    """The tiles for a compute capability; None is the interpreter."""
    return INTERPRETER if capability is None else BY_CAPABILITY.get(capability, SM86)
