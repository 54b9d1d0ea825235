"""Train the demo pipeline, a text-to-image `StableDiffusionPipeline` of 7 million parameters, from scratch on a CPU.

    python -m fxpass.tools.demo.train_unet              everything: the stages below, one after the other
    python -m fxpass.tools.demo.train_unet vae          the autoencoder's decoder, on crops of rendered scenes
    python -m fxpass.tools.demo.train_unet latents      shards of encoded, captioned scenes
    python -m fxpass.tools.demo.train_unet text         the text encoder alone
    python -m fxpass.tools.demo.train_unet unet         denoiser and text encoder together (can be resumed)
    python -m fxpass.tools.demo.train_unet export       writes the averaged weights to models/demo
    python -m fxpass.tools.demo.train_unet sheet FILE   a sheet of labelled samples from the exported folder

Checkpoints go to out/demo (ignored by git). Every random choice comes from a fixed seed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import AttnProcessor
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from ..checkout import DEMOS, ROOT
from .scenes import draw_scene, render
from .text import load_tokenizer, make_text_encoder, make_tokenizer, tokens, train_text_encoder
from .vae import code, make_vae

OUT = ROOT / "out" / "demo"
FOLDER = DEMOS["demo"]
GUIDANCE = 2.0
VAE_STEPS, SHARDS, TEXT_STEPS, STEPS = 1900, 12, 4000, 5400
BATCH = {(64, 64): 80, (128, 128): 24, (128, 192): 16, (192, 128): 16, (256, 256): 6}  # per process
POOL = {(64, 64): 4000, (128, 128): 3000, (128, 192): 300, (192, 128): 300, (256, 256): 300}  # per shard
PHASES = (  # (last step, probability of each image size (height, width))
    (1260, {(64, 64): 1.0}),  # the meaning of words is learned on small images
    (2100, {(64, 64): 0.3, (128, 128): 0.7}),
    (4200, {(128, 128): 0.76, (128, 192): 0.06, (192, 128): 0.06, (256, 256): 0.12}),
    (STEPS, {(128, 128): 0.3, (128, 192): 0.05, (192, 128): 0.05, (256, 256): 0.6}),
)
ROUNDS = ((4200, 1e-3), (STEPS, 5e-4))  # (last step, peak learning rate)


def make_unet() -> UNet2DConditionModel:
    """Three levels; self- and cross-attention on the lowest and in the middle; the pooled text joins the timestep.

    Cross-attention alone learns the meaning of words slowly; scale and shift by the pooled text are learned fast."""
    return UNet2DConditionModel(
        sample_size=32,
        block_out_channels=(32, 64, 128),
        down_block_types=("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=128,
        # by an old quirk of the class, the number of heads per level
        attention_head_dim=(1, 2, 4),  # pyright: ignore[reportArgumentType]
        norm_num_groups=8,
        time_embedding_dim=256,
        resnet_time_scale_shift="scale_shift",
        addition_embed_type="text",
        addition_embed_type_num_heads=4,
    )


def make_scheduler() -> DDIMScheduler:
    """v-prediction with zero terminal SNR, so that white and black backgrounds are right."""
    return DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    )


def as_tensor(pictures: list[np.ndarray]) -> Tensor:
    """Images [H, W, 3] in 0..1 as one tensor [B, 3, H, W] in -1..1."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous() * 2 - 1


def rate(step: int, steps: int, peak: float, decay: float = 0.4) -> float:
    """Learning rate: 100 steps up, level, and a linear descent over the last `decay` of the steps."""
    return peak * min(1, (step + 1) / 100, (steps - step) / (decay * steps))


def rate_in_rounds(step: int) -> float:
    """The learning rate over several rounds."""
    start = 0
    for end, peak in ROUNDS:
        if step < end:
            return rate(step - start, end - start, peak)
        start = end
    raise ValueError(f"the plan has {start} steps")


def train_vae(steps: int) -> None:
    """Train the decoder alone, on crops, with a moving average of its weights; the encoder is fixed by construction."""
    torch.manual_seed(0)
    rng = np.random.default_rng(1)
    sides = {64: 1000, 128: 1500, 256: 200}
    pool = {s: torch.cat([as_tensor([render(draw_scene(rng), s, s, rng)]) for _ in range(n)]) for s, n in sides.items()}
    vae, average = make_vae(), make_vae()
    if (OUT / "vae").exists():  # continue from the last round
        vae = AutoencoderKL.from_pretrained(OUT / "vae").train()
    average.load_state_dict(vae.state_dict())
    vae.encoder.requires_grad_(False)
    weights: list[Tensor] = list(vae.decoder.parameters())
    optimizer = torch.optim.AdamW(weights, lr=1e-3, betas=(0.9, 0.99), weight_decay=0, fused=True)
    began, errors = time.time(), []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate(step, steps, 2e-4, decay=0.5)
        side = (64, 128, 128, 256)[step % 4]
        crops = []
        for k in rng.integers(len(pool[side]), size=6):
            y, x = 4 * rng.integers(0, (side - 64) // 4 + 1, size=2)
            crops.append(pool[side][k, :, y : y + 64, x : x + 64])
        x0 = torch.stack(crops)
        z = code(x0)
        x1 = decoded(vae, z + 0.02 * torch.randn_like(z))
        edges = sum((x1.diff(dim=d) - x0.diff(dim=d)).abs().mean() for d in (2, 3))
        error = (x1 - x0).abs().mean()
        optimizer.zero_grad()
        (error + edges + (x1 - x0).square().mean()).backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        with torch.no_grad():
            keep = min(0.995, (step + 1) / (step + 20))
            torch._foreach_lerp_(list(average.decoder.parameters()), weights, 1 - keep)
        errors.append(error.item())
        if step % 50 == 49:
            with torch.no_grad():
                check = pool[128][:24]
                final = (decoded(average, code(check)) - check).abs().mean().item()
            print(
                f"vae {step + 1} L1 {np.mean(errors[-50:]):.4f} averaged {final:.4f} {time.time() - began:.0f} s",
                flush=True,
            )
            average.save_pretrained(OUT / "vae")
            note("vae", {"steps": step + 1, "seconds": round(time.time() - began), "L1 at 128x128": final})


def decoded(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """The images of latents."""
    return vae.decode(latents).sample  # pyright: ignore[reportArgumentType]


def make_latents(first: int, shards: int) -> None:
    """Each shard: per image size, scaled latents, and token ids of four phrasings of each caption."""
    scale = make_vae().config.scaling_factor
    if not (OUT / "tokenizer").exists():
        make_tokenizer(OUT / "tokenizer")
    tokenizer = load_tokenizer(OUT / "tokenizer")
    began = time.time()
    for shard in range(first, shards):
        rng = np.random.default_rng(1000 + shard)
        entries = {}
        for (height, width), count in POOL.items():
            scenes = [draw_scene(rng) for _ in range(count)]
            latents = [code(as_tensor([render(s, height, width, rng)])).half() * scale for s in scenes]
            ids = tokens(tokenizer, [s.paraphrase(rng) for s in scenes for _ in range(4)]).view(count, 4, -1)
            entries[height, width] = (torch.cat(latents), ids.short())
        path = OUT / f"latents_{shard:03}.pt"
        torch.save(entries, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").rename(path)
        print(f"latents {path.name} {time.time() - began:.0f} s", flush=True)


def load_latents() -> dict[tuple[int, int], tuple[Tensor, Tensor]]:
    shards = [torch.load(p) for p in sorted(OUT.glob("latents_*.pt"))]
    return {size: (torch.cat([s[size][0] for s in shards]), torch.cat([s[size][1] for s in shards])) for size in POOL}


def train_text(steps: int) -> None:
    model = make_text_encoder(load_tokenizer(OUT / "tokenizer"))
    train_text_encoder(model, *load_latents()[64, 64], steps)
    torch.save(model.state_dict(), OUT / "text.pt")


def train_unet(steps: int, save_every: int) -> None:
    """Train denoiser and text encoder together; under torchrun every process contributes its part of the batch."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1:
        dist.init_process_group("gloo")
    torch.manual_seed(0)
    tokenizer = load_tokenizer(OUT / "tokenizer")
    empty = tokens(tokenizer, [""])
    alphas = make_scheduler().alphas_cumprod
    unet, text_encoder = make_unet(), make_text_encoder(tokenizer)
    model = torch.nn.ModuleDict({"unet": unet, "text_encoder": text_encoder})
    text_encoder.load_state_dict(torch.load(OUT / "text.pt"))
    average = {k: v.detach().clone() for k, v in model.state_dict().items()}
    unet.set_attn_processor(AttnProcessor())  # plain matmuls: on CPUs their backward is twice as fast
    text_encoder.set_attn_implementation("eager")
    weights = list(model.parameters())
    groups = [{"params": list(part.parameters()), "scale": k} for part, k in ((unet, 1.0), (text_encoder, 0.2))]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    start, seconds = 0, 0.0
    if (OUT / "unet.pt").exists():
        state = torch.load(OUT / "unet.pt")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        average, start, seconds = state["average"], state["step"], state["seconds"]
    pool = load_latents()
    began, losses = time.time() - seconds, []
    for step in range(start, steps):
        for group in optimizer.param_groups:
            group["lr"] = rate_in_rounds(step) * group["scale"]
        shares = next(shares for end, shares in PHASES if step < end)
        size = list(shares)[int(np.random.default_rng((2, step)).choice(len(shares), p=list(shares.values())))]
        rng = np.random.default_rng((3, step, rank))
        torch.manual_seed(step * world + rank)
        latents, captions = pool[size]
        batch = BATCH[size]
        picks = torch.from_numpy(rng.integers(len(latents), size=batch))
        phrasing = torch.from_numpy(rng.integers(captions.shape[1], size=batch))
        x0, ids = latents[picks].float(), captions[picks, phrasing].long()
        ids[torch.from_numpy(rng.random(batch) < 0.1)] = empty
        even = (
            torch.randperm(batch) + torch.rand(batch)
        ) / batch  # stratified, then shifted to the noisy end, where the
        # prompt decides the image
        at = ((1 - even**2) * len(alphas)).long().clamp(max=len(alphas) - 1)
        a = alphas[at].view(-1, 1, 1, 1)
        noise = torch.randn_like(x0)
        with torch.autocast("cpu", torch.bfloat16):
            text = text_encoder(ids)[0]
            guess = unet(a.sqrt() * x0 + (1 - a).sqrt() * noise, at, text).sample.float()
        loss = F.mse_loss(guess, a.sqrt() * noise - (1 - a).sqrt() * x0)
        optimizer.zero_grad()
        loss.backward()
        if world > 1:
            add_gradients([w.grad for w in weights if w.grad is not None], world)
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        losses.append(loss.item())
        if rank:
            continue
        with torch.no_grad():
            keep = min(0.998, (step + 1) / (step + 20))
            fresh = model.state_dict()
            torch._foreach_lerp_([average[k] for k in fresh], list(fresh.values()), 1 - keep)
        if step % 50 == 49:
            print(f"unet {step + 1} loss {np.mean(losses[-50:]):.4f} {time.time() - began:.0f} s", flush=True)
        if (step + 1) % save_every == 0 or step + 1 == steps:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "average": average}
            state |= {"step": step + 1, "seconds": time.time() - began}
            torch.save(state, OUT / "unet.tmp")
            (OUT / "unet.tmp").rename(OUT / "unet.pt")
            loss_now = float(np.mean(losses[-500:]))
            note("unet", {"steps": step + 1, "seconds": round(time.time() - began), "loss": round(loss_now, 4)})


def add_gradients(gradients: list[Tensor], world: int) -> None:
    """Average gradients over the processes, in place, in one message."""
    whole = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(whole)
    for gradient, part in zip(gradients, whole.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient)).div_(world)


def export(folder: Path) -> None:
    """Write the averaged weights as a pipeline folder, in half precision (they load as float32)."""
    tokenizer = load_tokenizer(OUT / "tokenizer")
    average = torch.load(OUT / "unet.pt")["average"]
    unet, text_encoder = make_unet(), make_text_encoder(tokenizer)
    for name, part in (("unet", unet), ("text_encoder", text_encoder)):
        part.load_state_dict({k.removeprefix(f"{name}."): v for k, v in average.items() if k.startswith(f"{name}.")})
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(OUT / "vae"),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=make_scheduler(),  # pyright: ignore[reportArgumentType]
        safety_checker=None,  # pyright: ignore[reportArgumentType]
        feature_extractor=None,  # pyright: ignore[reportArgumentType]
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    config = folder / "vae" / "config.json"  # names the folder that it was loaded from
    kept = {key: value for key, value in json.loads(config.read_text()).items() if key != "_name_or_path"}
    config.write_text(json.dumps(kept, indent=2) + "\n")
    for name in ("vocab.json", "merges.txt"):  # older releases of transformers read these
        shutil.copy(OUT / "tokenizer" / name, folder / "tokenizer" / name)
    for path in folder.glob("*/*.safetensors"):
        weights = {k: v.half() if v.is_floating_point() else v for k, v in load_file(path).items()}
        save_file(weights, path, metadata={"format": "pt"})


def sheet(folder: Path, file: Path) -> None:
    """An image of labelled samples: three rows of 128x128 and one of 256x256."""
    pipeline: Any = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    rng = np.random.default_rng(5)
    prompts = [draw_scene(rng, held_out=True).caption for _ in range(28)]
    canvas = Image.new("RGB", (8 * 140 + 4, 3 * 176 + 306), "white")
    pen = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(10)
    for side, some, left, top, columns in ((128, prompts[:24], 4, 4, 8), (256, prompts[24:], 4, 532, 4)):
        for k, prompt in enumerate(some):
            generator = torch.Generator().manual_seed(k)
            options = {"height": side, "width": side, "num_inference_steps": 25, "guidance_scale": GUIDANCE}
            picture = pipeline(prompt, generator=generator, **options).images[0]
            x, y = left + k % columns * (side + 12 if side == 128 else 280), top + k // columns * 176
            canvas.paste(picture, (x, y))
            lines = textwrap.wrap(prompt, side // 5)
            pen.multiline_text((x, y + side + 1), "\n".join(lines), fill="black", font=font, spacing=0)
    file.parent.mkdir(parents=True, exist_ok=True)
    canvas.save(file, optimize=True)


def note(part: str, facts: dict[str, Any]) -> None:
    """Add facts to the record of how the weights were made."""
    path = OUT / "record.json"
    record = json.loads(path.read_text()) if path.exists() else {}
    record[part] = facts
    path.write_text(json.dumps(record, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    stages = parser.add_subparsers(dest="stage")
    stage = stages.add_parser("vae")
    stage.add_argument("--steps", type=int, default=VAE_STEPS)
    stage = stages.add_parser("latents")
    stage.add_argument("--first", type=int, default=0)
    stage.add_argument("--shards", type=int, default=SHARDS)
    stage = stages.add_parser("text")
    stage.add_argument("--steps", type=int, default=TEXT_STEPS)
    stage = stages.add_parser("unet")
    stage.add_argument("--steps", type=int, default=STEPS, help="stop there")
    stage.add_argument("--save-every", type=int, default=250)
    stage = stages.add_parser("export")
    stage.add_argument("--folder", type=Path, default=FOLDER)
    stage = stages.add_parser("sheet")
    stage.add_argument("file", type=Path)
    stage.add_argument("--folder", type=Path, default=FOLDER)
    options = vars(parser.parse_args())
    torch.set_num_threads(options.pop("threads"))
    OUT.mkdir(parents=True, exist_ok=True)
    chosen = options.pop("stage")
    if chosen is None:
        train_vae(VAE_STEPS)
        make_latents(0, SHARDS)
        train_text(TEXT_STEPS)
        train_unet(STEPS, 250)
        export(FOLDER)
    else:
        run = {"vae": train_vae, "latents": make_latents, "text": train_text, "unet": train_unet}
        (run | {"export": export, "sheet": sheet})[chosen](**options)


if __name__ == "__main__":
    main()
