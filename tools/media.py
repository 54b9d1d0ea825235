"""What a pipeline makes (pictures, videos, sounds), and how it is compared and written."""

from __future__ import annotations

import shutil
import subprocess
import wave
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .pictures import image, psnr, psnr_text

if TYPE_CHECKING:
    import numpy as np

Kind = Literal["picture", "video", "sound"]

#: the endings of files; the first is the default, but that of a video is the second where nothing encodes MP4
ENDINGS: Mapping[Kind, tuple[str, ...]] = {
    "picture": (".png",),
    "video": (".mp4", ".gif", ".png"),
    "sound": (".wav",),
}
FRAMES_PER_SECOND = 10.0  #: where neither the user nor the pipeline gives one
RATES = ("output_sampling_rate", "sampling_rate", "sample_rate")  #: samples per second, as parts of pipelines call it


@dataclass(frozen=True)
class Medium:
    """A picture, a video or a sound.

    Attributes:
        values: a picture [H, W, C] or a video [F, H, W, C] in 0..1, a sound [channels, samples] in -1..1; float32.
        rate: frames or samples per second; 0 for a picture.
    """

    kind: Kind
    values: np.ndarray
    rate: float = 0.0

    @property
    def picture(self) -> np.ndarray | None:
        """[H, W, C]: of a video, the frame in the middle; None for a sound."""
        if self.kind == "sound":
            return None
        return self.values if self.kind == "picture" else self.values[len(self.values) // 2]

    def difference(self, other: Medium) -> str:
        """How much `other` differs: PSNR of pictures and videos, signal-to-noise ratio of sounds."""
        import numpy as np

        if self.kind != "sound":
            return psnr_text(psnr(self.values, other.values))
        signal, error = (np.square(x.astype(np.float64)).sum() for x in (self.values, other.values - self.values))
        return f"SNR {10 * np.log10(signal / error):.1f} dB" if error else "identical"


# -- what a pipeline returned -----------------------------------------------------------------------------------------


def media_of(pipe: Any, made: Any, frames_per_second: float | None = None) -> list[Medium]:
    """The first picture, video and sound of a pipeline's result, by what the result holds.

    Args:
        frames_per_second: of a video; by default as `frame_rate_of` says.

    Raises:
        NotImplementedError: the result holds none of them.
        ValueError: it holds an empty list of them, or a video without frames.
    """
    found: list[Medium] = []
    held = {name: value for name, value in getattr(made, "__dict__", {}).items() if value is not None}
    for name in ("images", "frames"):
        if name in held:
            values = _pixels(_first(pipe, name, held[name]))
            kind: Kind = "video" if values.ndim == 4 else "picture"
            found.append(Medium(kind, values, (frames_per_second or frame_rate_of(pipe)) * (kind == "video")))
    sounds = [_first(pipe, name, held[name]) for name in ("audios", "audio") if name in held]
    found += [Medium("sound", _samples(each), _sampling_rate(pipe)) for each in sounds]
    if not found:
        raise NotImplementedError(
            f"generate writes pictures, videos and sounds, and {type(pipe).__name__} makes "
            f"{', '.join(held) or 'a ' + type(made).__name__}"
        )
    return found


def _first(pipe: Any, name: str, made: Any) -> Any:
    first = made[0] if len(made) else []
    if len(first) == 0 if isinstance(first, list) else 0 in getattr(first, "shape", ()):
        raise ValueError(f"{type(pipe).__name__} has made nothing that could be written: its {name} are empty")
    return first


def frame_rate_of(pipe: Any) -> float:
    """Frames per second that the pipeline assumes by default."""
    import inspect

    takes = inspect.signature(pipe.__call__).parameters
    defaults = [takes[name].default for name in ("frame_rate", "fps") if name in takes]
    return next((float(each) for each in defaults if isinstance(each, (int, float))), FRAMES_PER_SECOND)


def _array(value: Any) -> np.ndarray:
    import numpy as np

    return value.detach().float().cpu().numpy() if hasattr(value, "detach") else np.asarray(value)


def _frame(value: Any) -> np.ndarray:
    """As `_array`, of something that may have no channels: one is added."""
    values = _array(value)
    return values[..., None] if values.ndim == 2 else values


def _pixels(value: Any) -> np.ndarray:
    """A picture, or a video as an array, tensor or list of frames: [(F,) H, W, C] in 0..1."""
    import numpy as np

    values = np.stack([_frame(each) for each in value]) if isinstance(value, list) else _frame(value)
    if values.shape[-1] not in (1, 3, 4) and values.shape[-3] in (1, 3, 4):  # channels first
        values = np.moveaxis(values, -3, -1)
    return (values / 255 if values.dtype == np.uint8 else values).astype(np.float32)


def _samples(value: Any) -> np.ndarray:
    """A sound [channels, samples]."""
    import numpy as np

    return np.atleast_2d(_array(value)).astype(np.float32)


def _sampling_rate(pipe: Any) -> float:
    """Samples per second: of the vocoder, else of the part that decodes, else of the pipeline.

    Raises:
        NotImplementedError: none of them says.
    """
    parts = dict(getattr(pipe, "components", {}))
    ordered = [parts.get("vocoder"), *(parts[name] for name in sorted(parts) if "vae" in name)]
    for part in (*(getattr(each, "config", None) for each in ordered), pipe):
        for name in RATES:
            if isinstance(rate := getattr(part, name, None), (int, float)):
                return float(rate)
    raise NotImplementedError(f"no part of {type(pipe).__name__} says how many samples its sounds have per second")


# -- files ------------------------------------------------------------------------------------------------------------


def ffmpeg() -> str | None:
    """The program that writes MP4 files, if it is installed."""
    if found := shutil.which("ffmpeg"):
        return found
    if find_spec("imageio_ffmpeg") is None:
        return None
    return import_module("imageio_ffmpeg").get_ffmpeg_exe()


def check_ending(path: Path) -> None:
    """Raises `ValueError` if no file with this ending can be written."""
    known = list(dict.fromkeys(ending for endings in ENDINGS.values() for ending in endings))
    if path.suffix.lower() not in known:
        raise ValueError(
            f"--output names a file that ends in {', '.join(known)}, not {path}; "
            f"did you mean {path.with_suffix('.png')}?"
        )
    if path.suffix.lower() == ".mp4" and ffmpeg() is None:
        raise ValueError(
            "nothing here can write MP4 files: run `pip install imageio-ffmpeg`, or install ffmpeg; "
            f"{path.with_suffix('.gif')} needs neither, and {path.with_suffix('.png')} loses nothing"
        )


def path_for(medium: Medium, output: Path) -> Path:
    """Where a medium goes: `output`, with another ending if that one is of another kind."""
    endings = ENDINGS[medium.kind]
    if output.suffix.lower() in endings:
        return output
    return output.with_suffix(endings[medium.kind == "video" and ffmpeg() is None])


def save(media: list[Medium], output: Path) -> list[Path]:
    """Write each medium to a file of its own; an MP4 file also gets the sound. Returns the paths."""
    paths = [path_for(medium, output) for medium in media]
    sound = next((path for medium, path in zip(media, paths, strict=True) if medium.kind == "sound"), None)
    for medium, path in sorted(zip(media, paths, strict=True), key=lambda each: each[1] != sound):  # the sound first
        if medium.kind == "picture":
            image(medium.values).save(path)
        elif medium.kind == "sound":
            _save_sound(medium, path)
        elif path.suffix.lower() == ".mp4":
            _save_mp4(medium, path, sound)
        else:
            first, *others = _frames(medium)
            milliseconds = round(1000 / medium.rate)
            first.save(path, save_all=True, append_images=others, duration=milliseconds, loop=0)
    return paths


def _frames(medium: Medium) -> Iterator[Any]:
    return (image(frame) for frame in medium.values)


def _save_sound(medium: Medium, path: Path) -> None:
    """16 bits per sample."""
    import numpy as np

    whole = (np.clip(medium.values, -1, 1) * 32767).round().astype("<i2")
    with wave.open(str(path), "wb") as file:
        file.setnchannels(len(whole))
        file.setsampwidth(2)
        file.setframerate(round(medium.rate))
        file.writeframes(whole.T.tobytes())


def _save_mp4(medium: Medium, path: Path, sound: Path | None) -> None:
    """H.264, with an even number of rows and columns.

    Raises:
        RuntimeError: ffmpeg failed; the message ends with what it said.
    """
    height, width = medium.values.shape[1:3]
    raw = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", f"{medium.rate:g}", "-i", "-"]
    also = ["-i", str(sound), "-c:a", "aac"] if sound else []
    encoded = ["-vf", "pad=ceil(iw/2)*2:ceil(ih/2)*2", "-c:v", "libx264", "-crf", "17", "-pix_fmt", "yuv420p"]
    program = ffmpeg()
    assert program is not None, "the ending has been checked"
    data = b"".join(frame.convert("RGB").tobytes() for frame in _frames(medium))
    run = subprocess.run(
        [program, "-y", *raw, *also, *encoded, str(path)], input=data, capture_output=True, check=False
    )
    if run.returncode:
        said = run.stderr.decode(errors="replace").strip().splitlines()
        raise RuntimeError(f"ffmpeg could not write {path}: {said[-1] if said else f'exit code {run.returncode}'}")
