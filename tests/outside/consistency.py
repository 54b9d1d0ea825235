"""A consistency model in pixel space: a network preconditioned by scalings of sigma, with a dict as its result."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Positional(nn.Module):
    def __init__(self, channels: int, max_positions: int = 10000) -> None:
        super().__init__()
        self.channels, self.max_positions = channels, max_positions

    def forward(self, x: Tensor) -> Tensor:
        freqs = torch.arange(start=0, end=self.channels // 2, dtype=torch.float32, device=x.device)
        freqs = (1 / self.max_positions) ** (freqs / (self.channels // 2))
        x = x.ger(freqs.to(x.dtype))
        return torch.cat([x.cos(), x.sin()], dim=1)


class FilteredConv(nn.Module):
    """A convolution that resamples by a fixed filter, written as grouped convolutions."""

    def __init__(self, inside: int, out: int, kernel: int, up: bool = False, down: bool = False) -> None:
        super().__init__()
        self.inside, self.out, self.up, self.down = inside, out, up, down
        self.weight = nn.Parameter(torch.randn(out, inside, kernel, kernel) / np.sqrt(inside * kernel**2))
        self.bias = nn.Parameter(torch.zeros(out))
        f = torch.as_tensor([1.0, 3.0, 3.0, 1.0])
        self.register_buffer("resample_filter", f.ger(f).unsqueeze(0).unsqueeze(1) / f.sum().square())

    def forward(self, x: Tensor) -> Tensor:
        resample_filter: Tensor = self.resample_filter  # pyright: ignore[reportAssignmentType]
        w, f = self.weight.to(x.dtype), resample_filter.to(x.dtype)
        pad = (f.shape[-1] - 1) // 2
        if self.up:
            f = f.mul(4).tile([self.inside, 1, 1, 1])
            x = F.conv_transpose2d(x, f, groups=self.inside, stride=2, padding=pad)
        if self.down:
            x = F.conv2d(x, f.tile([self.inside, 1, 1, 1]), groups=self.inside, stride=2, padding=pad)
        x = F.conv2d(x, w, padding=w.shape[-1] // 2)
        return x.add_(self.bias.to(x.dtype).reshape(1, -1, 1, 1))


class UNetBlock(nn.Module):
    def __init__(self, inside: int, out: int, emb: int, *, up: bool = False, down: bool = False, heads: int = 0):
        super().__init__()
        self.heads, self.skip_scale = heads, np.sqrt(0.5)
        self.norm0, self.norm1 = nn.GroupNorm(4, inside, eps=1e-6), nn.GroupNorm(4, out, eps=1e-6)
        self.conv0 = FilteredConv(inside, out, 3, up, down)
        self.affine = nn.Linear(emb, out * 2)
        self.conv1 = FilteredConv(out, out, 3)
        self.skip = FilteredConv(inside, out, 1, up, down)
        if heads:
            self.norm2 = nn.GroupNorm(4, out, eps=1e-6)
            self.qkv, self.proj = FilteredConv(out, out * 3, 1), FilteredConv(out, out, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        orig = x
        x = self.conv0(F.silu(self.norm0(x)))
        scale, shift = self.affine(emb).unsqueeze(2).unsqueeze(3).to(x.dtype).chunk(chunks=2, dim=1)
        x = F.silu(torch.addcmul(shift, self.norm1(x), scale + 1))
        x = self.conv1(F.dropout(x, p=0.1, training=self.training))
        x = x.add_(self.skip(orig))
        x = x * self.skip_scale
        if self.heads:
            b, c = x.shape[:2]
            q, k, v = self.qkv(self.norm2(x)).reshape(b * self.heads, c // self.heads, 3, -1).unbind(2)
            attn = torch.einsum("ncq,nck->nqk", q, k / np.sqrt(k.shape[1])).softmax(dim=2)
            a = torch.einsum("nqk,nck->ncq", attn, v)
            x = self.proj(a.reshape(*x.shape)).add_(x)
            x = x * self.skip_scale
        return x


class Net(nn.Module):
    def __init__(self, width: int = 16, emb: int = 24, labels: int = 4) -> None:
        super().__init__()
        self.map_noise = Positional(width)
        self.map_layer = nn.Linear(width, emb)
        self.map_label = nn.Linear(labels, emb, bias=False)
        self.first = FilteredConv(3, width, 3)
        self.enc = nn.ModuleList([UNetBlock(width, width, emb), UNetBlock(width, 2 * width, emb, down=True, heads=2)])
        self.dec = nn.ModuleList(
            [UNetBlock(2 * width, 2 * width, emb, heads=1), UNetBlock(4 * width, width, emb, up=True)]
        )
        self.last = UNetBlock(2 * width, width, emb)
        self.out = nn.Sequential(nn.GroupNorm(4, width), nn.SiLU(), FilteredConv(width, 3, 3))

    def forward(self, x: Tensor, noise_labels: Tensor, class_labels: Tensor | None) -> Tensor:
        emb = self.map_noise(noise_labels)
        emb = emb.reshape(emb.shape[0], 2, -1).flip(1).reshape(*emb.shape)  # swap sin and cos
        emb = self.map_layer(emb)
        if class_labels is not None:
            emb = emb + self.map_label(class_labels * np.sqrt(class_labels.shape[1]))
        emb = F.silu(emb)
        a = self.enc[0](self.first(x), emb)
        b = self.enc[1](a, emb)
        c = self.dec[1](torch.cat([self.dec[0](b, emb), b], dim=1), emb)
        return self.out(self.last(torch.cat([c, a], dim=1), emb))


class ConsistencyModel(nn.Module):
    """`forward(x, sigma, class_labels=None, force_fp32=False, **sampler)` -> `{"denoised", "c_skip", "sigma"}`."""

    def __init__(self, sigma_min: float = 0.002, sigma_data: float = 0.5) -> None:
        super().__init__()
        self.sigma_min, self.sigma_data = sigma_min, sigma_data
        self.model = Net()

    def forward(
        self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None, force_fp32: bool = False
    ) -> dict[str, Tensor]:
        dtype = torch.float32 if force_fp32 else x.dtype
        x, sigma = x.to(torch.float32), sigma.to(torch.float32).reshape(-1, 1, 1, 1)
        c_skip = self.sigma_data**2 / ((sigma - self.sigma_min) ** 2 + self.sigma_data**2)
        c_out = (sigma - self.sigma_min) * self.sigma_data / (sigma**2 + self.sigma_data**2).sqrt()
        c_in = 1 / (self.sigma_data**2 + sigma**2).sqrt()
        labels = None if class_labels is None else class_labels.to(torch.float32)
        f_x = self.model((c_in * x).to(dtype), (sigma.log() / 4).flatten(), labels)
        assert f_x.dtype == dtype
        denoised = (c_skip * x + c_out * f_x.to(torch.float32)).clip(-3, 3)
        return {"denoised": denoised, "c_skip": c_skip.flatten(), "sigma": sigma}
