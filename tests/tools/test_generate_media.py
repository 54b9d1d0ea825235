"""`fxpass generate` of videos and sounds, with small untrained pipelines."""

from __future__ import annotations

import wave
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fxpass.models.pipelines_zoo import build
from fxpass.tools import media
from fxpass.tools.media import Medium, media_of, save
from tests.tools.command import fxpass

NAMES = {"video": "LTXPipeline", "sound": "AudioLDMPipeline", "both": "LTX2Pipeline"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for kind, name in NAMES.items():
        made[kind] = tmp_path_factory.mktemp("pipelines") / kind
        build(name).pipeline.save_pretrained(made[kind])
    return made


@pytest.fixture(autouse=True)
def no_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """No program that writes MP4 files, whatever this machine has."""
    monkeypatch.setattr(media, "ffmpeg", lambda: None)


def frames(path: Path) -> np.ndarray:
    """[F, H, W, 3] in 0..255."""
    with Image.open(path) as file:
        found = []
        for i in range(getattr(file, "n_frames", 1)):
            file.seek(i)
            found.append(np.asarray(file.convert("RGB")).astype(int))
        return np.stack(found)


def samples(path: Path) -> tuple[np.ndarray, int]:
    """[channels, samples] in 16 bits, and the rate."""
    with wave.open(str(path)) as file:
        flat = np.frombuffer(file.readframes(file.getnframes()), "<i2")
        return flat.reshape(-1, file.getnchannels()).T.astype(int), file.getframerate()


VIDEO = ("--frames", 5, "--height", 32, "--width", 32, "--steps", 2, "--prompt", "a wave", "--executor", "lockstep")


def test_a_video_is_an_animation_that_equals_that_of_one_device(folders: dict[str, Path], tmp_path: Path) -> None:
    result = fxpass("generate", folders["video"], *VIDEO, "--fps", 4, "--compare", "-o", tmp_path / "a.png")
    assert result.exit_code == 0, result.output
    split, alone = (frames(tmp_path / name) for name in ("a.png", "a-one-device.png"))
    assert split.shape == (5, 32, 32, 3)
    assert split.std() > 5
    assert np.abs(split - alone).max() <= 1
    assert Image.open(tmp_path / "a.png").info["duration"] == 250
    assert frames(tmp_path / "a-comparison.png").shape[0] == 1
    assert "PSNR" in result.stdout


def test_a_video_is_a_gif_by_default_where_nothing_writes_mp4(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = fxpass("generate", folders["video"], *VIDEO, "-n", 1)
    assert result.exit_code == 0, result.output
    assert [path.name for path in tmp_path.iterdir()] == ["video.gif"]
    assert frames(tmp_path / "video.gif").shape == (5, 32, 32, 3)
    assert "video.gif" in result.stdout


def test_a_sound_is_a_wav_file_with_the_rate_of_the_vocoder(folders: dict[str, Path], tmp_path: Path) -> None:
    options = ("--prompt", "a bell", "--steps", 2, "--seconds", 0.016, "--executor", "lockstep", "--compare")
    result = fxpass("generate", folders["sound"], *options, "-o", tmp_path / "a.wav")
    assert result.exit_code == 0, result.output
    (split, rate), (alone, _) = (samples(tmp_path / name) for name in ("a.wav", "a-one-device.wav"))
    assert rate == 16000
    assert split.shape == (1, 256)
    assert split.std() > 5
    assert np.abs(split - alone).max() <= 1
    assert "SNR" in result.stdout or "identical" in result.stdout


def test_a_video_with_sound_is_two_files(folders: dict[str, Path], tmp_path: Path) -> None:
    result = fxpass("generate", folders["both"], *VIDEO, "--frames", 9, "-n", 2, "-o", tmp_path / "a.gif")
    assert result.exit_code == 0, result.output
    assert {path.name for path in tmp_path.iterdir()} == {"a.gif", "a.wav"}
    assert len(frames(tmp_path / "a.gif")) == 5  # of this small pipeline
    assert samples(tmp_path / "a.wav")[0].shape[0] == 2


def test_mp4_without_a_program_that_writes_it_is_an_error_before_anything_is_loaded(tmp_path: Path) -> None:
    result = fxpass("generate", "nowhere/at-all", "--prompt", "x", "-o", tmp_path / "a.mp4")
    assert result.exit_code == 2
    assert "pip install imageio-ffmpeg" in result.stderr
    assert "a.gif needs neither" in result.stderr


def test_mp4_files_get_the_frames_and_the_sound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a program that writes down what it was given."""
    program = tmp_path / "ffmpeg"
    program.write_text('#!/bin/sh\nfor last; do :; done\necho "$@" > "$last.txt"\ncat > "$last"\n')
    program.chmod(0o755)
    monkeypatch.setattr(media, "ffmpeg", lambda: str(program))
    video = Medium("video", np.random.default_rng(0).random((3, 4, 6, 3), np.float32), 12.0)
    sound = Medium("sound", np.zeros((2, 100), np.float32), 8000.0)
    assert save([video, sound], tmp_path / "a.mp4") == [tmp_path / "a.mp4", tmp_path / "a.wav"]
    raw = np.frombuffer((tmp_path / "a.mp4").read_bytes(), np.uint8).reshape(3, 4, 6, 3)
    assert np.abs(raw / 255 - video.values).max() < 0.01
    given = (tmp_path / "a.mp4.txt").read_text()
    for words in ("-s 6x4 -r 12", f"-i {tmp_path / 'a.wav'}", "libx264"):
        assert words in given


def test_a_program_that_fails_is_an_error_with_what_it_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "ffmpeg"
    program.write_text("#!/bin/sh\ncat > /dev/null\necho Unknown encoder libx264 >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setattr(media, "ffmpeg", lambda: str(program))
    with pytest.raises(RuntimeError, match=r"could not write .*a\.mp4: Unknown encoder libx264"):
        save([Medium("video", np.zeros((1, 4, 4, 3), np.float32), 10.0)], tmp_path / "a.mp4")


def test_an_ending_of_another_kind_is_replaced_so_that_nothing_is_lost(tmp_path: Path) -> None:
    picture = Medium("picture", np.zeros((4, 4, 3), np.float32))
    assert save([picture], tmp_path / "a.wav") == [tmp_path / "a.png"]
    assert frames(tmp_path / "a.png").shape == (1, 4, 4, 3)


class Maker:
    """A pipeline whose frames come at 24 per second by default."""

    def __init__(self, **components: Any) -> None:
        self.components = components

    def __call__(self, prompt: str, frame_rate: float = 24.0) -> None: ...


def test_frames_may_be_tensors_with_channels_first_arrays_or_pictures() -> None:
    values = torch.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5) / 120
    pictures = [Image.fromarray((each.movedim(0, -1) * 255).round().byte().numpy()) for each in values]
    for held in (values[None], values.movedim(1, -1)[None].numpy(), [pictures]):
        (found,) = media_of(Maker(), SimpleNamespace(frames=held))
        assert (found.kind, found.rate, found.values.shape) == ("video", 24.0, (2, 4, 5, 3))
        assert np.abs(found.values - values.movedim(1, -1).numpy()).max() < 0.003


def test_a_list_of_pictures_in_place_of_one_is_a_video() -> None:
    (found,) = media_of(Maker(), SimpleNamespace(images=[[Image.new("RGB", (5, 4))] * 3]))
    assert (found.kind, found.values.shape) == ("video", (3, 4, 5, 3))


def test_the_rate_of_a_sound_is_that_of_the_part_that_makes_it() -> None:
    listener = SimpleNamespace(sampling_rate=48000)  # a feature extractor
    decoder = SimpleNamespace(config=SimpleNamespace(sampling_rate=32000))
    sound = SimpleNamespace(audios=torch.zeros(1, 2, 7))
    (found,) = media_of(Maker(feature_extractor=listener, vae=decoder), sound)
    assert (found.kind, found.rate, found.values.shape) == ("sound", 32000.0, (2, 7))
    with pytest.raises(NotImplementedError, match="no part of Maker says how many samples"):
        media_of(Maker(feature_extractor=listener), sound)


@pytest.mark.parametrize("shape", [(6, 8, 1), (6, 8)])
def test_pictures_and_videos_may_be_grey(shape: tuple[int, ...], tmp_path: Path) -> None:
    grey = np.linspace(0, 1, 48, dtype=np.float32).reshape(shape)
    for name, value in (("images", grey), ("frames", [grey, grey]), ("images", Image.new("L", (8, 6)))):
        (made,) = media_of(Maker(), SimpleNamespace(**{name: [value]}))
        assert made.values.shape[-3:] == (6, 8, 1)
        (path,) = save([made], tmp_path / "grey.png")
        assert made.picture is not None
        assert (frames(path)[0] == (made.picture * 255).round()).all()


def test_a_result_without_names_is_an_error() -> None:
    with pytest.raises(NotImplementedError, match="and Maker makes a tuple"):
        media_of(Maker(), (np.zeros((1, 4, 4, 3)),))


def test_a_result_without_pictures_or_sounds_is_named() -> None:
    with pytest.raises(NotImplementedError, match="and Maker makes image_embeds"):
        media_of(Maker(), SimpleNamespace(image_embeds=1, nothing=None))


@pytest.mark.parametrize(
    "made",
    [{"images": []}, {"frames": [[]]}, {"frames": torch.empty(1, 0, 8, 8, 3)}, {"audios": np.empty((1, 0))}],
    ids=lambda made: f"{next(iter(made))} {type(next(iter(made.values()))).__name__}",
)
def test_a_result_without_anything_in_it_is_a_clear_error(made: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"has made nothing that could be written: its {next(iter(made))} are empty"):
        media_of(SimpleNamespace(__call__=lambda: None, sampling_rate=8), SimpleNamespace(**made))
