"""Text for the recipes: documents in windows, labelled texts, pairs of texts, and a loader that resumes anywhere."""

from lowbit_lightning.data.docstring_summaries import DocstringSummaries
from lowbit_lightning.data.docstring_topics import DocstringTopics
from lowbit_lightning.data.labeled_text import LabeledText
from lowbit_lightning.data.parallel_text import ParallelText
from lowbit_lightning.data.python_source import PythonSource
from lowbit_lightning.data.resumable import ResumableDataLoader
from lowbit_lightning.data.text_files import TextFiles

__all__ = [
    "DocstringSummaries",
    "DocstringTopics",
    "LabeledText",
    "ParallelText",
    "PythonSource",
    "ResumableDataLoader",
    "TextFiles",
]
