"""Stands in for torchvision, see README.md."""

from torchvision import io, transforms  # noqa: F401
