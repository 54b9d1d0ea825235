"""Rules of signals: unfold, STFT and FFT, along every dim, on uneven cuts with overlaps and holes."""

from typing import Any

import pytest
import torch
from hypothesis import strategies as st

from tests.passes.examples import Example, randn, split_anywhere, split_where_promised
from tests.properties import examples, few, given

window = torch.hann_window(8, dtype=torch.float64)


def spectrum(x: torch.Tensor, **options: Any) -> torch.Tensor:
    """Real and imaginary parts, since what is compared is real."""
    return torch.view_as_real(torch.stft(x, 8, return_complex=True, **options))


FRAMES: dict[str, tuple[Any, tuple[int, ...], tuple[int, ...]]] = {
    "unfold": (lambda x: x.unfold(1, 4, 2), (2, 21, 3), (0, 1, 2)),
    "unfold with gaps": (lambda x: x.unfold(1, 2, 3) * 2, (2, 21, 3), (0, 1, 2)),
    "unfold the last": (lambda x: x.unfold(-1, 5, 1).sum(-1), (2, 3, 16), (0, 1, 2)),
    "stft": (lambda x: spectrum(x, hop_length=2, window=window, center=False), (2, 37), (0, 1)),
    "stft from the centre": (lambda x: spectrum(x, hop_length=3, window=window), (2, 37), (0, 1)),
    "stft by default": (lambda x: spectrum(x, window=window[:6], win_length=6, normalized=True), (2, 37), (0, 1)),
    "stft of one signal": (lambda x: spectrum(x, hop_length=2, window=window, onesided=False), (37,), (0,)),
    "rfft": (lambda x: torch.view_as_real(torch.fft.rfft(x)), (3, 5, 8), (0, 1)),
    "ifft of two dims": (lambda x: torch.fft.ifft2(torch.fft.fft2(x)).real, (5, 4, 8), (0,)),
    "irfft": (lambda x: torch.fft.irfft(torch.fft.rfft(x, dim=1), 9, dim=1), (3, 9, 4), (0, 2)),
}


@pytest.mark.parametrize("name", FRAMES)
@examples(12)
@given(data=st.data())
def test_frames_and_spectra_are_split_where_promised(name: str, data: st.DataObject) -> None:
    function, shape, promised = FRAMES[name]
    split_where_promised(data, Example(function, [randn(*shape)], {0: promised}))


@pytest.mark.parametrize("name", FRAMES)
@few
@given(data=st.data())
def test_frames_and_spectra_are_right_on_any_cut(name: str, data: st.DataObject) -> None:
    function, shape, _ = FRAMES[name]
    split_anywhere(data, Example(function, [randn(*shape)]))
