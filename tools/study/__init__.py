"""`fxpass study`: the grid of cells, their runs, the results that are kept, and the report."""
