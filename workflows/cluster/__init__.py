"""Ray: joining or starting a cluster, ending leftover processes, handling signals, checking files for `ray up`."""
