"""From a model and example inputs to a functional ATen graph."""
