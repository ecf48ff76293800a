"""A small interpreter of PTX: the kernels as the compilers left them, run and checked without a GPU.

`parser` reads the text, `arithmetic` has the instructions that stay in registers, `effects` those that do not, `memory`
and `clocks` check every access, `machine` runs warps and blocks in random interleavings. `triton_kernels` and
`cuda_kernels` hand it the launches of the two backends as they are.
"""
