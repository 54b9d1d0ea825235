"""Operators as users register them, for test_operators.py."""

import os
import sys

import torch
from torch import Tensor


@torch.library.custom_op("fxpass_test::doubled", mutates_args=())
def doubled(x: Tensor) -> Tensor:
    return x * 2


doubled.register_fake(torch.empty_like)

library = torch.library.Library("fxpass_test_library", "DEF")
library.define("tripled(Tensor x) -> Tensor")
library.impl("tripled", lambda x: x * 3, "CompositeExplicitAutograd")
torch.library.register_fake("fxpass_test_library::tripled", torch.empty_like, lib=library)

IN_A_WORKER = "fxpass.runtime.worker" in sys.orig_argv
if IN_A_WORKER and "FXPASS_TEST_RAISE" in os.environ:
    raise ImportError("no licence for this machine")
if IN_A_WORKER and "FXPASS_TEST_EXIT" in os.environ:
    os._exit(3)
