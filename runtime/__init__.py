"""Run a plan: process groups, executors, stale state."""
