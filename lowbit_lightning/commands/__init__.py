"""The verbs of ``lowbit-lightning`` that are not Lightning's own, one file each, imported only when asked for."""
