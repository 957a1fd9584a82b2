"""What is looked at: grids, before and after, curves, and the page of an evaluation."""
