"""From a foreign checkpoint to a recipe: what `init` finds, asks and proposes."""
