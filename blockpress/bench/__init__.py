"""Speed: workloads on the engine beside floors and other programs; `gpu/` measures kernels and whole steps on a GPU."""
