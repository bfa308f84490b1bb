"""What can be wrong with a pretrained model: not here, not of a kind that fits, or damaged."""

from __future__ import annotations


class NotAvailable(FileNotFoundError):  # noqa: N818 - the message begins with this name and reads on
    """The model is not on this machine; the message names the command that fetches it."""


class UnsupportedModel(ValueError):  # noqa: N818 - the message begins with this name and reads on
    """A model that `lib.models.transformer` does not compute, or a file format that is never read."""


class DamagedModel(ValueError):  # noqa: N818 - the message begins with this name and reads on
    """A file that is cut short, was changed, or contradicts itself."""


class NoRoom(OSError):  # noqa: N818 - the message begins with this name and reads on
    """The disk, or the room allowed on it, is full; nothing half-written was kept."""
