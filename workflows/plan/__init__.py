"""Tells what a recipe costs, before anything runs."""
