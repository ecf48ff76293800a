"""Tile sizes, warps and row splits, in one table; nothing is tuned on the hot path."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

# AMD's data centre GPUs have 64 lanes a warp.
LANES_OF_A_WARP = 64 if torch.version.hip else 32


@dataclass(frozen=True)
class Tile:
    """``block`` columns a step of the loop (forward) or a program (backward), by ``num_warps`` warps of 32 lanes."""

    block: int
    num_warps: int
    measured: str
    max_registers: int | None = None
    """A thread may use; 64 let four programs of 256 threads onto a multiprocessor of an NVIDIA GPU at once."""

    @property
    def threads(self) -> int:
        return 32 * self.num_warps

    def launch_options(self, lanes: int = LANES_OF_A_WARP) -> dict[str, int]:
        """Triton's options of a launch, on a GPU whose warps have so many lanes."""
        options = {"num_warps": max(1, self.threads // lanes)}
        if self.max_registers is not None and lanes == 32:
            options["maxnreg"] = self.max_registers  # Triton's AMD backend has no such option
        return options


# (pass, bytes per logit) -> tile. A thread loads 16 bytes at a time and has four such loads in flight; in float64 two,
# because exp2() takes the registers.
TILES: dict[tuple[str, int], Tile] = {
    ("forward", 2): Tile(block=8192, num_warps=8, measured="not measured yet", max_registers=64),
    ("forward", 4): Tile(block=4096, num_warps=8, measured="not measured yet", max_registers=64),
    ("forward", 8): Tile(block=1024, num_warps=8, measured="not measured yet"),
    ("backward", 2): Tile(block=8192, num_warps=8, measured="not measured yet"),
    ("backward", 4): Tile(block=4096, num_warps=8, measured="not measured yet"),
    ("backward", 8): Tile(block=1024, num_warps=8, measured="not measured yet"),
}

# Rows, or parts of rows, for each multiprocessor, which has four at a time: with fewer, rows are split, because the
# last of them would leave most multiprocessors idle. Not measured yet.
ROWS_PER_MULTIPROCESSOR = 16
MAX_SPLITS = 32


def tile_for(pass_name: str, itemsize: int, vocab_size: int, strided: bool = False) -> Tile:
    """The table's row, its block no wider than the vocabulary needs (a power of two, at least 128).

    ``strided``: columns are not neighbours, and each takes a load and registers for its address.
    """
    tile = TILES[pass_name, itemsize]
    if strided:
        tile = replace(tile, block=max(128, tile.block // 4))
    needed = max(128, 1 << (vocab_size - 1).bit_length())
    if needed >= tile.block:
        return tile
    return replace(tile, block=needed, num_warps=min(tile.num_warps, max(1, needed // 256)))


def row_splits(num_rows: int, vocab_size: int, block: int, multiprocessors: int) -> int:
    """Programs a row. More than one only where the rows alone would leave multiprocessors idle."""
    wanted = -(-ROWS_PER_MULTIPROCESSOR * multiprocessors // max(1, num_rows))
    useful = -(-vocab_size // (2 * block))  # a split of less than two tiles costs more than it brings
    return max(1, min(wanted, useful, MAX_SPLITS))
