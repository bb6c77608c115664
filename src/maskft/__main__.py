import sys

from maskft.cli import main

sys.exit(main())
