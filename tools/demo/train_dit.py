"""Train the second demo pipeline, a class-conditional `DiTPipeline` of 4 million parameters, from scratch on a CPU.

    python -m fxpass.tools.demo.train_dit              everything: the stages below, one after the other
    python -m fxpass.tools.demo.train_dit latents      encoded scenes and their classes
    python -m fxpass.tools.demo.train_dit dit          the denoiser (can be resumed)
    python -m fxpass.tools.demo.train_dit export       writes the averaged weights to models/demo_dit

It shares scenes, autoencoder and noise schedule with the first demo (`train_unet`). A class is a scene without texture
on one of two backgrounds. In training, a class is the sum of four embeddings, for shape, colour, position and
background, so that it generalises to unseen classes; export writes the sums into the usual table.
"""

from __future__ import annotations

import argparse
import json
import time
from itertools import product
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DiTPipeline, DiTTransformer2DModel
from diffusers.models.attention_processor import Attention, AttnProcessor
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from ..checkout import DEMOS, ROOT
from .scenes import COLOURS, POSITIONS, SHAPES, Scene, render
from .train_unet import as_tensor, make_scheduler, rate
from .vae import code, make_vae

OUT = ROOT / "out" / "demo_dit"
FOLDER = DEMOS["demo_dit"]
VAE = DEMOS["demo"] / "vae"
BACKGROUNDS = ("white", "black")
FACTORS = (len(SHAPES), len(COLOURS), len(POSITIONS), len(BACKGROUNDS))
NULL = 1000  # the class of "no class", fixed by DiTPipeline
POOL = {64: 16000, 128: 12000}  # images of each size (height and width)
BATCH = {64: 64, 128: 20}
PHASES = ((1800, {64: 1.0}), (6000, {64: 0.15, 128: 0.85}))  # (last step, probability of each size)
PEAK = 1.5e-3


def scenes() -> list[Scene]:
    """The scene of each class, in the order of the classes."""
    return [Scene(s, c, "plain", p, b) for s, c, p, b in product(SHAPES, COLOURS, POSITIONS, BACKGROUNDS)]


def label(scene: Scene) -> str:
    """The name of a scene's class: a caption without a comma, which would separate two names."""
    return f"{scene.thing} {scene.position} on a {scene.background} background"


class Factors(nn.Module):
    """Replaces the class table in training: class ids [B] -> embeddings [B, width]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        tables = [nn.Embedding(count, width) for count in FACTORS]
        self.tables = nn.ModuleList(tables)
        self.null = nn.Parameter(torch.zeros(width))
        for table in tables:
            nn.init.normal_(table.weight, std=0.3)

    def forward(self, labels: Tensor) -> Tensor:
        known = labels.clamp(max=int(np.prod(FACTORS)) - 1)
        total = torch.zeros_like(self.null)
        for table, index in zip(self.tables, torch.unravel_index(known, FACTORS), strict=True):
            total = total + table(index)
        return torch.where((labels == NULL)[:, None], self.null, total)


def make_dit() -> DiTTransformer2DModel:
    """Eight blocks of width 128 on 2x2 patches of 32x32 latents: 256 tokens."""
    return DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=32, num_layers=8, sample_size=32, in_channels=4, out_channels=4
    )


def embedders(model: DiTTransformer2DModel) -> list[nn.Module]:
    return [block.get_submodule("norm1.emb") for block in model.transformer_blocks]


def make_training_dit() -> DiTTransformer2DModel:
    """The same with `Factors` in place of class tables, and zero gates, as in the DiT paper."""
    model = make_dit()
    for embedder in embedders(model):
        embedder.class_embedder = Factors(model.inner_dim)
    with torch.no_grad():
        gates = [block.get_submodule("norm1.linear") for block in model.transformer_blocks]
        for layer in (*gates, model.proj_out_1, model.proj_out_2):
            for parameter in layer.parameters():
                parameter.zero_()
    return model


def make_latents() -> None:
    """Per image size, scaled latents in half precision and class ids; held-out scenes are left out."""
    rng = np.random.default_rng(3000)
    known = [(k, scene) for k, scene in enumerate(scenes()) if not scene.held_out]
    scale = make_vae().config.scaling_factor
    entries = {}
    for side, count in POOL.items():
        picks = [known[k] for k in rng.integers(len(known), size=count)]
        latents = [code(as_tensor([render(scene, side, side, rng)])).half() * scale for _, scene in picks]
        entries[side] = (torch.cat(latents), torch.tensor([k for k, _ in picks]))
    torch.save(entries, OUT / "latents.pt")


def train(steps: int, save_every: int) -> None:
    torch.manual_seed(0)
    pool = torch.load(OUT / "latents.pt")
    alphas = make_scheduler().alphas_cumprod
    model = make_training_dit().train()
    weights = list(model.parameters())
    average = {k: v.detach().clone() for k, v in model.state_dict().items()}
    optimizer = torch.optim.AdamW(weights, lr=PEAK, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    start, seconds = 0, 0.0
    if (OUT / "dit.pt").exists():
        state = torch.load(OUT / "dit.pt")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        average, start, seconds = state["average"], state["step"], state["seconds"]
    for layer in model.modules():
        if isinstance(layer, Attention):
            layer.set_processor(AttnProcessor())  # plain matmuls: on CPUs their backward is twice as fast
    compiled = torch.compile(model, dynamic=False)
    began, losses = time.time() - seconds, []
    for step in range(start, steps):
        for group in optimizer.param_groups:
            group["lr"] = rate(step, PHASES[-1][0], PEAK, decay=0.5)
        rng = np.random.default_rng((4, step))
        torch.manual_seed(step)
        shares = next(shares for end, shares in PHASES if step < end)
        side = int(rng.choice(list(shares), p=list(shares.values())))
        latents, labels = pool[side]
        picks = torch.from_numpy(rng.integers(len(latents), size=BATCH[side]))
        x0, classes = latents[picks].float(), labels[picks].clone()
        classes[torch.from_numpy(rng.random(len(picks)) < 0.1)] = NULL
        even = (torch.randperm(len(picks)) + torch.rand(len(picks))) / len(picks)
        at = ((1 - even**2) * len(alphas)).long().clamp(max=len(alphas) - 1)  # more samples at the noisy end
        a = alphas[at].view(-1, 1, 1, 1)
        noise = torch.randn_like(x0)
        with torch.autocast("cpu", torch.bfloat16):
            guess = compiled(a.sqrt() * x0 + (1 - a).sqrt() * noise, at, classes).sample.float()
        loss = F.mse_loss(guess, a.sqrt() * noise - (1 - a).sqrt() * x0)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        losses.append(loss.item())
        with torch.no_grad():
            keep = min(0.998, (step + 1) / (step + 20))
            fresh = model.state_dict()
            torch._foreach_lerp_([average[k] for k in fresh], list(fresh.values()), 1 - keep)
        if step % 50 == 49:
            print(f"dit {step + 1} loss {np.mean(losses[-50:]):.4f} {time.time() - began:.0f} s", flush=True)
        if (step + 1) % save_every == 0 or step + 1 == steps:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "average": average}
            torch.save(state | {"step": step + 1, "seconds": time.time() - began}, OUT / "dit.tmp")
            (OUT / "dit.tmp").rename(OUT / "dit.pt")


def export(folder: Path) -> None:
    """Write the averaged weights as a pipeline folder, in half precision (they load as float32)."""
    trained, model = make_training_dit(), make_dit()
    trained.load_state_dict(torch.load(OUT / "dit.pt")["average"])
    model.load_state_dict({k: v for k, v in trained.state_dict().items() if "class_embedder" not in k}, strict=False)
    ids = torch.arange(NULL + 1)
    with torch.no_grad():
        for source, target in zip(embedders(trained), embedders(model), strict=True):
            table = source.get_submodule("class_embedder")(ids)
            table[len(scenes()) : NULL] = 0  # ids without a scene
            target.get_parameter("class_embedder.embedding_table.weight").copy_(table)
    pipeline = DiTPipeline(
        transformer=model,
        vae=AutoencoderKL.from_pretrained(VAE),
        scheduler=make_scheduler(),  # pyright: ignore[reportArgumentType]
    )
    pipeline.save_pretrained(folder)
    index = folder / "model_index.json"  # save_pretrained leaves the names of the classes out
    names = {"id2label": {str(k): label(scene) for k, scene in enumerate(scenes())}}
    index.write_text(json.dumps(json.loads(index.read_text()) | names, indent=1) + "\n")
    config = folder / "vae" / "config.json"  # names the folder that it was loaded from
    kept = {key: value for key, value in json.loads(config.read_text()).items() if key != "_name_or_path"}
    config.write_text(json.dumps(kept, indent=2) + "\n")
    for path in folder.glob("*/*.safetensors"):
        save_file({k: v.half() for k, v in load_file(path).items()}, path, metadata={"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    stages = parser.add_subparsers(dest="stage")
    stages.add_parser("latents")
    stage = stages.add_parser("dit")
    stage.add_argument("--steps", type=int, default=PHASES[-1][0], help="stop there")
    stage.add_argument("--save-every", type=int, default=250)
    stage = stages.add_parser("export")
    stage.add_argument("--folder", type=Path, default=FOLDER)
    options = vars(parser.parse_args())
    torch.set_num_threads(options.pop("threads"))
    OUT.mkdir(parents=True, exist_ok=True)
    chosen = options.pop("stage")
    if chosen is None:
        make_latents()
        train(PHASES[-1][0], 250)
        export(FOLDER)
    else:
        {"latents": make_latents, "dit": train, "export": export}[chosen](**options)


if __name__ == "__main__":
    main()
