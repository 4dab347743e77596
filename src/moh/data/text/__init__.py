"""Text as tokens for language models: files, named corpora, sources of documents, stores on disk, the order of a run."""
