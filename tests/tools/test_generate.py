"""`fxpass generate` and the demo, with a tiny untrained pipeline."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from fxpass import parallel, parallelize
from fxpass.tools import checkout
from fxpass.tools.commands.generate import SEEDS, Request, device_for, load, make, run
from fxpass.tools.demo import command as demo
from fxpass.tools.pictures import AMPLIFICATION, comparison, image, psnr, psnr_text
from tests.tools.command import fxpass
from tests.tools.pipelines import write_pipeline


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pipeline(tmp_path_factory.mktemp("pipelines") / "tiny")


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def test_generate_also_writes_the_image_of_one_device_and_compares(folder: Path, tmp_path: Path) -> None:
    arguments = (
        "--prompt",
        "a ring",
        "--executor",
        "lockstep",
        "--steps",
        2,
        "--compare",
        "-o",
        tmp_path / "new" / "a.png",
    )
    result = fxpass("generate", folder, *arguments)
    assert result.exit_code == 0
    split, alone = (pixels(tmp_path / "new" / name) for name in ("a.png", "a-one-device.png"))
    assert split.shape == (64, 64, 3)
    assert split.std() > 5
    assert np.abs(split - alone).max() <= 1
    assert Image.open(tmp_path / "new" / "a-comparison.png").width > 3 * 320
    for word in ("one device", "2 ranks", "s for a step", "halo", "keys_values", "PSNR", "a-comparison.png"):
        assert word in result.stdout


def test_generate_may_choose_the_strategy(folder: Path, tmp_path: Path) -> None:
    options = ("--executor", "lockstep", "--steps", 1, "--strategy", "auto", "--height", 32, "--width", 32)
    result = fxpass("generate", folder, "--prompt", "x", *options, "-o", tmp_path / "a.png")
    assert result.exit_code == 0, result.stderr
    assert pixels(tmp_path / "a.png").shape == (32, 32, 3)


def test_equal_seeds_give_equal_images_and_other_seeds_others(folder: Path, tmp_path: Path) -> None:
    made = []
    for i, seed in enumerate((1, 1, 2)):
        path = tmp_path / f"{i}.png"
        options = ("--executor", "lockstep", "-n", 1, "--steps", 1, "--seed", seed, "--height", 32, "--width", 48)
        fxpass("generate", folder, "--prompt", "x", *options, "-o", path)
        made.append(pixels(path))
    assert made[0].shape == (32, 48, 3)
    assert np.array_equal(made[0], made[1])
    assert not np.array_equal(made[0], made[2])


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1])
def test_a_seed_of_more_than_64_bits_is_refused_before_anything_is_loaded(seed: int, tmp_path: Path) -> None:
    result = fxpass("generate", tmp_path / "nowhere", "--prompt", "x", "--seed", seed)
    assert result.exit_code == 2
    assert "Invalid value for '--seed'" in result.stderr
    assert str(SEEDS[seed > 0]) in result.stderr


def test_the_demo_runs_on_two_processes(folder: Path, tmp_path: Path) -> None:
    options = ["--pipeline", str(folder), "--size", "64", "--steps", "2", "--output-dir", str(tmp_path / "out")]
    result = CliRunner().invoke(demo.app, options, catch_exceptions=False)
    assert result.exit_code == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "picture.png", "picture-one-device.png", "picture-comparison.png",
    }  # fmt: skip
    for word in ("2 processes", "one device", "PSNR", "rank 0 received", demo.PROMPT):
        assert word in result.stdout


def test_the_demo_says_what_to_do_without_its_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(checkout.DEMOS, "demo", tmp_path)
    result = CliRunner().invoke(demo.app, [])
    assert result.exit_code == 2
    assert "Run this in a clone of the repository, give --pipeline FOLDER, or train it" in result.stderr


@pytest.mark.slow
def test_under_torchrun_only_rank_0_writes_and_prints(folder: Path, tmp_path: Path) -> None:
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "fxpass.tools.cli"]
    options = ["generate", str(folder), "--prompt", "x", "--steps", "2", "--compare", "-o", str(tmp_path / "a.png")]
    result = subprocess.run([*run, *options], capture_output=True, text=True, timeout=250, env=os.environ, check=True)
    assert result.stdout.count("exchanged") == 1
    assert np.abs(pixels(tmp_path / "a.png") - pixels(tmp_path / "a-one-device.png")).max() <= 1


def test_the_pipeline_gets_its_models_back(folder: Path) -> None:
    pipe = load(str(folder))
    unet = pipe.unet
    make(pipe, Request("x", steps=1), 2, "sync", "lockstep", "2 ranks", compare=False)
    assert pipe.unet is unet
    with pytest.raises(ValueError, match="takes no num_inference_steps"):
        run(Picky(), Request("x", steps=1), "")


def test_the_bytes_that_all_parts_receive_are_counted(folder: Path) -> None:
    pipe = load(str(folder))
    made, _ = make(pipe, Request("x", steps=1), 2, "sync", "lockstep", "2 ranks", compare=False)
    parallelize(pipe, 2, executor="lockstep")
    run(pipe, Request("x", steps=1), "")
    received = [sum(parallel(part).traffic.values()) for part in (pipe.unet, pipe.vae)]
    assert all(received)
    assert sum(made.traffic.values()) == sum(received)


class Picky:
    def __call__(self, prompt: str) -> None: ...


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("TINI",), "did you mean TINY?"),
        (("TINY/unet",), "is no pipeline: it has no model_index.json"),
        (("TINY/model_index.json",), "is a file; give the diffusers folder"),
        (("TINY", "--executor", "spwan"), "did you mean spawn?"),
        (("TINY", "--executor", "distributed"), "start them with `torchrun --nproc-per-node 2"),
        (("TINY", "--dtype", "float23"), "did you mean float32?"),
        (("TINY", "--dtype", "int3"), "no dtype 'int3'; choose one of float32, float16, bfloat16"),
        (("TINY", "--strategy", "ulysses"), "unknown strategy"),
        (("TINY", "--guidance", "nan"), "Invalid value for '--guidance': nan is not a finite number. (see"),
        (("TINY", "--strategy", "auot"), "did you mean 'auto'?"),
        (("TINY", "-o", "a.jpg"), "did you mean a.png?"),
        (("someone/who-is-not-there",), "cannot load someone/who-is-not-there: "),
    ],
)
def test_generate_reports_wrong_arguments_in_one_line(
    arguments: tuple[str, ...], message: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    folders = {"TINY": "./tiny", "TINI": "./tini"}
    pipeline = arguments[0].replace("TINY", "./tiny").replace("TINI", "./tini")
    result = fxpass("generate", pipeline, "--prompt", "x", *arguments[1:])
    assert result.exit_code == 2
    for name, path in folders.items():
        message = message.replace(name, path.removeprefix("./"))
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_psnr_is_that_of_images_in_zero_to_one() -> None:
    black = np.zeros((4, 4, 3))
    assert psnr(black, black + 0.1) == pytest.approx(20)
    assert psnr_text(psnr(black, black)) == "identical"
    assert psnr_text(20) == "PSNR 20.0 dB"


def test_a_comparison_shows_both_images_and_their_amplified_difference() -> None:
    left, right = np.zeros((400, 400, 3)), np.zeros((400, 400, 3))
    right[:200] = 0.5 / AMPLIFICATION
    shown = np.asarray(comparison(left, right, ("left", "right"), "a heading"))
    panel = shown[40 : 40 + 380, -400:-20]
    assert panel[:100].mean() == pytest.approx(128, abs=2)
    assert panel[-100:].max() == 0


def test_images_are_rounded_to_8_bits() -> None:
    assert np.asarray(image(np.array([[[0.0, 0.5, 1.2]]]))).tolist() == [[[0, 128, 255]]]


@pytest.mark.parametrize(
    ("gpus", "executor", "world", "device"),
    [
        (0, "auto", None, "cpu"),
        (1, "auto", None, "cpu"),
        (2, "auto", None, "cuda:0"),
        (2, "spawn", 3, "cpu"),
        (4, "spawn", 3, "cuda:0"),
        (1, "lockstep", 4, "cuda:0"),
        (1, "auto", 1, "cuda:0"),
    ],
)
def test_workers_are_on_gpus_where_each_rank_has_one(
    gpus: int, executor: str, world: int | None, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert device_for(executor, world) == device
