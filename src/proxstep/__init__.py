"""proxstep: proximal policy steps for language models, without pi_old and without clipping."""

__version__ = "0.1.0"
