"""Comparing algorithms: run folders, their statistics, their curves and the report page."""
