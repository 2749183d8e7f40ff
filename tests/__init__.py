"""Tests of everything, and comparisons with other packages.

Some fork processes and kill them. One that dies while it holds the lock of progress bars, which by
default all forks share, would leave the others waiting for ever; so would a fork made while the
thread that monitors the bars holds it.
"""

import threading

from tqdm import tqdm

tqdm.set_lock(threading.RLock())
tqdm.monitor_interval = 0
