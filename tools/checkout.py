"""Where a clone of the repository keeps what the wheel does not contain: the trained demo pipelines, docs/ and out/."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DEMOS = {name: ROOT / "models" / name for name in ("demo", "demo_dit")}
TRAINING = {"demo": "train_unet", "demo_dit": "train_dit"}


def demo_folder(name: str) -> Path:
    """The folder of a trained demo pipeline, `demo` or `demo_dit`. Raises `ValueError` if its weights are not there."""
    folder = DEMOS[name]
    if not (folder / "model_index.json").is_file():
        raise ValueError(
            f"the pipeline {name} is not in {folder}: an installed package leaves it out. Run this in a clone of the "
            f"repository, give --pipeline FOLDER, or train it: python -m fxpass.tools.demo.{TRAINING[name]}"
        )
    return folder


def head() -> str:
    """The commit of the clone, with `-dirty` after it if a file but those in docs/ has changed; empty without git."""
    command = ("git", "describe", "--always", "--exclude=*")
    try:
        commit = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
    changed = subprocess.run(("git", "diff", "--quiet", "HEAD", "--", ".", ":!docs"), cwd=ROOT, check=False).returncode
    return f"{commit}-dirty" if changed else commit
