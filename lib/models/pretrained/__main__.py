"""python -m lib.models.pretrained [NAME …]: fetch pretrained models; without a name, those of the book."""

import sys

from lib.models.pretrained import DamagedModel, NoRoom, NotAvailable, UnsupportedModel, available, fetch
from lib.models.pretrained.sources import PACKAGES


def main(names: list[str]) -> int:
    for name in names or PACKAGES:
        try:
            here = available(name)
            print(f"{name}: {'is here already' if here else 'now here'}, {fetch(name)}", flush=True)
        except (NotAvailable, DamagedModel, NoRoom, UnsupportedModel, ValueError, PermissionError) as error:
            print(f"{name}: {error.strerror if isinstance(error, NoRoom) else error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
