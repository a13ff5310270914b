"""See README.md."""

from absent import absent as __getattr__  # noqa: F401
