"""Storage: files by path or URI, object stores, leases, integrity checks, the workspace."""
