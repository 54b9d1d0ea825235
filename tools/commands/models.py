"""`fxpass models`: list the models that have names."""

from __future__ import annotations


def models() -> None:
    """List the models that have names."""
    from rich.table import Table

    from ...models.catalog import catalog
    from ...models.small import cases
    from ..console import console

    table = Table(box=None)
    for heading, justify in (("name", "left"), ("parameters", "right"), ("usual size", "right"), ("", "left")):
        table.add_column(heading, justify=justify, no_wrap=bool(heading))  # type: ignore[arg-type]
    for entry in catalog.values():
        frames = f" x {entry.frames}" if entry.frames > 1 else ""
        size = f"{entry.height} x {entry.width}{frames}"
        table.add_row(entry.name, f"{entry.parameters / 1e6:,.0f} M", size, entry.summary)
    out = console()
    out.print(table)
    out.print("\ntiny random models of the same kinds, for trying things out:")
    out.print("  " + ", ".join(f"small:{case.name}" for case in cases), soft_wrap=True)
