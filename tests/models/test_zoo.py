"""The zoo is complete: every file is a family, names are unique, every class of diffusers is covered or left out."""

from __future__ import annotations

import importlib
from collections import Counter
from functools import cache
from pathlib import Path

import diffusers
from torch import nn

from fxpass.models import small, zoo

FOLDERS = ("unets", "transformers", "controlnets", "autoencoders")


def test_every_file_with_cases_is_a_family() -> None:
    folder = Path(zoo.__file__).parent
    names = (".".join(path.relative_to(folder).with_suffix("").parts) for path in folder.rglob("*.py"))
    files = [importlib.import_module(f"{zoo.__name__}.{name}") for name in names if not name.endswith("__init__")]
    assert {file.__name__ for file in files if hasattr(file, "CASES")} == {file.__name__ for file in zoo.FAMILIES}


def test_case_names_of_the_zoo_are_unique() -> None:
    names = Counter(case.name for cases in (small.cases, *(f.CASES for f in zoo.FAMILIES)) for case in cases)
    assert [name for name, count in names.items() if count > 1] == []


@cache
def kinds() -> frozenset[str]:
    """The classes that cases stand for."""
    return frozenset(case.covers or zoo.kind_of(case, case.build())[0] for case in zoo.CASES)


@cache
def exported() -> frozenset[str]:
    """Classes of models that diffusers exports, at the top or from the folders of denoisers and autoencoders."""
    folders = [importlib.import_module(f"diffusers.models.{folder}") for folder in FOLDERS]
    inside = {name for folder in folders for name, value in vars(folder).items() if _is(value, nn.Module)}
    top = {name for name in dir(diffusers) if _is(getattr(diffusers, name, None), diffusers.ModelMixin)}
    return frozenset(inside | top) - {"ModelMixin"}


def _is(value: object, kind: type) -> bool:
    return isinstance(value, type) and issubclass(value, kind)


def test_every_class_that_diffusers_exports_has_a_case_or_a_reason() -> None:
    assert sorted(exported() - kinds() - set(zoo.LEFT_OUT)) == []


def test_classes_that_are_left_out_have_no_case_and_a_reason() -> None:
    assert sorted(kinds() & set(zoo.LEFT_OUT)) == []
    assert all(len(reason) > 20 for reason in zoo.LEFT_OUT.values())


def test_classes_that_are_left_out_exist() -> None:
    assert sorted(set(zoo.LEFT_OUT) - exported()) == []
