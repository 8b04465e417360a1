"""What the pages of a report are made of: figures, words, tables, and the experiment that they show."""
