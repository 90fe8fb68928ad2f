"""Entry point of `python -m trimtab`, the same as the command `trimtab`."""

import sys

from trimtab.tools.cli.main import main

sys.exit(main())
