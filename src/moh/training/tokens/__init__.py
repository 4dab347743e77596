"""Text as tokens for language models: sources of documents, stores on disk, packed blocks, the order of a run.

From a recipe's list of sources to the data set that the Trainer reads: `moh.training.tokens.prepare`. Not for models.
"""
