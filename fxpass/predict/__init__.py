"""What a plan is worth on a machine: a simulation of all ranks, and the memory of a device."""
