"""`python -m reconmtl` is `reconmtl`."""

import sys

from reconmtl.cli import main

if __name__ == "__main__":
    sys.exit(main())
