"""Where and how it runs: devices, memory, threads, processes, unfinished results."""
