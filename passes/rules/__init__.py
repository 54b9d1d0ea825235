"""How each operator family carries a layout from its inputs to its output."""
