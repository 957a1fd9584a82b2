"""What `texforce gpt4v-rank` does: questions, judgments, ranking."""
