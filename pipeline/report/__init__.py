"""The building blocks of report pages: figures, words, tables, and the experiment that they show."""
