"""``python -m qzoo``: the same as the ``qzoo`` command."""

from qzoo.cli import main

raise SystemExit(main())
