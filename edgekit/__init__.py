"""edgekit makes language models run well on small devices: compress, export, run, measure."""

import os

__version__ = "0.1.0"

# From 1.32 on onnxruntime keeps a device id and a file of events in ~/.cache, to be sent, unless it is told not to
# before it is imported. What runs here is nobody else's business; who wants that sets the variable to 0.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
