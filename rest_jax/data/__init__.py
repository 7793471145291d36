"""Text: corpora, vocabularies, batches and the candidate store."""
