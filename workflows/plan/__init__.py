"""What a recipe costs before anything runs."""
