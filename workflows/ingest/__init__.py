"""Images from where they are."""
