"""`init`: inspects a user's checkpoint, asks for what is missing, and writes a recipe."""
