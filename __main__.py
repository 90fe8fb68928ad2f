"""`python -m trimtab` is the command `trimtab`."""

import sys

from trimtab.tools.cli.main import main

sys.exit(main())
