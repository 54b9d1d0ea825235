"""`fxpass study` with tiny untrained pipelines: costs, results, resuming, report and errors."""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from PIL import Image

from fxpass.ir.strategy import Strategy
from fxpass.tools import checkout
from fxpass.tools.demo.scenes import draw_scene
from fxpass.tools.demo.train_dit import label, scenes
from fxpass.tools.study import runs
from fxpass.tools.study.grid import Grid
from fxpass.tools.study.report import difference, interval
from fxpass.tools.study.results import Cell, Outcome, Picture, Results, StepError
from fxpass.tools.study.runs import CAP, costs, generate, held_out, split, subject
from tests.tools.command import fxpass
from tests.tools.pipelines import VAE, write_pipeline

pytestmark = pytest.mark.study

CELL = Cell("tiny", 64, 2, "00000000", 3, 2, "stale_gn", 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipelines")
    (folder / "prompts.txt").write_text("a ring\n\na star\na cross\n")
    return write_pipeline(folder / "tiny")


@pytest.fixture(scope="module", autouse=True)
def classes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Replace the class-conditional demo by a tiny pipeline with the same classes, and images of 32 x 32."""
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=2, sample_size=8, in_channels=4, out_channels=4
    )
    vae, scheduler = AutoencoderKL(**VAE), DDIMScheduler(clip_sample=False)
    folder = tmp_path_factory.mktemp("pipelines") / "classes"
    DiTPipeline(transformer, vae, scheduler).save_pretrained(folder)  # type: ignore[arg-type]
    index = folder / "model_index.json"
    names = {k: label(scene) for k, scene in enumerate(scenes())}
    index.write_text(json.dumps(json.loads(index.read_text()) | {"id2label": names}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(checkout.DEMOS, "demo_dit", folder)
        yield folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """Run a study of two cells; returns its folder and output."""
    output = tmp_path_factory.mktemp("study") / "out"
    return output, small(output)


def small(output: Path, *more: Any) -> Any:
    options = ("--pipeline", "demo_dit", "--prompts", 3, "--size", 32, "--batch", 3)
    grid = ("--strategies", "sync,stale_gn", "--ranks", "2", "--steps", 3, "--warmup", 1)
    result = fxpass("study", *options, *grid, *more, "-o", output)
    assert result.exit_code == 0, result.stderr
    return result


def test_bytes_of_a_generation_are_those_of_its_exact_and_its_displaced_steps() -> None:
    steps = {(True, False): 1000, (True, True): 1000, (False, False): 400, (False, True): 80}

    def received(rank: int, *, exact: bool = True, exposed: bool = False, half: bool) -> dict[str, int]:
        assert half
        return {"halo": steps[exact, exposed] // 4 * (rank + 1), "output": steps[exact, exposed] // 4 * (rank + 1)}

    plan: Any = SimpleNamespace(world_size=2, exact_steps=(2, 1), bytes_received=received)
    assert [(each.total, each.exposed) for each in costs(plan, 10)] == [
        (3 * 500 + 7 * 200, 3 * 500 + 7 * 40),
        (3 * 1000 + 7 * 400, 3 * 1000 + 7 * 80),
    ]
    assert runs.busiest(plan, 10) == costs(plan, 10)[1]
    assert costs(plan, 2)[1].total == 2000  # all of them are exact
    plan.exact_steps = (1, 0)
    assert costs(plan, 2)[1].total == 1400
    plan.exact_steps = None
    assert costs(plan, 2)[1] == runs.Cost(2000, 2000)


def test_the_bytes_of_the_plan_equal_those_received(folder: Path) -> None:
    asked = subject(str(folder), 3, 64, folder.parent / "prompts.txt")
    unet, scheduler = asked.pipe.unet, asked.pipe.scheduler
    with split(asked.pipe, 2, Strategy.of("no_sync"), 2) as model:
        generate(asked, 5, 3, lambda: None)
        plan: Any = model.plan
        assert costs(plan, 5)[0].total * 2 == sum(model.traffic.values())  # of rank 0, in float32
    assert asked.pipe.unet is unet
    assert asked.pipe.scheduler is scheduler


def test_images_do_not_depend_on_the_batch(folder: Path) -> None:
    asked = subject(str(folder), 3, 64, folder.parent / "prompts.txt")
    one, all_ = (generate(asked, 2, batch, lambda: None) for batch in (1, 3))
    assert np.abs(one.pictures - all_.pictures).max() < 1e-5
    assert one.latents.shape == all_.latents.shape == (2, 3, 4, 16, 16)
    assert torch.allclose(one.features, all_.features, atol=1e-4)
    assert one.features.shape[:2] == (3, 2)  # both guidance branches


def test_exact_cells_equal_the_unsplit_run_to_rounding_and_stale_ones_do_not(made: tuple[Path, Any]) -> None:
    results = Results(made[0])
    exact, stale = ([row for row in results.pictures if row.cell.strategy == name] for name in ("sync", "stale_gn"))
    assert all(CAP - 10 < row.psnr <= CAP and row.ssim > 0.9999 and row.features < 1e-4 for row in exact)
    assert all(row.psnr < 90 and 1e-4 < row.latent < 1 and 1e-4 < row.features < 1 for row in stale)
    errors = {row.step: row.error for row in results.errors if row.cell.strategy == "stale_gn" and row.prompt == 0}
    assert errors[1] < 1e-5 < 1e-4 < errors[2]
    total = {each.cell.strategy: each.total_bytes_fp16 or 0 for each in results.outcomes}
    exposed = {each.cell.strategy: each.exposed_bytes_fp16 or 0 for each in results.outcomes}
    assert total["sync"] == exposed["sync"] == total["stale_gn"]
    assert 0 < exposed["stale_gn"] < total["stale_gn"]


def test_classes_are_given_by_name_and_kept_in_the_results(made: tuple[Path, Any]) -> None:
    rows = Results(made[0]).pictures
    assert [row.text for row in rows[:3]] == [prompt.text for prompt in held_out(classes=True)[:3]]
    assert all(row.right is False and row.right_unsplit is False for row in rows)  # it is not trained
    assert "| 0 of 3 | 0 of 3 |" in (made[0] / "study.md").read_text()


def test_the_report_is_a_table_plots_and_contact_sheets(made: tuple[Path, Any]) -> None:
    output, result = made
    written = [Path(path) for path in re.findall(r"written +(\S+)", result.stdout)]
    assert [path.name.split("-")[0] for path in written] == ["study.md", "quality", "steps", "pictures"]
    table = written[0].read_text()
    assert "fxpass study --pipeline demo_dit --strategies sync,stale_gn --ranks 2 --steps 3 --warmup 1" in table
    assert re.search(r"\| 3 \| 2 \| stale_gn \| 1 \+ 0 \| \d\d\.\d\d ± \d", table)
    for path in written[1:]:
        pixels = np.asarray(Image.open(path).convert("RGB"))
        assert min(pixels.shape[:2]) > 300
        assert pixels.std() > 10
    before = [path.read_bytes() for path in written]
    for path in written:
        path.unlink()
    fxpass("study", "--report-only", "--baseline", "sync_gn", "-o", output)
    assert [path.read_bytes() for path in written[1:]] == before[1:]
    assert written[0].read_text() == table.replace("against stale_gn", "against sync_gn")


def test_a_rerun_makes_only_unfinished_cells(made: tuple[Path, Any]) -> None:
    output = made[0]
    before = {name: (output / name).read_text() for name in ("cells.csv", "pictures.csv", "steps.csv")}
    assert "2 cells, 2 of them finished" in small(output).stdout
    assert {name: (output / name).read_text() for name in before} == before
    for name, text in before.items():  # as if killed while it wrote the last row of each file
        (output / name).write_text(text[:-5])
    assert "2 cells, 1 of them finished" in small(output).stdout
    after = {name: (output / name).read_text() for name in before}
    assert after["pictures.csv"] == before["pictures.csv"]
    assert after["steps.csv"] == before["steps.csv"]
    assert after["cells.csv"].splitlines()[:2] == before["cells.csv"].splitlines()[:2]  # with its seconds
    assert "stale_gn" in after["cells.csv"].splitlines()[2]


def test_bytes_of_an_image_do_not_depend_on_the_batch(made: tuple[Path, Any], tmp_path: Path) -> None:
    small(tmp_path, "--strategies", "stale_gn", "--batch", 2)  # 3 images: one full batch and one half
    one, other = Results(made[0]).outcomes[1], Results(tmp_path).outcomes[0]
    assert replace(one, seconds=0) == replace(other, seconds=0)


def test_a_grid_has_one_cell_per_distinct_setting() -> None:
    asked: Any = SimpleNamespace(name="tiny", digest="00000000")
    strategies = [Strategy.of(name) for name in ("sync", "stale_gn")]
    grid = Grid(["tiny"], strategies, [2, 4], [3], [None, 1, 5], 2, None, 64, 8)
    cells = grid.cells(asked)
    assert [(cell.ranks, cell.strategy, cell.warmup) for cell in cells] == [
        (2, "sync", None), (2, "stale_gn", 5), (2, "stale_gn", 1),
        (4, "sync", None), (4, "stale_gn", 5), (4, "stale_gn", 1),
    ]  # fmt: skip
    assert CELL in cells
    for changed in ({"prompts": 3}, {"size": 32}, {"steps": [4]}):
        assert not cells.keys() & replace(grid, **changed).cells(asked).keys()


def test_rows_of_an_unfinished_cell_are_dropped(tmp_path: Path) -> None:
    results = Results(tmp_path / "new")
    results.clean()
    pictures = [Picture(CELL, k, 'a, "b"\nc', 20.0, 0.5, 0.1, 0.2, None, True) for k in range(2)]
    results.add(Outcome(CELL, 8.0, 4.0, 1.0), pictures, [StepError(CELL, 0, 1, 0.1)])
    again = Results(tmp_path / "new")
    assert again.outcomes == results.outcomes
    assert again.errors == results.errors
    assert again.pictures[0].text == 'a, "b" c'
    assert again.pictures[0].right is None
    assert again.pictures[0].right_unsplit
    path = tmp_path / "new" / "cells.csv"
    path.write_text(path.read_text()[:-3])
    half = Results(tmp_path / "new")
    assert not half.finished
    half.clean()
    assert path.with_name("pictures.csv").read_text().count("\n") == 1
    path.write_text("other,columns\n")
    with pytest.raises(ValueError, match="give another --output"):
        Results(tmp_path / "new")


def test_too_many_ranks_are_recorded_as_an_outcome(tmp_path: Path) -> None:
    result = small(tmp_path, "--strategies", "stale_gn", "--ranks", 64)
    assert "ranks" in Results(tmp_path).outcomes[0].impossible
    table = (tmp_path / "study.md").read_text()
    assert "| 3 | 64 | stale_gn | 1 + 0 | impossible | – |" in table
    assert "- 64 ranks: " in table
    assert len(re.findall("written", result.stdout)) == 1


@pytest.mark.parametrize("by_class", [False, True])
def test_held_out_prompts_are_distinct_and_reproducible(by_class: bool) -> None:
    prompts = held_out(classes=by_class)
    assert len({prompt.text for prompt in prompts}) == len(prompts) > 32
    assert prompts == held_out(classes=by_class)
    assert all(set(re.split("[ ,]+", prompt.text)) >= set(prompt.fact[0].split()) for prompt in prompts if prompt.fact)
    if not by_class:
        assert draw_scene(np.random.default_rng(0), held_out=True).caption in {prompt.text for prompt in prompts}


def test_intervals_follow_students_t_and_differences_are_paired() -> None:
    assert interval([1.0, 2.0, 3.0]) == pytest.approx((2, 4.302653 / 3**0.5))
    assert np.isnan(interval([1.0])[1])
    high, low = ([Picture(CELL, k, "", v + k**2, 1, 0, 0, None, None) for k in range(3)] for v in (12.0, 10.0))
    assert difference(high, low[::-1]) == pytest.approx((2, 0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--strategies", "stale_gm"), "did you mean 'stale_gn'?"),
        (("--baseline", "stale_gm"), "did you mean 'stale_gn'?"),
        (("--strategies", ","), "--strategies is empty"),
        (("--ranks", "2;4"), "--ranks takes whole numbers above 0 with commas between"),
        (("--steps", "0"), "--steps takes whole numbers above 0"),
        (("--report-only",), "leave out --report-only"),
        (("--pipeline", "somewhere"), "there is no folder somewhere"),
        (("--pipeline", "TINY"), "--prompt-file names a text file"),
        (("--pipeline", "demo"), "train it: python -m fxpass.tools.demo.train_unet"),
        (("--pipeline", "demo_dit"), "makes images of 32 x 32 pixels only; give --size 32"),
        (("--pipeline", "TINY", "--prompt-file", "PROMPTS", "--prompts", "4"), "give --prompts 3 or less"),
        (("--pipeline", "TINY", "--prompt-file", "MISSING"), "there is no file"),
    ],
)
def test_study_reports_wrong_arguments_in_one_line(
    arguments: tuple[str, ...], message: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(checkout.DEMOS, "demo", tmp_path / "nowhere")
    stand_ins = {"TINY": folder, "PROMPTS": folder.parent / "prompts.txt", "MISSING": tmp_path / "missing.txt"}
    result = fxpass("study", *(stand_ins.get(word, word) for word in arguments), "-o", tmp_path / "out")
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out" / "unsplit").exists()


def test_study_names_a_missing_library_before_it_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "skimage" else name)
    result = fxpass("study")
    assert result.exit_code == 2
    assert 'skimage is not installed; run: pip install "fxpass[study]"' in result.stderr
