import sys

from dpdiff.cli import main

sys.exit(main())
