"""Recipes: those that ship (TOML, with their measured figures), the schema, loading and checking."""
