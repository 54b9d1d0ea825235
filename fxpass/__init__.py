"""Make any diffusion denoiser patch-parallel."""
