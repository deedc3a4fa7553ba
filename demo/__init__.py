"""How people meet the model: the Gradio page, its handlers and the backends behind them."""

import os
import tempfile

# Before Gradio is imported: its own default, `gradio` in the folder for temporary files, belongs to whoever ran any
# Gradio application on this machine first.
os.environ.setdefault("GRADIO_TEMP_DIR", f"{tempfile.gettempdir()}/story-gradio-{os.getuid()}")
