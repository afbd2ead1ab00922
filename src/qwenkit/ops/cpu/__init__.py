"""The native CPU library: C++ kernels behind a plain C interface, loaded with ctypes, so it depends on no torch version.

library.py finds and opens it, program.py describes operations as data and records them, native.py gives the ops of
`ops/reference.py` on torch tensors. Where it was not built (no compiler, another processor), the reference runs.
"""
