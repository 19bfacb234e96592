"""Operations of a forward in C++ (`native/forward.cpp`): products fused with the steps around them, and whole layers.

    products.py    x @ weight^T, and share @ weight
    experts.py     routed experts
    attention.py   a flat batch over pieces of keys and values
    layer.py       both halves of a layer, one call each

Weights are read as they are stored (float32, bfloat16, float16, codes) and multiplied in the activations' type. Every
caller has a plain version, and calls `supports` first.

Invariant: each gives what the plain version gives, within float32 rounding of the sums. Without gradients only.
Run it:  python -m pytest tests/ops/test_cpu.py
"""
