"""Tile sizes, warps and row splits, in one table; nothing is tuned on the hot path."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """``block`` columns a step of the loop (forward) or a program (backward), by ``num_warps`` warps."""

    block: int
    num_warps: int
    measured: str


# (pass, bytes per logit) -> tile. A thread loads 16 bytes at a time, so a warp covers 512 bytes.
TILES: dict[tuple[str, int], Tile] = {
    ("forward", 2): Tile(block=8192, num_warps=8, measured="not measured yet"),
    ("forward", 4): Tile(block=4096, num_warps=8, measured="not measured yet"),
    ("forward", 8): Tile(block=2048, num_warps=8, measured="not measured yet"),
    ("backward", 2): Tile(block=4096, num_warps=8, measured="not measured yet"),
    ("backward", 4): Tile(block=2048, num_warps=8, measured="not measured yet"),
    ("backward", 8): Tile(block=1024, num_warps=8, measured="not measured yet"),
}

# Programs that keep a multiprocessor busy: with fewer rows than this per multiprocessor, rows are split.
# Not measured yet.
ROWS_PER_MULTIPROCESSOR = 4
MAX_SPLITS = 32


def tile_for(pass_name: str, itemsize: int, vocab_size: int) -> Tile:
    """The table's row, its block no wider than the vocabulary needs (a power of two, at least 128)."""
    tile = TILES[pass_name, itemsize]
    needed = max(128, 1 << (vocab_size - 1).bit_length())
    return tile if needed >= tile.block else Tile(needed, min(tile.num_warps, max(1, needed // 256)), tile.measured)


def row_splits(num_rows: int, vocab_size: int, block: int, multiprocessors: int) -> int:
    """Programs a row. More than one only where the rows alone would leave multiprocessors idle."""
    wanted = -(-ROWS_PER_MULTIPROCESSOR * multiprocessors // max(1, num_rows))
    useful = -(-vocab_size // (2 * block))  # a split of less than two tiles costs more than it brings
    return max(1, min(wanted, useful, MAX_SPLITS))
