"""python -m sf_core"""

import os
import signal
import sys

from .cli.main import main

signal.signal(signal.SIGTERM, signal.default_int_handler)  # kill stops as cleanly as ^C
status = main()
if "RANK" in os.environ:
    # One of torchrun's processes. FSDP's caches keep gloo's threads alive, though the group is left; one that still has
    # a tensor to let go of while Python ends aborts a process whose work is done (pytorch/pytorch pull request 179291).
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
sys.exit(status)
