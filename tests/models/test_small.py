"""The small models are fast, seeded and of sensible scale, and every input matters."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_unflatten

from fxpass.models.small import Case, cases, output_tensors, randomise_constants

each_case = pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


@torch.no_grad()
def run(module: nn.Module, inputs: dict[str, Any]) -> list[Tensor]:
    return output_tensors(module(**inputs))


def differ(left: list[Tensor], right: list[Tensor]) -> bool:
    return any(not torch.equal(a, b) for a, b in zip(left, right, strict=True))


def nudged(tensor: Tensor) -> Tensor:
    """Change every value of a tensor: floats slightly, masks flipped, integers to a neighbour."""
    if tensor.is_floating_point():
        return tensor + 0.1 * torch.randn_like(tensor)
    masks = tensor.numel() > 1 and int(tensor.max()) <= 1
    return 1 - tensor if masks else torch.where(tensor > 0, tensor - 1, tensor + 1)


@each_case
@pytest.mark.parametrize(("rows", "batch"), [(64, 1), (32, 2), (16, 1)])
def test_outputs_are_finite_and_of_sensible_scale(case: Case, rows: int, batch: int) -> None:
    module = case.build()
    for output in run(module, case.inputs(rows, batch, module=module)):
        assert output.isfinite().all()
        assert 0.05 < output.std() < 20


@each_case
def test_rows_that_are_not_a_power_of_two_are_accepted_or_refused_with_the_multiple(case: Case) -> None:
    module = case.build()
    if 50 % case.multiple:
        with pytest.raises(ValueError, match=f"multiples of {case.multiple}"):
            case.inputs(50, module=module)
    else:
        assert all(output.isfinite().all() for output in run(module, case.inputs(50, module=module)))


@each_case
def test_every_input_tensor_changes_the_output(case: Case) -> None:
    module = case.build()
    paths, spec = tree_flatten_with_path(case.inputs(16, 2, module=module))
    names, leaves = zip(*((keystr(path), leaf) for path, leaf in paths), strict=True)
    reference = run(module, tree_unflatten(leaves, spec))
    for index, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor) and names[index] != "['style']":  # there is only one style
            changed = [*leaves[:index], nudged(leaf), *leaves[index + 1 :]]
            assert differ(run(module, tree_unflatten(changed, spec)), reference), f"{names[index]} has no effect"


@each_case
@pytest.mark.parametrize("row", [0, -1])
def test_a_border_row_of_the_input_changes_the_output(case: Case, row: int) -> None:
    module = case.build()
    inputs = case.inputs(32, module=module)
    name, sample = next(iter(inputs.items()))
    changed = sample.clone()
    along_rows = 1 if case.name == "flux" else -2
    changed.select(along_rows, row).add_(0.1)
    assert differ(run(module, inputs), run(module, inputs | {name: changed}))


@each_case
def test_equal_seeds_give_equal_models_and_inputs_and_leave_the_global_generator_alone(case: Case) -> None:
    before = torch.get_rng_state()
    first, again, other = case.build(1), case.build(1), case.build(2)
    same = case.inputs(16, seed=3), case.inputs(16, seed=3)
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert differ(list(first.parameters()), list(other.parameters()))
    assert not differ(*(output_tensors(inputs) for inputs in same))
    assert differ(output_tensors(same[0]), output_tensors(case.inputs(16, seed=4)))


@each_case
def test_no_parameter_stays_constant(case: Case) -> None:
    for name, parameter in case.build().named_parameters():
        assert parameter.numel() == 1 or parameter.std() > 0, name


def test_randomise_constants_leaves_random_parameters_alone() -> None:
    linear = nn.Linear(8, 8)
    nn.init.zeros_(linear.bias)
    weight = linear.weight.clone()
    randomise_constants(linear)
    assert torch.equal(linear.weight, weight)
    assert linear.bias.std() > 0


def test_case_names_are_unique() -> None:
    assert len({case.name for case in cases}) == len(cases)
