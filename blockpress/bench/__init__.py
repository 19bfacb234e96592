"""Speed: workloads on the engine against rooflines and other programs; `gpu/`: kernels and whole steps on a GPU."""
