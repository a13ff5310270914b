"""Atropos environments of this project, each a program: `python -m atropos_exp.atropos.envs.<name> serve …`."""
