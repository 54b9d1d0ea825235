"""A kernel of an operator that another module defines, for test_operators.py."""

from torch import Tensor

from .custom_operators import doubled


@doubled.register_kernel("cpu")
def doubled_on_the_cpu(x: Tensor) -> Tensor:
    return x + x
