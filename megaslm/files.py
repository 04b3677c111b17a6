"""What writers of files share."""

import os
from pathlib import Path


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` durable: wait until its names are on the disk.

    Windows cannot open folders, and needs no such thing.
    """
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
