"""python -m sf_core"""

import signal
import sys

from .cli import main

signal.signal(signal.SIGTERM, signal.default_int_handler)  # kill stops as cleanly as ^C
sys.exit(main())
