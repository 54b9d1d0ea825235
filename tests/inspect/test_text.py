"""Snapshots as text, unfolded and folded."""

import re

import pytest
from torch import Tensor, nn

from fxpass.inspect.text import text
from fxpass.make_plan import plan
from tests.inspect.plans import planned, small
from tests.runtime.plans import inputs


def unfolded(strategy: str = "sync", rank: int = 0) -> str:
    return text(planned(strategy).snapshot(rank), folded=False)


def test_a_rank_s_graph_has_a_line_per_operator_under_its_module() -> None:
    lines = unfolded(rank=1).splitlines()
    at = lines.index("down")
    halo, arrived, convolution = lines[at + 1 : at + 4]
    assert re.fullmatch(
        r"  x\d+\.0  getitem\w*  \[B, C, H/2, W\]  2x16x\d+x8 \(H: \d+ of \d+\)  float32  "
        r"halo\(H: 1 up\) of silu_default; 1\.0 kB",
        halo,
    )
    assert re.fullmatch(r"  getitem\w*  arrived", arrived)
    assert re.fullmatch(
        r"  convolution_default_1  \[B, C, H/2, W\]  2x16x4x4 \(H: 4 of 8\)  float32  "
        r"convolution\(getitem\w*, \.weight, \.bias, \[2, 2\], .*\); 147\.46 kFLOP",
        convolution,
    )


def test_inputs_weights_and_outputs_have_the_callers_names() -> None:
    body = unfolded().partition("\n\n")[2]
    assert body.startswith("inputs\n  sample  [B, C, H, W]  2x4x16x8  float32\n  timestep  [D0]  1  float32\nweights: ")
    assert body.splitlines()[-2] == "outputs"


def test_keys_and_values_in_one_bucket_are_one_message() -> None:
    assert re.search(
        r"exchange_\d+  one message of 2 values; (\d\.\d kB)\n  x2\.0 .* for keys_values; .*\n  x2\.1 .* for keys_",
        unfolded(),
    )


def test_the_heading_has_what_is_cut_and_what_it_costs() -> None:
    first, second = unfolded("displaced").splitlines()[:2]
    assert first == "split: sample [B, C, H/2, W], 16 rows, cut at 8"
    made = planned("displaced")
    assert f"{len(made.exchanges)} exchanges in " in second
    assert re.search(r"22 operators, 557\.06 kFLOP, .* 7\.2 kB received in an exact step", second)


@pytest.mark.parametrize(
    ("strategy", "words"),
    [
        ("compressed", r"stale halo\(.*; 1\.0 kB, then 128 B in changes of 2 bits$"),
        ("no_sync", r"frozen halo\(.*; 1\.0 kB, then 0 B$"),
        ("stale_gn", r"stale halo\(.*; 1\.0 kB$"),
    ],
)
def test_an_exchange_shows_what_displaced_steps_send(strategy: str, words: str) -> None:
    assert re.search(words, unfolded(strategy), re.MULTILINE)


class Repeated(nn.Module):
    """Five equal blocks, then one with a wider kernel."""

    def __init__(self) -> None:
        super().__init__()
        kernels = [3, 3, 3, 3, 3, 5]
        self.blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(4, 4, k, padding=k // 2), nn.SiLU()) for k in kernels)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        for block in self.blocks:
            sample = sample + block(sample)
        return sample * timestep.sin()


def test_equal_neighbours_are_folded_and_others_stand_apart() -> None:
    made = plan(Repeated().eval(), *inputs(), world_size=2)
    folded = text(made.snapshot()).splitlines()
    (group,) = [line for line in folded if " x Sequential" in line]
    # the first block reads an input, whose rows are taken without an exchange
    assert re.fullmatch(r"  4 x Sequential  1 … 4  \(each 2 operators, .* received\)", group)
    assert len([line for line in folded if re.match(r"  [05]  Sequential", line)]) == 2
    assert text(made.snapshot(), folded=False).count("convolution(") == 6
    assert "\n".join(folded).count("convolution(") == 3


def test_a_module_that_equals_one_elsewhere_refers_to_it() -> None:
    assert "  as single_transformer_blocks.0.attn" in text(small("flux").snapshot())


def test_folded_text_has_every_exchange_of_the_modules_that_it_shows() -> None:
    shown = text(planned().snapshot())
    assert [each.id for each in planned().exchanges] == sorted(re.findall(r"x\d+\.\d+(?=  getitem)", shown))


def test_operators_without_matrix_products_are_counted_by_name() -> None:
    shown = text(planned().snapshot())
    assert "reshape x 3, add x 2, permute x 2" in shown
    assert " add_tensor" not in shown.replace("of add_tensor", "")
