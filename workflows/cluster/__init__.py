"""Ray: joining or starting it, what its processes leave, signals, the files for `ray up`."""
