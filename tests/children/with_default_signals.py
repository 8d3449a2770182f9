"""Run a Python program that signals reach as they do in a terminal.

A shell that starts tests in the background has them, and all that they start, ignore Ctrl-C.

    python with_default_signals.py PROGRAM ARGUMENT...
"""

import os
import signal
import sys

for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_DFL)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
