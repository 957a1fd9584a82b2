"""`texforce eval`: pictures of several variants with the same noise, scores, paired statistics, a report. Each stage reads
files and leaves files, so that each can be stopped, resumed and run alone."""
