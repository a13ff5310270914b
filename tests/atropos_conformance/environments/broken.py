"""An environment that cannot start."""

import sys

print("this environment has no tasks", flush=True)
sys.exit(3)
