"""Files by path or URI: object stores, leases, integrity, the workspace."""
