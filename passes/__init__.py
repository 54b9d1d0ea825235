"""The passes of the compiler, in the order in which they run."""
