"""Engines that run ISOPO and OPO inside other libraries' trainers."""
