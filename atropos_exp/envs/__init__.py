"""Atropos environments of this project, each a program: `python -m atropos_exp.envs.<name> serve …`."""
