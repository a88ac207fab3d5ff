"""Parts of Ray and of MLflow that are not public. They stand here alone, each with the reason why nothing public does.

tests/workflows/private holds them against the installed releases: it fails when one of them changes.
"""
