"""Algorithms that steer a policy with rewards, behind one small seam; DDPO is the first."""
