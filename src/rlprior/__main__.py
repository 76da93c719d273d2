"""`python -m rlprior`."""

import sys

from rlprior.cli import main

sys.exit(main())
