"""A recipe: its sections, and how it is read, checked and explained."""
