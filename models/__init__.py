"""Catalog of real models, pipeline adapters and the demo pipeline: the only place that names models."""
