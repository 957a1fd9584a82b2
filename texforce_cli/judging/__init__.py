"""Judges that look at pictures side by side: what they are asked, what they answer, and how answers are paid for once."""
