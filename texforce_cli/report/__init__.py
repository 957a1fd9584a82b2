"""Pictures of results: grids, before and after, curves."""
