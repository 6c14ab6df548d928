"""Blocks of GGUF's K types with random bits, and the weights that the gguf package unpacks from them.

    python make_k_blocks.py OUTPUT

Two blocks of each of Q4_K, Q5_K and Q6_K: the bytes of both, then 512 float32 numbers, little-endian.
Needs gguf and numpy.
"""
import sys

import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize

# Where the float16 scales of a block lie, and its bytes.
LAYOUT = {Type.Q4_K: ([0, 2], 144), Type.Q5_K: ([0, 2], 176), Type.Q6_K: ([208], 210)}


def main():
    rng = np.random.default_rng(1)
    with open(sys.argv[1], "wb") as out:
        for kind, (scales, size) in LAYOUT.items():
            blocks = rng.integers(0, 256, (2, size), dtype=np.uint8)
            for at in scales:
                # Random bits could be no number.
                blocks[:, at:at + 2] = rng.normal(0, 0.01, (2, 1)).astype(np.float16).view(np.uint8)
            out.write(blocks.tobytes())
            out.write(dequantize(blocks, kind).astype("<f4").tobytes())


if __name__ == "__main__":
    main()
