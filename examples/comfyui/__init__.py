"""A ComfyUI node that splits a diffusion model over several GPUs of this machine.

Install fxpass into ComfyUI's Python and link this folder as `ComfyUI/custom_nodes/fxpass`. Put "Split over GPUs"
between the loader (after any LoRA) and the sampler. ComfyUI stays one process, on the GPU that it uses; the workers for
the others start with the first step, and end when the node is run with other values or its model is unloaded.

Where a model cannot be split (weights that ComfyUI keeps in the computer's memory for lack of GPU memory, patches that
draw random numbers), the sampler stops with an error that says why.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import fxpass

STRATEGIES = ("sync", "displaced", "compressed", "pcpp")


class Split:
    """Calls a diffusion model on several GPUs, in place of ComfyUI's own call.

    Args:
        options: of `fxpass.parallelize`.
        before: what another node has put around the call; it runs within this one.
    """

    def __init__(self, options: dict[str, Any], before: Callable[..., Any] | None) -> None:
        self._options = options
        self._before = before
        self._module: Any = None  #: the parallel module of the latest diffusion model
        self._sigmas: torch.Tensor | None = None  #: of the latest picture
        self._now = 0.0  #: the sigma of the latest call

    def __call__(self, apply_model: Callable[..., torch.Tensor], call: dict[str, Any]) -> torch.Tensor:
        """Called by the sampler for each call of the model, with the model's bound method `apply_model`."""
        model = apply_model.__self__  # type: ignore[attr-defined]
        whole = model.diffusion_model
        if self._module is None or self._module.unwrapped is not whole:
            self.close()
            self._module = fxpass.parallelize(whole, executor="spawn", **self._options)
        self._begin(model, call["c"].get("transformer_options", {}).get("sample_sigmas"), call["timestep"])
        model.diffusion_model = self._module
        try:
            if self._before is not None:
                return self._before(apply_model, call)
            return apply_model(call["input"], call["timestep"], **call["c"])
        except BaseException:
            self.close()  # the next picture begins with new workers
            raise
        finally:
            model.diffusion_model = whole

    def _begin(self, model: Any, sigmas: torch.Tensor | None, sigma: torch.Tensor) -> None:
        """Announce a picture with its timesteps, if this is its first call.

        A new picture brings other sigmas, or begins with the first of the same ones again: a cached node gives them out
        twice. Samplers also call at sigmas between them, and at one twice.
        """
        if sigmas is None:
            return
        before, self._now = self._now, sigma.max().item()
        if sigmas is not self._sigmas or before < self._now >= sigmas[0].item():
            self._sigmas = sigmas
            self._module.reset(model.model_sampling.timestep(sigmas[:-1]).tolist())

    def close(self) -> None:
        """End the workers."""
        if self._module is not None:
            self._module.close()
        self._module = self._sigmas = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Split:
        return self  # ComfyUI copies a model's options for each node; all copies drive the same workers


class SplitOverGPUs:
    """The node: the same model, which runs on several GPUs."""

    CATEGORY = "advanced/model"
    DESCRIPTION = "Splits a diffusion model over the GPUs of this machine (fxpass)."
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "split"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - ComfyUI asks for this name
        return {
            "required": {
                "model": ("MODEL",),
                "gpus": ("INT", {"default": 2, "min": 2, "max": 64}),
                "guidance": (
                    "BOOLEAN",
                    {"default": False, "tooltip": "positive and negative prompt on different GPUs: exact, no strategy"},
                ),
                "strategy": (list(STRATEGIES), {"tooltip": "sync is exact; the others are faster and a little off"}),
                "compile": ("BOOLEAN", {"default": False, "tooltip": "faster steps; the first ones take minutes"}),
            }
        }

    def split(self, model: Any, gpus: int, guidance: bool, strategy: str, compile: bool) -> tuple[Any]:  # noqa: A002
        """The model with its calls split."""
        patched = model.clone()
        options = {"world_size": gpus, "cfg": 2 if guidance else 1, "strategy": strategy, "compile": compile}
        before = patched.model_options.get("model_function_wrapper")
        patched.set_model_unet_function_wrapper(Split(options, before))
        return (patched,)


NODE_CLASS_MAPPINGS = {"FxpassSplitOverGPUs": SplitOverGPUs}
NODE_DISPLAY_NAME_MAPPINGS = {"FxpassSplitOverGPUs": "Split over GPUs (fxpass)"}
