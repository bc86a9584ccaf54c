"""What the geometry did to a step's gradient, in numbers and in words."""
