"""Twins of the contract's codec in vector code: the same bytes at the speed of memory.

    ir        the language: Vector, Array, FunctionBuilder; starts with an example
    jit       Kernel: what was written, compiled at its first call
    rounding  steps that every format needs: magnitudes, rounding to a small float, errors
    layouts   where a storage order puts an element
    mx        fp8     nvfp4   rows of a weight to codes and scales
    feedback  the inner loop of convert_ckpt/methods/gptq.py

To add the kernel of a format: write its reference in torch first (run_ckpt/contract/codec.py), as tests compare every
byte with it. Then a file here with one function on a slab, whole rows of numpy bits: it finds the scales and encodes
in one pass over each row, rounds with ``round_to``, places bytes with ``storage_index``, adds up ``RowErrors``, and
calls a Kernel made by a cached function of what is known before (element type, rule, layout). convert_ckpt/run/slab.py
calls it; tests/test_kernels.py gets its inputs (ties, subnormals, every amax) for the new format. A float operation
must have one order, or bits differ between machines: add up in a fixed number of lanes, and fold by halves.
"""
