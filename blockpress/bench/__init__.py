"""Speed: `gpu/` measures kernels and whole steps on a GPU, over their floors."""
