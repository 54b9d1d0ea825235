"""The text side of the demo: a tokenizer of whole words, a small CLIP text encoder, and its pretraining.

A denoiser learns the meaning of words slowly, and only from very noisy steps. So the text encoder is pretrained alone:
two layers on the mean of its tokens must predict the scene at 64x64 (latents 16x16). This takes two minutes.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from .scenes import draw_scene

TEXT_LENGTH = 16


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    ids = tokenizer.get_vocab()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TEXT_LENGTH,
        projection_dim=128,
        bos_token_id=ids[str(tokenizer.bos_token)],
        eos_token_id=ids[str(tokenizer.eos_token)],
        pad_token_id=ids[str(tokenizer.pad_token)],
    )
    model = CLIPTextModel(config)
    words, places = (getattr(model.get_submodule("embeddings"), f"{n}_embedding").weight for n in ("token", "position"))
    with torch.no_grad():  # the usual 0.02 drowns the words in what the layers add: all tokens become one
        words.normal_(0, 1.0)
        places.normal_(0, 0.3)
    return model


def make_tokenizer(folder: Path) -> CLIPTokenizer:
    """A CLIP tokenizer in which every word of the grammar is one token and any other text is spelled out in bytes.

    Made once for all stages: its training numbers some units at random.
    """
    rng = np.random.default_rng(0)
    words = sorted({w for _ in range(5000) for w in draw_scene(rng).paraphrase(rng).replace(",", " ,").split()})
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=10_000, end_of_word_suffix="</w>", initial_alphabet=letters, show_progress=False
    )
    learner.train_from_iterator([" ".join(words)] * 2, trainer)
    merges = json.loads(learner.to_str())["model"]["merges"]
    units = letters + [f"{u}</w>" for u in letters] + ["".join(m) for m in merges]
    units += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({u: i for i, u in enumerate(dict.fromkeys(units))}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *(" ".join(m) for m in merges)]) + "\n")
    return load_tokenizer(folder)


def load_tokenizer(folder: Path) -> CLIPTokenizer:
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=TEXT_LENGTH)


def tokens(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    """Token ids [B, TEXT_LENGTH]."""
    found = tokenizer(texts, padding="max_length", max_length=TEXT_LENGTH, truncation=True, return_tensors="pt")
    return found.input_ids


def train_text_encoder(model: CLIPTextModel, latents: Tensor, captions: Tensor, steps: int) -> None:
    """Fit two layers on the mean token to latents [N, 4, h, w]; captions are token ids [N, phrasings, length]."""
    torch.manual_seed(0)
    width = 4 * model.config.hidden_size
    layers = (
        torch.nn.Linear(model.config.hidden_size, width),
        torch.nn.SiLU(),
        torch.nn.Linear(width, latents[0].numel()),
    )
    head = torch.nn.Sequential(*layers)
    model.set_attn_implementation("eager")
    weights = [*model.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=1.5e-3, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    began, losses = time.time(), []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1.5e-3 * min(1, (step + 1) / 30, (steps - step) / (0.5 * steps))
        picks = torch.randint(len(latents), (64,))
        ids = captions[picks, torch.randint(captions.shape[1], (64,))].long()
        with torch.autocast("cpu", torch.bfloat16):
            guess = head(model(ids)[0].mean(1)).float()
        loss = F.mse_loss(guess, latents[picks].float().flatten(1))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        losses.append(loss.item())
        if step % 100 == 99:
            print(f"text {step + 1} loss {np.mean(losses[-100:]):.4f} {time.time() - began:.0f} s", flush=True)
