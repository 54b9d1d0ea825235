"""The zoo is one: no family of cases is left aside, no two cases have one name."""

from __future__ import annotations

import importlib
from collections import Counter
from pathlib import Path

from fxpass.models import small, zoo


def test_every_file_with_cases_is_a_family() -> None:
    names = sorted(path.stem for path in Path(zoo.__file__).parent.glob("*.py") if path.stem != "__init__")
    files = [importlib.import_module(f"{zoo.__name__}.{name}") for name in names]
    assert {file.__name__ for file in files if hasattr(file, "CASES")} == {file.__name__ for file in zoo.FAMILIES}


def test_every_case_has_a_name_of_its_own() -> None:
    names = Counter(case.name for cases in (small.cases, *(f.CASES for f in zoo.FAMILIES)) for case in cases)
    assert [name for name, count in names.items() if count > 1] == []
