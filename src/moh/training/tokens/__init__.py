"""Text as tokens for language models: sources of documents, stores on disk, packed blocks, the order of a run.

`moh.training.tokens.prepare` turns a recipe's sources into the data set that the Trainer reads.
"""
