"""Explanations of nodes."""

import re

import pytest
from torch import Tensor, nn

from fxpass.inspect.explain import explain
from fxpass.make_plan import plan
from fxpass.passes.cuts import Tried
from tests.inspect.plans import planned, small
from tests.runtime.plans import inputs
from tests.tools.command import fxpass


def test_an_operator_is_explained_by_its_rule_its_split_and_its_exchange() -> None:
    lines = planned().explain("convolution_default_1").splitlines()
    assert lines[0].startswith("convolution_default_1: convolution(getitem_1, .weight, .bias, [2, 2]")
    assert re.fullmatch(r"from      down, .*tests/runtime/plans\.py:\d+.*", lines[1])
    assert lines[2] == "layout    [B, C, H/2, W]  2x16x4x4 (H: 4 of 8)  float32"
    assert lines[3].startswith("rule      `convolution` of fxpass.passes.rules.windows for aten.convolution.default")
    assert lines[4] == "split     comes from the cut of sample: [B, C, H/2, W], 16 rows, cut at 8"
    assert lines[5] == "          over 7 operators"
    assert lines[6].startswith(
        "exchange  x1.0: halo(H: 1 zero up) of silu_default for convolution_default_1; rank 0 receives 0 B"
    )
    assert lines[7] == "          because the operator's window reaches rows that other ranks hold"
    assert lines[8] == "          may be stale: its rule allows it, but the strategy 'sync' keeps halo fresh"


def test_the_dims_through_which_a_split_moves_are_named() -> None:
    shown = planned().explain("linear_default")
    assert "which move it to [B, L, C/2] at reshape_default_1, then [B, L/2, C] at permute_default\n" in shown


@pytest.mark.parametrize(
    ("strategy", "node", "words"),
    [
        ("displaced", "x0.0", "predicted: displaced steps use an estimate"),
        ("displaced", "x3.0", "stale: displaced steps use what the other ranks sent at the last step"),
        ("no_sync", "x3.0", "frozen: displaced steps use what the other ranks sent at the last exact step"),
        ("no_sync", "x0.0", "local: displaced steps use the rank's own part alone"),
        ("displaced", "x4.0", "never stale: exchanges of the role output are exact in every step"),
        ("sync_gn", "x0.0", "the strategy 'sync_gn' keeps moments fresh"),
    ],
)
def test_an_exchange_says_why_it_may_or_may_not_be_stale(strategy: str, node: str, words: str) -> None:
    shown = planned(strategy).explain(node)
    assert f"\nexchange  {node}: " in shown
    assert words in shown


class Unlike(nn.Module):
    """Has a product with weights over split rows, which may not be old, and an operator without a rule."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.mix = nn.Conv2d(4, 4, 3, padding=1), nn.Linear(128, 1)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        x = self.conv(sample)
        return x + self.mix(x.flatten(2)).mean() + x.lgamma().exp().mean() * timestep


def test_an_exchange_whose_rule_forbids_old_rows_says_so() -> None:
    made = plan(Unlike().eval(), *inputs(), world_size=2, strategy="displaced")
    exchange = next(each for each in made.exchanges if each.role == "sum" and not each.declared.may_be_stale)
    assert "never stale: with old rows, the result of this operator would not stay close" in made.explain(exchange.id)


def test_a_fallback_is_explained_with_its_reason() -> None:
    made = plan(Unlike().eval(), *inputs(), world_size=2)
    (gathered,) = made.gathered
    shown = made.explain(gathered.node)
    assert "rule      none that fits; aten.lgamma.default runs whole on every rank" in shown
    assert f"fallback  {gathered}" in shown


def test_the_search_is_listed_with_the_chosen_cuts() -> None:
    made = small("flux")
    assert made.tried
    assert all(isinstance(each, Tried) for each in made.tried)
    (chosen,) = [each for each in made.tried if dict(each.cuts) == made.cuts]
    assert chosen.received == max(sum(each.values()) for each in made.bytes_received_per_rank)
    assert chosen.evenness == pytest.approx(made.bound / made.world_size)
    lines = made.explain("x0.0").splitlines()
    table = lines[next(i for i, line in enumerate(lines) if line.startswith("search    tried")) + 2 :]
    assert len(table) == len(made.tried) == made.attempts
    (line,) = [line for line in table if line.startswith("  chosen")]
    assert "x_encoder_hidden_states [B, L/2, C] of 3 to 4 rows a rank" in line


def test_a_gathered_value_is_explained_by_the_rule_that_gathers_it() -> None:
    shown = planned().explain("x2.1")
    assert "rule      `attention` of fxpass.passes.rules" in shown


def test_a_rule_that_a_function_makes_has_the_name_of_the_function() -> None:
    shown = planned().explain("x0.0")
    assert (
        "`group_norm` of fxpass.passes.rules.normalization for aten.group_norm.default: Each rank normalizes" in shown
    )


def test_a_rule_for_operators_of_any_number_of_dims_is_named() -> None:
    made = plan(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.AvgPool2d(2)).eval(), inputs()[0], world_size=2)
    assert "rule      `avg_pool` of fxpass.passes.rules.windows for aten.avg_pool2d" in made.explain(
        "avg_pool2d_default"
    )


def test_operators_on_whole_values_need_no_rule() -> None:
    shown = planned().explain("reshape_default")
    assert "rule      none was needed: its operands are whole on every rank" in shown
    assert "split     not split: every rank has all of it" in shown


def test_an_operator_of_the_captured_program_and_an_input_are_found_by_name() -> None:
    assert planned().explain("sample").startswith("x_sample: input")
    assert planned().explain("scaled_dot_product_attention_default").count("\nexchange  x2.") == 2


def test_an_unknown_node_is_refused_with_near_names() -> None:
    with pytest.raises(ValueError, match=r"no node is called 'convolution_defalt'; did you mean convolution_default"):
        planned().explain("convolution_defalt")


def test_every_node_of_a_model_can_be_explained() -> None:
    made = small("flux", 2, "pcpp")
    snapshot = made.snapshot()
    for name in [*snapshot.by_name, *snapshot.by_id]:
        shown = explain(made.program, snapshot, name, made.strategy, made.tried)
        assert name not in snapshot.by_id or f"exchange  {name}: " in shown


def test_the_command_explains_groups_of_ranks() -> None:
    divided = ("small:unet_sd", "-n", 4, "--cfg", 2, "--batch", 2, "--rank", 3)
    assert "rank 3 receives 64 B" in fxpass("explain", *divided, "x0.0").stdout


def test_the_command_explains_and_refuses_in_one_line() -> None:
    shown = fxpass("explain", "tests.tools.models:good", "x3.0", "--rank", 1, "--strategy", "displaced").stdout
    assert "rank 1 receives 1.0 kB" in shown
    for words, message in (
        (("tests.tools.models:good", "x9.0"), "no node is called 'x9.0'; did you mean"),
        (("tests.tools.models:good", "x3.0", "--rank", 2), "there is no rank 2"),
        (("tests.tools.models:god", "x3.0"), "did you mean good"),
    ):
        result = fxpass("explain", *words)
        assert result.exit_code == 2
        assert message in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1
