"""Text for the recipes: data modules that pack documents into windows, and a loader that resumes at any batch."""

from lowbit_lightning.data.python_source import PythonSource
from lowbit_lightning.data.resumable import ResumableDataLoader
from lowbit_lightning.data.text_files import TextFiles

__all__ = ["PythonSource", "ResumableDataLoader", "TextFiles"]
