"""The backend of one part of a module or model of several, for the layers above the ops."""

from fastattn.backends import of_part

__all__ = ["of_part"]
