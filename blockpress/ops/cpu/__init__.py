"""Operations of a forward in C++ (`native/forward.cpp`): products with their neighbours taken in, and whole layers.

    products.py    a matrix, and the mean row of one under probabilities
    experts.py     routed experts
    attention.py   a flat batch over pieces of keys and values
    layer.py       both halves of a layer, one call each

Weights are read as they are stored (float32, bfloat16, float16) and multiplied in the activations' type. What is
called here has a plain version beside the caller, which asks `supports` first.

Invariant: each gives what the plain version gives, within float32 rounding of the sums. Without gradients only.
Run it:  python -m pytest tests/ops/test_cpu.py
"""
