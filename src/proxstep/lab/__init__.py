"""Comparing algorithms: runs with their statistics, curves and report page, and exact toys."""
