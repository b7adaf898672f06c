"""A tiny Triton kernel with a known answer: does Triton work here at all?

Without CUDA it runs in Triton's interpreter, which is chosen when triton is imported; ``doctor`` therefore runs this
file as a process of its own with TRITON_INTERPRET=1: ``python -m lowbit_lightning.commands.triton_self_test``.
"""

import torch
import triton
import triton.language as tl

SIZE = 1000  # no multiple of the block: the masked tail is part of the test


@triton.jit
def _pack_pairs(codes, packed, pairs, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Two 4-bit codes to a byte: integer arithmetic, as in every state of this package."""
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < pairs
    low = tl.load(codes + 2 * offsets, mask=inside, other=0)
    high = tl.load(codes + 2 * offsets + 1, mask=inside, other=0)
    tl.store(packed + offsets, low | (high << 4), mask=inside)


def self_test() -> str:
    """Run the kernel and compare.

    Returns:
        ``"passed on cuda"`` or ``"passed in the interpreter"``.

    Raises:
        AssertionError: The kernel ran and its answer is wrong.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    codes = torch.arange(2 * SIZE, device=device, dtype=torch.int32).remainder(16).to(torch.uint8)
    packed = torch.zeros(SIZE, device=device, dtype=torch.uint8)
    _pack_pairs[(triton.cdiv(SIZE, 256),)](codes, packed, SIZE, BLOCK=256)
    if not torch.equal(packed, codes[0::2] | (codes[1::2] << 4)):
        raise AssertionError("the kernel ran and its answer is wrong")
    return "passed on cuda" if device == "cuda" else "passed in the interpreter"


if __name__ == "__main__":
    print(self_test())
