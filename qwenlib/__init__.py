"""qwenlib: the Qwen2.5 technical report (arXiv 2412.15115) as a library you can run."""

__version__ = "0.1.0"
