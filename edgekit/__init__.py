"""edgekit makes language models run well on small devices: compress, export, run, measure."""

__version__ = "0.1.0"
