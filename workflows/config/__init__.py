"""The configuration: its schema, how recipes are loaded, and the recipes and sweep spaces themselves."""
